"""How much at one time: tokens of a micro-batch, sequences of a rollout engine, vLLM's share, Ray's object store.

Numbers the planner chooses keep a phase below `TARGET_SHARE` of a device; anything above `LIMIT_SHARE` is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import ceil, floor

from rlctl_hw.memory import phase_gib
from rlctl_hw.needs import DTYPE_BYTES, GIB, Phase, total
from rlctl_hw.rollout_memory import num_engines, rollout_needs, sequence_cache_bytes, vllm_least_gib
from rlctl_hw.training_memory import bucket_bytes, trainer_needs
from rlctl_hw.types import Choice, DoesNotFit, Layout, Workload

TARGET_SHARE, LIMIT_SHARE = 0.85, 0.95
MOST_TOKENS, MOST_TOKENS_CPU, TOKEN_STEP = 16384, 4096, 128
MOST_SEQUENCES, VLLM_SEQUENCES = 1024, 256
CPU_CACHE_SHARE = 0.25
"""Of the host's memory, for the cache that the Hugging Face engine keeps on CPU while training goes on."""
MOST_VLLM_SHARE, STARTING_SHARE = 0.9, 0.92
BYTES_PER_TOKEN_OF_BATCH = 64
"""A token of the travelling batch: ids, mask, and seven float32 or int64 columns."""
STORE_STEP_GIB = 0.25
BUCKETS_IN_FLIGHT = 6
"""The sender runs at most four buckets ahead; one is being packed and one unpacked."""

TRAINING_PHASES: tuple[Phase, ...] = ("actor_update", "logprobs", "critic_update", "values")


def micro_batch(workload: Workload, layout: Layout) -> Choice:
    """Choose the token budget of one forward and backward pass; `layout` holds the least, one longest sequence."""
    key, least = "engine.max_tokens_per_micro_batch", workload.longest_tokens
    cap = MOST_TOKENS_CPU if layout.device == "cpu" else MOST_TOKENS
    if least >= cap:
        return Choice(key, least, "one longest sequence; more at one time gains no speed", "formula")
    cache_gib = _kept_cache_gib(workload, layout)
    tokens = cap
    for phase in TRAINING_PHASES:
        tokens = _largest(
            lambda count, phase=phase: (
                phase_gib(phase, workload, replace(layout, max_tokens_per_micro_batch=count)) + cache_gib
            ),
            _target(layout), least=least, most=tokens, step=TOKEN_STEP,
        )  # fmt: skip
    if tokens == cap:
        where = "on CPU" if layout.device == "cpu" else "per rank"
        return Choice(key, tokens, f"fits with room to spare; more {where} gains no speed", "assumed")
    reason = f"the most that keeps training within {TARGET_SHARE:.0%} of {layout.memory_gib:.1f} GiB"
    if tokens == least:
        reason = f"one longest sequence; more would pass {TARGET_SHARE:.0%} of {layout.memory_gib:.1f} GiB"
    return Choice(key, tokens, reason, "formula")


def max_concurrent(workload: Workload, layout: Layout) -> Choice:
    """Choose how many sequences one rollout engine decodes at one time; `layout` holds the least, one."""
    key = "rollout.max_concurrent"
    own = ceil(workload.step_sequences / num_engines(layout))
    if workload.rollout == "vllm":
        count = min(own, VLLM_SEQUENCES)
        why = f"this engine's {own} sequences of a step" if own <= VLLM_SEQUENCES else "vLLM fills its cache up to that"
        return Choice(key, count, f"{why}; it queues what its KV cache cannot hold", "assumed")
    most = min(own, MOST_SEQUENCES)
    if layout.device == "cpu":
        most = max(1, min(most, int(_kept_cache_gib(workload, layout) / _cache_gib(1, workload, layout))))
    count = _largest(
        lambda count: phase_gib("generation", workload, replace(layout, max_concurrent=count)),
        _target(layout), least=1, most=most, step=1,
    )  # fmt: skip
    if count == own:
        return Choice(key, count, "all sequences of a step that fall to one engine", "formula")
    if count == MOST_SEQUENCES:
        return Choice(key, count, f"of {own} sequences a step; more at one time gains no speed", "assumed")
    limit = f"{TARGET_SHARE:.0%} of {layout.memory_gib:.1f} GiB"
    if layout.device == "cpu" and count == most:
        limit = f"a cache of {CPU_CACHE_SHARE:.0%} of {layout.memory_gib:.1f} GiB"
    return Choice(key, count, f"of {own} sequences a step, as many as stay within {limit}", "formula")


