"""Bytes per device by phase and part, for FSDP2 training with a Hugging Face or vLLM rollout engine.

Every role (actor, critic, reference, rollout) is a process of its own on the device. Letters: P parameters of a role,
N trainer ranks, b bytes of the compute precision, T tokens of a micro-batch, V vocabulary, h hidden size, f MLP size,
q and kv widths of queries and of keys, L layers.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal, get_args

from rlctl_hw.types import DeviceKind, Dtype, Layout, MemoryPart, ModelShape, Origin, Workload

Phase = Literal["generation", "logprobs", "actor_update", "critic_update", "optimizer_step", "weight_sync"]
PHASES: tuple[Phase, ...] = get_args(Phase)
PARTS = ("weights", "gradients", "optimizer", "activations", "logits", "kv_cache", "buffers", "overhead")

GIB, MIB = 2**30, 2**20
DTYPE_BYTES: dict[Dtype, int] = {"float32": 4, "bfloat16": 2}
MASTER_BYTES, MOMENT_BYTES = 4, 8

CONTEXT_GIB = 0.9
"""CUDA context, loaded kernels and workspaces of one process; 0.5 to 1.4 GiB are seen."""
COLLECTIVES_GIB = 0.4
"""NCCL buffers of one process; 0.34 GiB at 2 ranks and 0.39 at 4 to 8 are measured."""
VLLM_WORKING_GIB = 2.0
"""vLLM beside weights and KV cache: profiled activations, CUDA graphs, context."""
VLLM_ASLEEP_GIB = 1.5
"""What vLLM keeps on the device while it sleeps: context and graphs."""
CPU_PROCESS_GIB = 0.6
"""Resident size of a worker process after importing torch, transformers and ray, and in use."""
CPU_VLLM_GIB = 1.2
"""Resident size of a vLLM process on CPU beside weights and KV cache."""
SLOTS_PER_TOKEN, SLOTS_PER_TOKEN_PADDED = 2, 4
"""Attention places per token: responses share a prompt and attention does not; off CUDA and in float32 it also pads."""
PREFILL_TOKENS = 8192
"""Prompt tokens that the Hugging Face engine computes in one pass, or one prompt if that is longer."""
RAY_GIB = 1.0
"""Ray's own processes and the driver, on the host."""


@dataclass(frozen=True)
class Need:
    """Bytes of one part, of one process or of several."""

    part: str
    bytes: float
    origin: Origin = "formula"

    def times(self, count: float) -> Need:
        """Return the need of `count` such processes."""
        return replace(self, bytes=self.bytes * count)


def memory(workload: Workload, layout: Layout) -> tuple[MemoryPart, ...]:
    """Return what the fullest device holds, phase by phase; parts that are zero are left out."""
    return tuple(
        MemoryPart(phase, part, sum(need.bytes for need in same) / GIB, _weakest(same))
        for phase in PHASES
        if phase != "critic_update" or "critic" in workload.roles
        for part in PARTS
        if (same := [need for need in _on_device(phase, workload, layout) if need.part == part and need.bytes > 0])
    )


def phase_gib(phase: Phase, workload: Workload, layout: Layout) -> float:
    """Return the sum of a phase's parts, in GiB."""
    return sum(need.bytes for need in _on_device(phase, workload, layout)) / GIB


def peak_gib(parts: Iterable[MemoryPart]) -> tuple[str, float]:
    """Return the phase that takes most, and how much, in GiB."""
    totals: dict[str, float] = {}
    for part in parts:
        totals[part.phase] = totals.get(part.phase, 0.0) + part.gib
    phase = max(totals, key=lambda name: totals[name])
    return phase, totals[phase]


def kv_bytes_per_token(shape: ModelShape, dtype: Dtype) -> int:
    """Return the bytes of one token's keys and values in all layers."""
    return 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim * DTYPE_BYTES[dtype]


def rollout_weight_bytes(workload: Workload, layout: Layout) -> int:
    """Return the bytes of one rollout engine's whole copy of the weights."""
    return workload.shape.num_params * DTYPE_BYTES[layout.rollout_dtype]


def role_params(shape: ModelShape, role: str) -> int:
    """Return P; the critic has a value head [h, 1] in place of the output projection."""
    if role != "critic":
        return shape.num_params
    return shape.num_params + shape.hidden_size - (0 if shape.tied else shape.vocab_size * shape.hidden_size)


def bucket_bytes(workload: Workload, width: int) -> float:
    """Return the size of a bucket of weights of `width` bytes each; a larger tensor is a bucket of its own."""
    bucket = min(workload.bucket_mib * MIB, workload.shape.num_params * MASTER_BYTES)
    return max(bucket, _largest_tensor(workload.shape) * width)


def trainer_needs(phase: Phase, workload: Workload, layout: Layout) -> list[Need]:
    """Return what all trainer roles of one rank hold during a phase."""
    busy = _busy_role(phase, workload)
    needs = _process_overhead(len(workload.roles), layout)
    for role in workload.roles:
        needs += _states(role, phase, role == busy, workload, layout)
    if busy is not None:
        needs += _working_set(busy, phase, workload, layout)
    return needs


