"""Training engines. Sizes left unset are the planner's."""

from __future__ import annotations

from typing import Literal

from pydantic import PositiveInt

from rlctl_train.config.base import Config


class Fsdp2Config(Config):
    """PyTorch FSDP2: fp32 master weights sharded over all trainer ranks."""

    type: Literal["fsdp2"] = "fsdp2"
    compute_dtype: Literal["float32", "bfloat16"] | None = None
    """Precision of forward and backward; unset takes bfloat16 on accelerators and float32 on CPU."""
    gradient_checkpointing: bool = False
    """Recompute each layer's activations in the backward pass to save memory."""
    offload_params: bool = False
    """Keep parameters and gradients in host memory while the engine is not in use."""
    offload_optimizer: bool = False
    """Keep optimizer state in host memory between optimizer steps."""
    reshard_after_forward: bool = True
    """Free gathered parameters after each layer's forward pass (less memory, more communication)."""
    packing: bool = True
    """Concatenate sequences without padding; false pads each micro-batch to its longest sequence."""
    max_tokens_per_micro_batch: PositiveInt | None = None
    """Token budget of one forward/backward pass per rank; unset lets the planner choose."""
    logits_chunk_tokens: PositiveInt = 1024
    """Tokens whose logits exist at one time while log-probabilities are computed."""


# One variant today; a second engine turns this into a union on `type`.
EngineConfig = Fsdp2Config
