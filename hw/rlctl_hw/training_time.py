"""Seconds of a trainer's passes over a step's batch: matrix products, attention, and what ranks send each other."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from rlctl_hw.needs import DTYPE_BYTES, MASTER_BYTES
from rlctl_hw.params import active_params, embedding_params, expert_params
from rlctl_hw.speeds import Speeds
from rlctl_hw.training_memory import role_params, trained_params
from rlctl_hw.types import Hardware, Layout, ModelShape, PassFlops, Workload

DENSE_SHARE = 0.5
"""Of what large matrix products reach, that a whole pass of a dense model does: norms, attention, loss, gaps. With
0.8 for the products that is a model-FLOPs utilisation of 0.4, as well-tuned trainers publish."""
EXPERT_SHARE = 0.35
"""The same with grouped expert products and routing: 216 to 334 TFLOP/s are published for H100, of 989."""
PLAIN_EXPERTS_SHARE = 0.15
"""The same in transformers: grouped products, routing and copies in plain PyTorch. Nobody published a figure; loops
over experts, as older versions had, reach 0.02."""
RECOMPUTE_COST = {"none": 0.0, "selective": 0.05, "full": 1.0}
"""Forward passes done again in the backward pass; attention's own is a twentieth of a layer at usual lengths."""


@dataclass(frozen=True)
class Work:
    """What one epoch passes over, of all ranks together: tokens, and the sum of squared sequence lengths."""

    tokens: float
    squares: float


def training_seconds(
    work: Work, role: str, backward: bool, workload: Workload, hardware: Hardware, layout: Layout, speeds: Speeds
) -> tuple[float, str]:
    """Return the roofline seconds of one epoch of passes of a role, and the reason that rules them."""
    mesh, shape = layout.mesh, workload.shape_of(role)
    flops = pass_flops(shape, role).of(work.tokens, work.squares)
    passes = _passes(backward, workload, layout)
    compute = passes * flops / layout.trainer_devices / (speeds.matmul_flops * _share(workload))
    per_rank = work.tokens / (mesh.dp_shard * mesh.dp_replicate)
    updates = workload.mini_batches if backward else 1
    num_passes = updates * max(1, ceil(per_rank / updates / layout.max_tokens_per_micro_batch))
    if workload.engine == "megatron":
        gather = updates * _reduce_s(workload, hardware, layout, speeds) if backward and not workload.lora_rank else 0.0
    else:
        gather = num_passes * _gather_s(role, backward, workload, hardware, layout, speeds)
    # Pipeline stages idle while the first pass fills them and the last one drains them.
    bubble = compute * (mesh.pp - 1) * updates / num_passes
    inside = _split_s(per_rank, passes, workload, hardware, layout, speeds)
    why = "computing" if compute >= gather else "moving weights and gradients between ranks"
    if bubble + inside > max(compute, gather):
        why = "pipeline gaps" if bubble > inside else "traffic between split layers"
    return max(compute, gather) + bubble + inside, f"{num_passes} passes a rank, {why} rules"


def pass_flops(shape: ModelShape, role: str) -> PassFlops:
    """Return the operations of a role's forward pass: two a parameter and token, and causal attention's 2 s^2 a per
    layer, with a the heads' width. The look-up of the input embedding is none."""
    attention = 2 * shape.num_heads * shape.head_dim * shape.num_layers
    return PassFlops(role, 2 * _matrix_params(shape, role), attention)


def _passes(backward: bool, workload: Workload, layout: Layout) -> float:
    """Return the work in forward passes: a backward one is two, or one where the weights are frozen."""
    if not backward:
        return 1.0
    return (2.0 if workload.lora_rank else 3.0) + RECOMPUTE_COST[layout.savings.recompute]


def _share(workload: Workload) -> float:
    if workload.shape.experts is None:
        return DENSE_SHARE
    return PLAIN_EXPERTS_SHARE if workload.engine == "fsdp2" else EXPERT_SHARE