def rollout_needs(phase: Phase, workload: Workload, layout: Layout) -> list[Need]:
    """Return what one rollout engine holds on one device during a phase."""
    if workload.rollout == "vllm":
        return _vllm_needs(phase, workload, layout)
    return _hf_needs(phase, workload, layout)


def vllm_least_gib(workload: Workload, layout: Layout) -> float:
    """Return the least memory with which vLLM can hold the weights and one longest sequence, in GiB."""
    kv = workload.longest_tokens * kv_bytes_per_token(workload.shape, layout.rollout_dtype)
    return (rollout_weight_bytes(workload, layout) + kv) / GIB + VLLM_WORKING_GIB


def _on_device(phase: Phase, workload: Workload, layout: Layout) -> list[Need]:
    trainer, rollout = trainer_needs(phase, workload, layout), rollout_needs(phase, workload, layout)
    if layout.device == "cpu":
        # One memory for all processes of the host, whichever cores they have.
        everyone = [need.times(layout.trainer_devices) for need in trainer]
        everyone += [need.times(layout.rollout_devices) for need in rollout]
        return [*everyone, Need("overhead", RAY_GIB * GIB, "assumed")]
    if workload.placement == "colocated":
        return trainer + rollout
    if phase == "weight_sync":
        return max(trainer, rollout, key=lambda needs: sum(need.bytes for need in needs))
    # The side at work; the other one waits with less than it holds at its own work.
    return rollout if phase == "generation" else trainer


def _weakest(needs: Iterable[Need]) -> Origin:
    return "assumed" if any(need.origin == "assumed" for need in needs) else "formula"


def _busy_role(phase: Phase, workload: Workload) -> str | None:
    """Return the trainer role that works in a phase; where several do, the one that takes most."""
    if phase == "generation":
        return None
    if phase == "critic_update":
        return "critic" if "critic" in workload.roles else None
    return "actor"


def _process_overhead(num_processes: int, layout: Layout) -> list[Need]:
    if layout.device == "cpu":
        return [Need("overhead", num_processes * CPU_PROCESS_GIB * GIB, "assumed")]
    collectives = COLLECTIVES_GIB if layout.trainer_devices > 1 else 0.0
    return [Need("overhead", num_processes * (CONTEXT_GIB + collectives) * GIB, "assumed")]


def _states(role: str, phase: Phase, busy: bool, workload: Workload, layout: Layout) -> list[Need]:
    """Return weights, gradients and moments: 4 + 4 + 8 bytes a parameter, over N ranks.

    What is offloaded leaves a device, but on CPU there is nowhere else to go.
    """
    shard = role_params(workload.shape, role) / layout.trainer_devices
    elsewhere = layout.device != "cpu"
    away_params = elsewhere and workload.offload_params and not busy
    away_moments = elsewhere and workload.offload_optimizer and not (busy and phase == "optimizer_step")
    learns = role != "reference"
    in_update = phase in ("actor_update", "critic_update", "optimizer_step")
    return [
        Need("weights", 0.0 if away_params else shard * MASTER_BYTES),
        Need("gradients", shard * MASTER_BYTES if busy and in_update else 0.0),
        Need("optimizer", shard * MOMENT_BYTES if learns and not away_moments else 0.0),
    ]


