"""Rollout engines: how responses are sampled."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from rlctl_train.config.base import DTYPES, Config


class _Rollout(Config):
    max_response_tokens: PositiveInt = 512
    """Longest response, in tokens."""
    temperature: PositiveFloat = 1.0
    """Sampling temperature of training rollouts; the trainer divides logits by the same value."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Nucleus: smallest set of tokens whose probability reaches this share."""
    top_k: NonNegativeInt = 0
    """Sample among the k likeliest tokens; 0 means all."""
    ignore_eos: bool = False
    """Go on after the end-of-sequence token until `max_response_tokens` (for benchmarks)."""
    num_devices: PositiveInt | None = None
    """Devices that generate (CPU: worker processes); unset lets the planner choose."""
    dtype: Annotated[Literal["float32", "bfloat16"] | None, DTYPES] = None
    """Precision of generation; unset follows the trainer's compute precision."""


class HfRollout(_Rollout):
    """Generate with transformers on any device; finished sequences leave the batch."""

    type: Literal["hf"] = "hf"
    max_concurrent: PositiveInt | None = None
    """Sequences decoded at one time per worker; unset lets the planner choose."""


class VllmRollout(_Rollout):
    """Generate with vLLM."""

    type: Literal["vllm"] = "vllm"
    gpu_memory_share: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Share of total device memory vLLM may take; unset lets the planner choose."""
    kv_cache_gib: NonNegativeFloat = 1.0
    """Size of the KV cache when vLLM runs on CPU, in GiB."""
    enforce_eager: bool = False
    """Skip compilation and CUDA graphs."""
    tensor_parallel: PositiveInt | None = None
    """Devices over which one engine splits each layer's matrices; unset lets the planner choose."""
    max_concurrent: PositiveInt | None = None
    """Sequences decoded at one time per engine; unset lets the planner choose."""
    engine_args: dict[str, Any] = Field(default_factory=dict)
    """Further arguments of vLLM's `EngineArgs`, passed as they are."""


RolloutConfig = Annotated[HfRollout | VllmRollout, Field(discriminator="type")]
