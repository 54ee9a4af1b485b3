"""Seconds of generation: a decode step reads the weights and every sequence's cache; the longest response rules."""

from __future__ import annotations

from math import ceil

from rlctl_hw.lengths import Lengths, lengths
from rlctl_hw.needs import DTYPE_BYTES, GIB, VLLM_WORKING_GIB
from rlctl_hw.params import active_params, expert_params
from rlctl_hw.rollout_memory import rollout_weight_bytes, sequence_cache_bytes
from rlctl_hw.speeds import Speeds
from rlctl_hw.types import Layout, ModelShape, Workload

VLLM_STEP_S = 0.003
"""Launching one decode step and sampling from it."""
HF_LAYER_STEP_S = 0.0006
"""The same for one layer in eager PyTorch."""
REDUCE_S = 20e-6
"""Latency of one all-reduce of a decode step; two a layer."""
STAGE_S = 0.001
"""Passing activations to the engine's next stage, and waiting for it."""
KEPT_CACHE_SHARE = 0.9
"""Of the KV cache, that is in use while sequences come and go."""


def generation(workload: Workload, layout: Layout, speeds: Speeds) -> tuple[float, str]:
    """Return the roofline seconds of one step's generation, and what they consist of."""
    tp = layout.rollout_tensor_parallel
    step = lengths(workload)
    stages = layout.rollout_pipeline_parallel
    own = max(1, ceil(step.num * tp * stages / layout.rollout_devices))
    rows = max(1.0, min(own, layout.max_concurrent, _room(step, workload, layout)))
    num_steps = own * step.mean / rows + (step.longest - step.mean)
    busy = own * step.mean / num_steps
    weights = _weights_read(workload, layout, busy) / speeds.bandwidth
    cache = sequence_cache_bytes(step.prompt + step.mean, workload, layout) * busy / speeds.bandwidth
    compute = busy * 2 * active_params(workload.shape) / (tp * stages) / speeds.matmul_flops
    # Every stage works on a share of the sequences at a time, and reads its weights for each share.
    step_s = max(stages * weights + cache, compute) + _overhead_s(workload, layout, speeds, busy)
    prompts = own / workload.group_size if workload.rollout == "vllm" else own
    prefill = prompts * step.prompt * 2 * active_params(workload.shape) / (tp * stages) / speeds.matmul_flops
    wake = rollout_weight_bytes(workload, layout) / speeds.host_bus if workload.placement == "colocated" else 0.0
    why = f"{num_steps:.0f} decode steps of {1000 * step_s:.1f} ms, {busy:.0f} of {own} sequences an engine at one time"
    return num_steps * step_s + prefill + wake, why


def _room(step: Lengths, workload: Workload, layout: Layout) -> float:
    """Return the sequences whose cache one engine holds at one time."""
    if workload.rollout != "vllm":
        return layout.max_concurrent
    taken = layout.gpu_memory_share * layout.memory_gib * GIB
    cache = taken - rollout_weight_bytes(workload, layout) - VLLM_WORKING_GIB * GIB
    return KEPT_CACHE_SHARE * cache / sequence_cache_bytes(step.prompt + step.mean, workload, layout)


def _weights_read(workload: Workload, layout: Layout, busy: float) -> float:
    """Return the bytes of weights that one decode step reads on a device: of experts, those that a token chose."""
    shape, width = workload.shape, DTYPE_BYTES[layout.rollout_dtype]
    experts = shape.experts
    whole = shape.num_params - (0 if shape.tied else shape.vocab_size * shape.hidden_size)
    if experts is not None:
        chosen = 1 - (1 - experts.experts_per_token / experts.num_experts) ** busy
        whole -= (1 - chosen) * experts.num_layers * expert_params(shape)
    return whole * width / (layout.rollout_tensor_parallel * layout.rollout_pipeline_parallel)


def _overhead_s(workload: Workload, layout: Layout, speeds: Speeds, busy: float) -> float:
    shape, tp = workload.shape, layout.rollout_tensor_parallel
    launch = (layout.rollout_pipeline_parallel - 1) * STAGE_S
    launch += VLLM_STEP_S if workload.rollout == "vllm" else HF_LAYER_STEP_S * shape.num_layers
    if tp == 1:
        return launch
    link = speeds.pair_link if tp == 2 else speeds.island_link
    return launch + 2 * shape.num_layers * (REDUCE_S + _reduced_bytes(shape, busy, layout) * 2 * (tp - 1) / tp / link)


def _reduced_bytes(shape: ModelShape, busy: float, layout: Layout) -> float:
    return busy * shape.hidden_size * DTYPE_BYTES[layout.rollout_dtype]