def _working_set(role: str, phase: Phase, workload: Workload, layout: Layout) -> list[Need]:
    shape = workload.shape
    if phase == "weight_sync":
        # One gathered tensor on top of the bucket that waits for it and its copy as sent.
        return [Need("buffers", _largest_tensor(shape) * MASTER_BYTES + 2 * bucket_bytes(workload, MASTER_BYTES))]
    if phase == "optimizer_step":
        # AdamW over lists of tensors makes a temporary copy of the parameters' size where it has no fused kernel.
        unfused = role_params(shape, role) / layout.trainer_devices if layout.device == "ascend" else 0.0
        return [Need("buffers", unfused * MASTER_BYTES)]
    backward = phase != "logprobs"
    sequences = workload.mini_batch_sequences if backward else workload.step_sequences
    own_tokens = -(-sequences // layout.trainer_devices) * workload.longest_tokens
    tokens = min(layout.max_tokens_per_micro_batch, own_tokens)
    return [
        Need("buffers", _gathered(role, backward, workload, layout)),
        Need(
            "activations", tokens * _activation_bytes_per_token(backward, workload, layout.device, layout.compute_dtype)
        ),
        Need("logits", 0.0 if role == "critic" else _logits_bytes(tokens, backward, workload, layout.compute_dtype)),
    ]


def _gathered(role: str, backward: bool, workload: Workload, layout: Layout) -> float:
    """Return unsharded parameters and gradients: the layer at work, the next one, embedding and head.

    One rank that computes in float32 has nothing to gather or to cast.
    """
    shape, width = workload.shape, DTYPE_BYTES[layout.compute_dtype]
    params = role_params(shape, role)
    root = _root_params(shape, role)
    layer = (params - root) / shape.num_layers
    gradients = (layer + root) * (width + MASTER_BYTES) if backward else 0.0
    if layout.trainer_devices == 1 and width == MASTER_BYTES:
        return gradients
    gathered = 2 * layer + root if workload.reshard_after_forward else params
    return gathered * width + gradients


def _root_params(shape: ModelShape, role: str) -> int:
    tables = 1 if shape.tied or role == "critic" else 2
    return tables * shape.vocab_size * shape.hidden_size + shape.hidden_size


def _activation_bytes_per_token(backward: bool, workload: Workload, device: DeviceKind, dtype: Dtype) -> float:
    """Return what autograd keeps per token, counted over the tensors of transformers' decoder layer.

    Each norm keeps an fp32 copy of its input and two results (4h + 2bh); attention keeps queries, keys, values and
    a result per slot (b(2q + 2kv)) and the result per token (bq); the gated MLP keeps four tensors of its width
    (4bf). In bfloat16 a small Qwen2 layer measured 3032 bytes where this gives 3072.
    """
    shape, width = workload.shape, DTYPE_BYTES[dtype]
    hidden, ffn = shape.hidden_size, shape.intermediate_size
    query, key_value = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    working = 4 * hidden + width * (3 * ffn + 2 * hidden)
    if not backward:
        return working + width * (hidden + 2 * query + 2 * key_value)
    dense = device == "cuda" and dtype == "bfloat16"
    slots = min(workload.group_size, SLOTS_PER_TOKEN if dense else SLOTS_PER_TOKEN_PADDED)
    attention = width * (slots * 2 * (query + key_value) + query)
    layer = 2 * (4 * hidden + 2 * width * hidden) + attention + 4 * width * ffn
    last_norm = 4 * hidden + 2 * width * hidden
    if workload.gradient_checkpointing:
        return shape.num_layers * width * hidden + layer + last_norm + working
    return shape.num_layers * layer + last_norm + working


def _logits_bytes(tokens: int, backward: bool, workload: Workload, dtype: Dtype) -> float:
    """Return one chunk's logits: as computed, in fp32, as log-softmax and, going backward, two gradients more."""
    per_logit = DTYPE_BYTES[dtype] + (5 if backward else 3) * 4
    return min(tokens, workload.logits_chunk_tokens) * workload.shape.vocab_size * per_logit


def _largest_tensor(shape: ModelShape) -> int:
    return shape.hidden_size * max(shape.vocab_size, shape.intermediate_size, shape.num_heads * shape.head_dim)


def _hf_needs(phase: Phase, workload: Workload, layout: Layout) -> list[Need]:
    """On accelerators a sleeping engine keeps its context only; on CPU it keeps weights and cache."""
    shape, width = workload.shape, DTYPE_BYTES[layout.rollout_dtype]
    on_cpu = layout.device == "cpu"
    overhead = Need("overhead", (CPU_PROCESS_GIB if on_cpu else CONTEXT_GIB) * GIB, "assumed")
    weights = Need("weights", rollout_weight_bytes(workload, layout))
    rows = layout.max_concurrent
    cache = Need("kv_cache", rows * workload.longest_tokens * kv_bytes_per_token(shape, layout.rollout_dtype))
    if phase == "generation":
        prompt_tokens = max(min(rows * workload.max_prompt_tokens, PREFILL_TOKENS), workload.max_prompt_tokens)
        return [
            weights,
            overhead,
            cache,
            # A cache that grows is copied: old and new exist at one time.
            replace(cache, part="buffers"),
            Need(
                "activations",
                prompt_tokens * _activation_bytes_per_token(False, workload, layout.device, layout.rollout_dtype),
            ),
            # Logits as computed, in fp32, as log-softmax, as probabilities, as their running sum.
            Need("logits", rows * shape.vocab_size * (width + 4 * 4)),
        ]
    held = [overhead, weights, cache] if on_cpu else [overhead]
    if phase != "weight_sync":
        return held
    return [*(held if on_cpu else [overhead, weights]), Need("buffers", 2 * bucket_bytes(workload, width))]


def _vllm_needs(phase: Phase, workload: Workload, layout: Layout) -> list[Need]:
    weights = Need("weights", rollout_weight_bytes(workload, layout))
    sync = phase == "weight_sync"
    bucket = Need("buffers", 2 * bucket_bytes(workload, DTYPE_BYTES[layout.rollout_dtype]) if sync else 0.0)
    if layout.device == "cpu":
        # Sleep does nothing on CPU.
        cache = Need("kv_cache", workload.kv_cache_gib * GIB)
        return [weights, cache, bucket, Need("overhead", CPU_VLLM_GIB * GIB, "assumed")]
    if phase == "generation" or sync:
        # It wakes as a whole: its cache is there while weights arrive.
        taken = layout.gpu_memory_share * layout.memory_gib * GIB
        cache = Need("kv_cache", max(0.0, taken - weights.bytes - VLLM_WORKING_GIB * GIB))
        return [weights, cache, bucket, Need("overhead", VLLM_WORKING_GIB * GIB, "assumed")]
    return [Need("overhead", VLLM_ASLEEP_GIB * GIB, "assumed")]
