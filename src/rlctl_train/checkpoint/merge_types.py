"""What may be chosen of a merge, and what a merge will do: facts without deeds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from rlctl_train.checkpoint.safetensors_writer import Output, WeightFile

DtypeName = Literal["keep", "bfloat16", "float16", "float32"]


@dataclass(frozen=True)
class MergeOptions:
    """What a person may choose of the output."""

    dtype: DtypeName = "keep"
    shard_gb: float = 5.0
    """Largest size of a weight file, in 10^9 bytes."""
    adapter: Literal["fold", "keep", "only"] = "fold"
    value_head: Literal["keep", "drop"] | None = None
    """Unset leaves a head that the config's own class has, and refuses any other."""
    base: Path | None = None
    """Folder of the weights below an adapter that comes without any."""
    config: Path | None = None
    """Folder of config and tokenizer, where the checkpoint has none."""
    trust_remote_code: bool = False
    allow_extra: bool = False
    """Whether tensors that the model does not know are written along."""
    untie: bool = False
    """Whether embeddings that the config ties and the checkpoint has twice, differing, may become two."""


@dataclass(frozen=True)
class Problem:
    """Why a checkpoint cannot be merged so, and the way out."""

    what: str
    remedy: str


@dataclass(frozen=True)
class MergePlan:
    """What a merge will write."""

    kind: str
    source: Path
    options: MergeOptions
    files: tuple[WeightFile, ...]
    texts: dict[str, str]
    """Small files that are written anew, by name."""
    copies: dict[str, Path]
    """Files that are copied, by name."""
    inputs: tuple[Path, ...]
    """Every file that is read."""
    dtype: torch.dtype
    """Of the most of the weights."""
    folded: tuple[str, ...] = ()
    """Weights that an adapter is added to."""
    tied: tuple[str, ...] = ()
    """Tensors left out because another one stands for them."""
    trimmed: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    problems: tuple[Problem, ...] = ()

    @property
    def nbytes(self) -> int:
        """Return the size of all weight files."""
        return sum(file.nbytes for file in self.files)

    def outputs(self) -> Iterator[Output]:
        """Yield every tensor that is written."""
        for file in self.files:
            yield from (output for _, output in file.outputs)
