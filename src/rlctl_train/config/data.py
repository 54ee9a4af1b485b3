"""Where prompts come from. Files are parquet in the field's common columns (see docs/data.md)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from rlctl_train.config.base import Choices, Config


class _Data(Config):
    max_prompt_tokens: PositiveInt = 512
    """Longest prompt after the chat template, in tokens."""
    overlong_prompts: Annotated[
        Literal["error", "drop"],
        Choices({"error": "stop before training", "drop": "leave those rows out, counted and said"}),
    ] = "error"
    """What happens to rows whose prompt is longer: stop before training, or leave them out (counted and said)."""
    shuffle: bool = True
    """Visit the training rows in a new order each epoch (from `seed`), or in file order."""


class ParquetData(_Data):
    """Read prompts from parquet files with the columns `data_source`, `prompt`, `reward_model`, `extra_info`."""

    type: Literal["parquet"] = "parquet"
    train: str
    """Parquet file (or folder of parquet files) with training prompts."""
    val: str | None = None
    """Parquet file with held-out prompts; unset turns validation off."""


class ArithmeticData(_Data):
    """Make sums such as `23+45=` in the run folder; train and held-out problems never overlap."""

    type: Literal["arithmetic"] = "arithmetic"
    operators: Annotated[
        tuple[Literal["+", "-", "*"], ...], Choices({"+": "sums", "-": "differences", "*": "products"})
    ] = ("+",)
    """Operators that occur in the problems."""
    min_operand: NonNegativeInt = 0
    """Smallest operand."""
    max_operand: PositiveInt = 99
    """Largest operand."""
    num_train: PositiveInt = 2048
    """Number of training problems."""
    num_val: NonNegativeInt = 256
    """Number of held-out problems."""
    careless_demonstrations: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of training problems whose demonstration forgets to carry; the ground truth is always right."""


DataConfig = Annotated[ParquetData | ArithmeticData, Field(discriminator="type")]
