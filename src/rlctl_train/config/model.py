"""Which model is trained: a Hugging Face folder or hub id, or a small random one made on the spot."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from rlctl_train.config.base import Choices, Config


class LoraConfig(Config):
    """Train low-rank adapters beside frozen weights (Hu et al. 2021, arXiv:2106.09685); learning rates are higher."""

    rank: PositiveInt = 32
    """Inner width of each adapter, in features."""
    alpha: PositiveFloat = 32.0
    """Strength of the adapters: their output is multiplied by alpha / rank."""
    target_modules: Annotated[tuple[str, ...], Field(min_length=1)] = ("all-linear",)
    """Linear layers that get adapters, by the end of their names, such as `q_proj`; `all-linear` takes every one
    inside the decoder."""


class PretrainedModel(Config):
    """Load weights, config and tokenizer from a folder or from the hub."""

    type: Literal["pretrained"] = "pretrained"
    path: str
    """Folder with `config.json`, safetensors and a tokenizer, or a hub id such as `Qwen/Qwen2.5-0.5B-Instruct`."""
    tokenizer: str | None = None
    """Folder or hub id of the tokenizer; unset takes the model's own."""
    revision: str | None = None
    """Hub revision (branch, tag or commit); unset takes the default branch."""
    trust_remote_code: bool = False
    """Run Python code that ships with the model. Only for models whose code you have read."""
    lora: LoraConfig | None = None
    """Train low-rank adapters in place of the weights; unset trains every weight."""


class RandomModel(Config):
    """Make a decoder with random weights and a character-level tokenizer in the run folder; nothing is downloaded."""

    type: Literal["random"] = "random"
    architecture: Annotated[
        Literal["qwen2", "qwen3", "llama"],
        Choices(
            {
                "qwen2": "biases on query, key and value",
                "qwen3": "norms on the heads of query and key, no biases",
                "llama": "neither",
            }
        ),
    ] = "qwen2"
    """Transformers architecture to instantiate."""
    hidden_size: PositiveInt = 128
    """Width of the residual stream, in features."""
    num_layers: PositiveInt = 4
    """Number of decoder layers."""
    num_heads: PositiveInt = 4
    """Number of attention (query) heads; must divide `hidden_size`."""
    num_kv_heads: PositiveInt = 2
    """Number of key/value heads; must divide `num_heads`."""
    intermediate_size: PositiveInt = 512
    """Width of the MLP, in features."""
    max_position: PositiveInt = 512
    """Longest sequence the model accepts, in tokens."""
    tie_embeddings: bool = True
    """Share the input embedding with the output projection."""
    init_std: Annotated[float, Field(gt=0)] = 0.02
    """Standard deviation of the initial weights."""
    lora: LoraConfig | None = None
    """Train low-rank adapters in place of the weights; unset trains every weight."""


ModelConfig = Annotated[PretrainedModel | RandomModel, Field(discriminator="type")]
