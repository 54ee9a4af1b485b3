"""Training engines. Sizes left unset are the planner's."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from rlctl_train.config.base import DTYPES, Choices, Config


class Fsdp2Config(Config):
    """PyTorch FSDP2: fp32 master weights sharded over all trainer ranks."""

    type: Literal["fsdp2"] = "fsdp2"
    compute_dtype: Annotated[Literal["float32", "bfloat16"] | None, DTYPES] = None
    """Precision of forward and backward; unset takes bfloat16 on accelerators and float32 on CPU."""
    gradient_checkpointing: bool | None = None
    """Recompute each layer's activations in the backward pass to save memory; unset lets the planner choose."""
    offload_params: bool | None = None
    """Keep parameters in host memory while the engine is not in use; unset lets the planner choose."""
    offload_optimizer: bool | None = None
    """Keep optimizer state in host memory between optimizer steps; unset lets the planner choose."""
    reshard_after_forward: bool | None = None
    """Free gathered parameters after each layer's forward pass (less memory, more communication); unset lets the
    planner choose."""
    packing: bool = True
    """Concatenate sequences without padding; false pads each micro-batch to its longest sequence."""
    max_tokens_per_micro_batch: PositiveInt | None = None
    """Token budget of one forward/backward pass per rank; unset lets the planner choose."""
    logits_chunk_tokens: PositiveInt = 1024
    """Tokens whose logits exist at one time while log-probabilities are computed."""


class MegatronConfig(Config):
    """Megatron-core: tensor, pipeline, context and expert parallelism. It is planned for, and not yet trained with."""

    type: Literal["megatron"] = "megatron"
    compute_dtype: Annotated[Literal["bfloat16"] | None, DTYPES] = None
    """Precision of weights, forward and backward; master weights are float32. Unset takes bfloat16."""
    tensor_parallel: PositiveInt | None = None
    """Ranks that split each layer's matrices; unset lets the planner choose."""
    pipeline_parallel: PositiveInt | None = None
    """Stages that split the layers; unset lets the planner choose."""
    context_parallel: PositiveInt | None = None
    """Ranks that split each sequence; unset lets the planner choose."""
    expert_parallel: PositiveInt | None = None
    """Ranks that split the experts of a mixture-of-experts layer; unset lets the planner choose."""
    sequence_parallel: bool | None = None
    """Split norms and residuals along the sequence over the tensor-parallel ranks; unset lets the planner choose."""
    recompute: Annotated[
        Literal["none", "selective", "full"] | None,
        Choices(
            {
                "none": "keep every activation",
                "selective": "compute attention's own anew",
                "full": "keep only each layer's input and compute the layer anew: least memory, a third more work",
            }
        ),
    ] = None
    """Activations computed anew in the backward pass: none, attention's own, or whole layers; unset lets the planner
    choose."""
    offload_params: bool | None = None
    """Keep parameters in host memory while the engine is not in use; unset lets the planner choose."""
    offload_optimizer: bool | None = None
    """Keep optimizer state in host memory while the engine is not in use; unset lets the planner choose."""
    host_optimizer_share: Annotated[float, Field(ge=0, le=1)] | None = None
    """Share of the optimizer's moments that stay in host memory, where their step is taken; unset lets the planner
    choose."""
    max_tokens_per_micro_batch: PositiveInt | None = None
    """Token budget of one forward/backward pass per data-parallel rank; unset lets the planner choose."""


EngineConfig = Annotated[Fsdp2Config | MegatronConfig, Field(discriminator="type")]