def _matrix_params(shape: ModelShape, role: str) -> float:
    """Return the parameters that multiply each token: all that it passes through but the input embedding."""
    active = active_params(shape) - (0 if shape.tied else embedding_params(shape))
    return active if role != "critic" else active - shape.vocab_size * shape.hidden_size


def _gather_s(
    role: str, backward: bool, workload: Workload, hardware: Hardware, layout: Layout, speeds: Speeds
) -> float:
    """Return the seconds that one pass of FSDP sends: weights twice and gradients once, over the slowest link."""
    mesh = layout.mesh
    if mesh.dp_shard == 1:
        return 0.0
    width = DTYPE_BYTES[layout.compute_dtype]
    times = 2 if backward and layout.savings.reshard_after_forward else 1
    sent = times * role_params(workload.shape_of(role), role) * width
    sent += trained_params(workload, role) * MASTER_BYTES if backward else 0
    return sent * (mesh.dp_shard - 1) / mesh.dp_shard / _slowest(layout, hardware, speeds)


def _reduce_s(workload: Workload, hardware: Hardware, layout: Layout, speeds: Speeds) -> float:
    """Return the seconds of Megatron's traffic between data-parallel ranks for one optimizer step.

    Gradients go in float32, weights come back in bfloat16; experts have fewer copies, as many as `ep` leaves.
    """
    mesh, shape = layout.mesh, workload.shape
    sparse = shape.experts.num_layers * expert_params(shape) if shape.experts else 0
    held = (shape.num_params - sparse) / (mesh.tp * mesh.pp) + sparse / (mesh.ep * mesh.pp)
    sent = held * (MASTER_BYTES + DTYPE_BYTES[layout.compute_dtype]) * (mesh.dp_shard - 1) / mesh.dp_shard
    return sent / _slowest(layout, hardware, speeds, together=mesh.tp * mesh.cp)


def _split_s(
    tokens: float, passes: float, workload: Workload, hardware: Hardware, layout: Layout, speeds: Speeds
) -> float:
    """Return the seconds that tensor and expert parallelism send: activations of every token and layer."""
    mesh, shape = layout.mesh, workload.shape
    row = shape.hidden_size * DTYPE_BYTES[layout.compute_dtype]
    layers, own = shape.num_layers / mesh.pp, tokens / mesh.cp
    link = speeds.pair_link if mesh.tp == 2 else speeds.island_link
    # Two all-reduces a layer and forward pass, each of which sends its rows twice; experts send out and back.
    seconds = passes * layers * own * row * 2 * 2 * (mesh.tp - 1) / mesh.tp / link
    if shape.experts is not None and mesh.ep > 1:
        sparse = shape.experts.num_layers / mesh.pp
        across = mesh.ep * mesh.etp > len(hardware.devices)
        rate = speeds.node_link if across else speeds.island_link
        # A token travels once to each node that has experts it chose.
        num_nodes = ceil(mesh.ep * mesh.etp / len(hardware.devices))
        chosen = shape.experts.experts_per_token
        copies = num_nodes * (1 - (1 - 1 / num_nodes) ** chosen) if across else chosen
        routed = own / mesh.tp * row * copies
        seconds += passes * sparse * 2 * routed * (mesh.ep - 1) / mesh.ep / rate
    return seconds


def _slowest(layout: Layout, hardware: Hardware, speeds: Speeds, together: int = 1) -> float:
    """Return the rate of a ring over all data-parallel ranks, `together` of whose neighbours belong to other rings.

    Between nodes a ring is cut into as many as it has ranks in a node, each with a port of its own.
    """
    per_node = len(hardware.devices)
    if layout.trainer_devices > per_node:
        return min(speeds.island_link, speeds.node_link * max(1, per_node // together))
    return speeds.pair_link if layout.trainer_devices == 2 else speeds.island_link