def gpu_memory_share(workload: Workload, layout: Layout) -> Choice | None:
    """Choose the share of total device memory that vLLM takes; None for engines that take what they need."""
    key = "rollout.gpu_memory_share"
    if workload.rollout != "vllm":
        return None
    if layout.device == "cpu":
        taken = total(rollout_needs("generation", workload, layout)) / GIB
        share = min(1.0, ceil(100 * taken / layout.memory_gib) / 100)
        return Choice(
            key, share, "weights, process and rollout.kv_cache_gib; on CPU that key sets the cache", "formula"
        )
    least = ceil(100 * vllm_least_gib(workload, layout) / layout.memory_gib) / 100
    residue = _beside_vllm_gib(workload, layout)
    most = floor(100 * min(MOST_VLLM_SHARE, STARTING_SHARE - residue / layout.memory_gib)) / 100
    if most < least:
        left_gib = max(0.0, STARTING_SHARE * layout.memory_gib - residue)
        raise DoesNotFit(
            f"vLLM needs {vllm_least_gib(workload, layout):.1f} GiB for the weights and one sequence of "
            f"{workload.longest_tokens} tokens, but a device of {layout.memory_gib:.1f} GiB has {left_gib:.1f} GiB "
            f"beside {residue:.1f} GiB of the trainer and weights in transit",
            (),
        )
    side = "weights in transit" if workload.placement == "split" else "the trainer and weights in transit"
    beside = f"what {side}, {residue:.1f} GiB, leave beside it"
    return Choice(key, most, beside, "formula")


def check_pinned_share(workload: Workload, layout: Layout) -> None:
    """Refuse a share in which vLLM cannot hold the weights and one longest sequence."""
    if workload.rollout != "vllm" or layout.device == "cpu":
        return
    least = vllm_least_gib(workload, layout)
    if layout.gpu_memory_share * layout.memory_gib < least:
        raise DoesNotFit(
            f"rollout.gpu_memory_share={layout.gpu_memory_share:g} of {layout.memory_gib:.1f} GiB is "
            f"{layout.gpu_memory_share * layout.memory_gib:.1f} GiB, but vLLM needs {least:.1f} GiB for the weights "
            "and one longest sequence",
            (f"set rollout.gpu_memory_share={ceil(100 * least / layout.memory_gib) / 100:g} or more, or unset it",)
            if least < LIMIT_SHARE * layout.memory_gib
            else (),
        )


def check_cpu_cache(workload: Workload, layout: Layout) -> None:
    """Refuse a KV cache of vLLM on CPU that cannot hold one longest sequence."""
    least = sequence_cache_bytes(workload.longest_tokens, workload, layout) / GIB
    if workload.rollout == "vllm" and layout.device == "cpu" and workload.kv_cache_gib < least:
        raise DoesNotFit(
            f"rollout.kv_cache_gib={workload.kv_cache_gib:g} cannot hold one sequence of {workload.longest_tokens} "
            f"tokens, which takes {least:.2f} GiB",
            (f"set rollout.kv_cache_gib={ceil(10 * least) / 10:g} or more",),
        )


def object_store(workload: Workload, layout: Layout) -> Choice:
    """Choose the size of Ray's object store: the step's batch as made and as handed on, and weights in flight."""
    batch = 2 * workload.step_sequences * workload.longest_tokens * BYTES_PER_TOKEN_OF_BATCH
    batch += workload.distribution_bytes
    width = DTYPE_BYTES[layout.rollout_dtype]
    buckets = BUCKETS_IN_FLIGHT * bucket_bytes(workload, width)
    size = ceil((batch + buckets) / GIB / STORE_STEP_GIB) * STORE_STEP_GIB
    reason = f"{batch / GIB:.2f} GiB of batches and {buckets / GIB:.2f} GiB of weight buckets in flight"
    return Choice("ray.object_store_gib", size, reason, "assumed")


def _kept_cache_gib(workload: Workload, layout: Layout) -> float:
    """Return what the engine's cache may take beside training: on accelerators it sleeps, and vLLM's is counted."""
    if layout.device != "cpu" or workload.rollout == "vllm":
        return 0.0
    own = min(MOST_SEQUENCES, ceil(workload.step_sequences / layout.rollout_devices))
    share = CPU_CACHE_SHARE * layout.memory_gib / layout.rollout_devices
    return min(_cache_gib(own, workload, layout), share)


def _cache_gib(rows: int, workload: Workload, layout: Layout) -> float:
    return rows * sequence_cache_bytes(workload.longest_tokens, workload, layout) / GIB


def _target(layout: Layout) -> float:
    return TARGET_SHARE * layout.memory_gib


def _beside_vllm_gib(workload: Workload, layout: Layout) -> float:
    """Return the most that is on vLLM's devices beside it while it is awake: in generation and in weight sync."""
    asleep, sending = (
        sum(need.bytes + need.off for need in trainer_needs(phase, workload, layout))
        for phase in ("generation", "weight_sync")
    )
    received = total([need for need in rollout_needs("weight_sync", workload, layout) if need.part == "buffers"])
    if workload.placement == "split":
        return received / GIB
    return max(asleep, sending + received) / GIB


def _largest(gib: Callable[[int], float], limit_gib: float, *, least: int, most: int, step: int) -> int:
    """Return the largest multiple of `step` up to `most` whose `gib` is within the limit, or `least`.

    `gib` never falls as its argument grows, and mostly grows along lines: the next guess is where a line would cross.
    """
    low, high = -(-least // step), most // step
    if high <= low or gib(high * step) <= limit_gib:
        return max(least, high * step)
    at_low, at_high = gib(low * step), gib(high * step)
    if at_low > limit_gib:
        return least
    while high - low > 1:
        share = (limit_gib - at_low) / (at_high - at_low)
        guess = min(high - 1, max(low + 1, low + int(share * (high - low))))
        at_guess = gib(guess * step)
        if at_guess <= limit_gib:
            low, at_low = guess, at_guess
        else:
            high, at_high = guess, at_guess
    return max(least, low * step)
