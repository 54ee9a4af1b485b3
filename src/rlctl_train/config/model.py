"""Which model is trained: a Hugging Face folder or hub id, or a small random one made on the spot."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from rlctl_train.config.base import Config


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


class RandomModel(Config):
    """Make a decoder with random weights and a character-level tokenizer in the run folder; nothing is downloaded."""

    type: Literal["random"] = "random"
    architecture: Literal["qwen2", "qwen3", "llama"] = "qwen2"
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


ModelConfig = Annotated[PretrainedModel | RandomModel, Field(discriminator="type")]
