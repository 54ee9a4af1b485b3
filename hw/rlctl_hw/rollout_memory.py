"""Bytes of one rollout engine on one device, by phase: Hugging Face or vLLM, split over the devices of one engine."""

from __future__ import annotations

from dataclasses import replace

from rlctl_hw.needs import (
    CONTEXT_GIB,
    CPU_PROCESS_GIB,
    CPU_VLLM_GIB,
    DTYPE_BYTES,
    GIB,
    VLLM_ASLEEP_GIB,
    VLLM_WORKING_GIB,
    Need,
    Phase,
)
from rlctl_hw.params import kv_bytes
from rlctl_hw.training_memory import bucket_bytes, forward_bytes_per_token, largest_tensor
from rlctl_hw.types import Layout, Workload

PREFILL_TOKENS = 8192
"""Prompt tokens that the Hugging Face engine computes in one pass, or one prompt if that is longer."""


def rollout_needs(phase: Phase, workload: Workload, layout: Layout) -> list[Need]:
    """Return what one rollout engine holds on one device during a phase."""
    if workload.rollout == "vllm":
        return _vllm_needs(phase, workload, layout)
    return _hf_needs(phase, workload, layout)


def vllm_least_gib(workload: Workload, layout: Layout) -> float:
    """Return the least memory with which vLLM can hold the weights and one longest sequence, in GiB a device."""
    kv = sequence_cache_bytes(workload.longest_tokens, workload, layout)
    return (rollout_weight_bytes(workload, layout) + kv) / GIB + VLLM_WORKING_GIB


def num_engines(layout: Layout) -> int:
    """Return the rollout engines that run side by side."""
    return max(1, layout.rollout_devices // (layout.rollout_tensor_parallel * layout.rollout_pipeline_parallel))


def rollout_weight_bytes(workload: Workload, layout: Layout) -> float:
    """Return the bytes of one engine's weights on one of its devices."""
    devices = layout.rollout_tensor_parallel * layout.rollout_pipeline_parallel
    return workload.shape.num_params * DTYPE_BYTES[layout.rollout_dtype] / devices


def sequence_cache_bytes(num_tokens: float, workload: Workload, layout: Layout) -> float:
    """Return the bytes of a sequence's keys and values on one device of an engine.

    Heads are split as far as there are any; a latent is whole on every device.
    """
    shape = workload.shape
    split = 1 if shape.latent is not None else min(layout.rollout_tensor_parallel, shape.num_kv_heads)
    split *= layout.rollout_pipeline_parallel
    return kv_bytes(shape, num_tokens, DTYPE_BYTES[layout.rollout_dtype]) / split


def _hf_needs(phase: Phase, workload: Workload, layout: Layout) -> list[Need]:
    """On accelerators a sleeping engine keeps its context only; on CPU it keeps weights and cache."""
    shape, width = workload.shape, DTYPE_BYTES[layout.rollout_dtype]
    on_cpu = layout.device == "cpu"
    overhead = _process(on_cpu)
    weights = Need("weights", rollout_weight_bytes(workload, layout))
    rows = layout.max_concurrent
    cache = Need("kv_cache", rows * sequence_cache_bytes(workload.longest_tokens, workload, layout))
    if phase == "generation":
        prompt_tokens = max(min(rows * workload.max_prompt_tokens, PREFILL_TOKENS), workload.max_prompt_tokens)
        return [
            weights,
            overhead,
            cache,
            # A cache that grows is copied: old and new exist at one time.
            replace(cache, part="buffers"),
            Need("activations", prompt_tokens * forward_bytes_per_token(shape, layout.rollout_dtype)),
            # Logits as computed, in fp32, as log-softmax, as probabilities, as their running sum.
            Need("logits", rows * shape.vocab_size * (width + 4 * 4)),
        ]
    held = [overhead, weights, cache] if on_cpu else [overhead]
    if phase != "weight_sync":
        return held
    return [*(held if on_cpu else [overhead, weights]), Need("buffers", 2 * bucket_bytes(workload, width))]


def _process(on_cpu: bool) -> Need:
    if on_cpu:
        return Need("overhead", CPU_PROCESS_GIB * GIB, "assumed")
    return Need("context", CONTEXT_GIB * GIB, "assumed")


def _vllm_needs(phase: Phase, workload: Workload, layout: Layout) -> list[Need]:
    weights = Need("weights", rollout_weight_bytes(workload, layout))
    sync = phase == "weight_sync"
    # Buckets wait in host memory; a tensor is made anew on the device, or copied there for its checksum.
    received = largest_tensor(workload.shape) * DTYPE_BYTES[layout.rollout_dtype]
    bucket = Need("buffers", received if sync else 0.0)
    if layout.device == "cpu":
        # Sleep does nothing on CPU.
        cache = Need("kv_cache", workload.kv_cache_gib * GIB)
        return [weights, cache, bucket, Need("overhead", CPU_VLLM_GIB * GIB, "assumed")]
    if phase == "generation" or sync:
        # It wakes as a whole: its cache is there while weights arrive. It keeps to its share, whatever it holds.
        taken = layout.gpu_memory_share * layout.memory_gib * GIB
        working = Need("overhead", VLLM_WORKING_GIB * GIB, "assumed", spread=0.0)
        cache = Need("kv_cache", max(0.0, taken - weights.bytes - working.bytes), spread=0.0)
        return [replace(weights, spread=0.0), cache, bucket, working]
    return [Need("overhead", VLLM_ASLEEP_GIB * GIB, "assumed")]
