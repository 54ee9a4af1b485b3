"""Legal layouts: how a model may be split over trainer ranks and over a rollout engine, and what saves memory.

Tensor parallelism stays inside an island of fast links; pipeline stages may lie on different nodes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce
from itertools import product
from math import gcd

from rlctl_hw.calculator import check
from rlctl_hw.params import expert_params
from rlctl_hw.setup import IllegalLayout, Setup, Task
from rlctl_hw.types import (
    DoesNotFit,
    EngineName,
    Hardware,
    Mesh,
    ModelShape,
    Pins,
    Recompute,
    Savings,
    Workload,
)

POWERS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
LONG_TOKENS = 8192
"""Sequences up to here are not worth splitting: attention over them is a small share of the work."""
MOST_STAGES = 16
ROLLOUT_BYTES = 2
"""The least that a parameter takes in a rollout engine."""


@dataclass(frozen=True)
class RolloutSplit:
    """How one rollout engine splits the model: over the devices of an island, and over islands."""

    tensor: int = 1
    pipeline: int = 1

    @property
    def num_devices(self) -> int:
        """Return the devices of one engine."""
        return self.tensor * self.pipeline


@dataclass(frozen=True)
class Candidate:
    """One way to run: how many devices on either side, how the trainer splits the model, what it saves."""

    trainer_devices: int
    rollout_devices: int
    mesh: Mesh
    savings: Savings
    rollout: RolloutSplit


def island_size(hardware: Hardware) -> int:
    """Return the devices within which tensor parallelism may stay: an island, or a node where none is known."""
    if not hardware.islands:
        return 1 if hardware.kind == "cpu" else len(hardware.devices)
    alone = len(hardware.devices) > sum(map(len, hardware.islands))
    return 1 if alone else reduce(gcd, map(len, hardware.islands))


def problem(shape: ModelShape, engine: EngineName, task: Task, mesh: Mesh) -> str | None:
    """Say why a model cannot be split this way, or None where it can."""
    try:
        check(Setup(shape, engine, task, mesh, seq_len=LONG_TOKENS))
    except IllegalLayout as illegal:
        return str(illegal)
    return None


def rollout_splits(workload: Workload, hardware: Hardware, rollout_devices: int) -> list[RolloutSplit]:
    """Return how one rollout engine may split the model, the least split first.

    An engine of several islands is planned for beside Megatron only, for models that no island holds.
    """
    splits = [RolloutSplit(degree) for degree in _rollout_degrees(workload, hardware, rollout_devices)]
    if workload.engine == "megatron" and workload.rollout == "vllm":
        whole = splits[-1].tensor
        stages = [p for p in POWERS[1:] if p <= MOST_STAGES and rollout_devices % (whole * p) == 0]
        splits += [RolloutSplit(whole, p) for p in stages if p <= workload.shape.num_layers]
    # Where no split could hold the weights, the last one says by how much.
    memory = min(device.memory_gib for device in hardware.devices) * 2**30
    holding = [s for s in splits if ROLLOUT_BYTES * workload.shape.num_params / s.num_devices < memory]
    return (splits if hardware.kind == "cpu" else holding) or splits[-1:]


def _rollout_degrees(workload: Workload, hardware: Hardware, rollout_devices: int) -> list[int]:
    """Return the tensor-parallel degrees of one rollout engine; a pin is the only one, or is refused."""
    pin, key = workload.pins.rollout_tensor_parallel, "rollout.tensor_parallel"
    if workload.rollout != "vllm":
        if pin not in (None, 1):
            raise DoesNotFit(
                f"{key}={pin} cannot be: rollout.type={workload.rollout} splits nothing", (f"unset {key}",)
            )
        return [1]
    if pin is None:
        most = min(island_size(hardware), rollout_devices)
        return [d for d in POWERS if d <= most and rollout_devices % d == 0 and not _rollout_problem(workload, d)]
    why = _rollout_problem(workload, pin)
    if rollout_devices % pin:
        why = f"it does not divide the {rollout_devices} devices that generate"
    elif hardware.kind != "cpu" and pin > island_size(hardware):
        why = f"only {island_size(hardware)} devices are joined by fast links"
    if why is not None:
        raise DoesNotFit(f"{key}={pin} cannot be: {why}", (f"unset {key}",))
    return [pin]


def train_meshes(workload: Workload, hardware: Hardware, trainer_devices: int) -> list[Mesh]:
    """Return the legal meshes of so many trainer ranks whose states may fit, the least split ones first."""
    if workload.engine == "fsdp2":
        return [Mesh(dp_shard=trainer_devices)]
    legal = [mesh for mesh in _megatron_meshes(workload, hardware, trainer_devices) if _feeds(workload, mesh)]
    memory = min(device.memory_gib for device in hardware.devices) * 2**30
    # Where no states fit, the most split mesh says by how much.
    meshes = [mesh for mesh in legal if least_bytes(workload, mesh) < memory] or sorted(
        legal, key=lambda mesh: least_bytes(workload, mesh)
    )[:1]
    if not meshes:
        raise DoesNotFit(
            f"no split of {trainer_devices} ranks is legal for this model within {_pinned_words(workload.pins)}",
            tuple(f"unset engine.{name}" for name in _pinned(workload.pins)) or ("set trainer.num_devices lower",),
        )
    return sorted(meshes, key=lambda mesh: (mesh.uneven_stages, mesh.tp * mesh.pp * mesh.cp, mesh.pp, mesh.cp, mesh.ep))


def savings_ladder(workload: Workload, hardware: Hardware) -> list[Savings]:
    """Return what may be saved, from nothing to everything; pins leave only their own rungs."""
    pins = workload.pins
    recompute: tuple[Recompute, ...] = ("none", "full") if workload.engine == "fsdp2" else ("none", "selective", "full")
    # Host memory is the device's own on CPU: moving there saves nothing.
    moves = ((False, False),) if hardware.kind == "cpu" else ((False, False), (True, False), (True, True))
    recomputes = recompute if pins.recompute is None else (pins.recompute,)
    rungs = [
        Savings(
            recompute=level,
            offload_optimizer=optimizer if pins.offload_optimizer is None else pins.offload_optimizer,
            offload_params=params if pins.offload_params is None else pins.offload_params,
            reshard_after_forward=True if pins.reshard_after_forward is None else pins.reshard_after_forward,
            host_optimizer_share=pins.host_optimizer_share or 0.0,
        )
        for (optimizer, params), level in product(moves, recomputes)
    ]
    if workload.engine == "megatron" and pins.host_optimizer_share is None and hardware.kind != "cpu":
        last = rungs[-1]
        rungs.append(
            Savings(last.recompute, last.offload_params, last.offload_optimizer, last.reshard_after_forward, 1.0)
        )
    return list(dict.fromkeys(rungs))


def _megatron_meshes(workload: Workload, hardware: Hardware, world: int) -> Iterator[Mesh]:
    shape, pins = workload.shape, workload.pins
    most_tp = min(island_size(hardware), world)
    tps = _degrees(pins.tensor_parallel, [d for d in POWERS if d <= most_tp])
    pps = _degrees(pins.pipeline_parallel, [d for d in POWERS if d <= min(MOST_STAGES, shape.num_layers)])
    long = 1 if workload.longest_tokens <= LONG_TOKENS else min(8, workload.longest_tokens // LONG_TOKENS)
    cps = _degrees(pins.context_parallel, [d for d in POWERS if d <= long])
    num_experts = shape.experts.num_experts if shape.experts else 1
    eps = _degrees(pins.expert_parallel, [d for d in POWERS if num_experts % d == 0])
    for tp, pp, cp, ep in product(tps, pps, cps, eps):
        if world % (tp * pp * cp) or tp > most_tp:
            continue
        sequence = (tp > 1) if pins.sequence_parallel is None else pins.sequence_parallel
        mesh = Mesh(
            dp_shard=world // (tp * pp * cp), tp=tp, pp=pp, cp=cp, ep=ep,
            sequence_parallel=sequence, uneven_stages=shape.num_layers % pp != 0,
        )  # fmt: skip
        if problem(shape, "megatron", "update", mesh) is None:
            yield mesh


def _feeds(workload: Workload, mesh: Mesh) -> bool:
    """Say whether every data-parallel rank gets at least one sequence of a mini-batch."""
    return mesh.dp_shard <= workload.mini_batch_sequences


def least_bytes(workload: Workload, mesh: Mesh) -> float:
    """Return a lower bound of a rank's states under Megatron: bfloat16 weights, fp32 gradients, sharded masters."""
    shape = workload.shape
    sparse = shape.experts.num_layers * expert_params(shape) if shape.experts else 0
    held = (shape.num_params - sparse) / (mesh.tp * mesh.pp) + sparse / (mesh.ep * mesh.pp)
    return held * 6 + shape.num_params * 4 / mesh.world_size


def _degrees(pin: int | None, choices: list[int]) -> list[int]:
    return choices if pin is None else [pin]


def _rollout_problem(workload: Workload, degree: int) -> str | None:
    return problem(workload.shape, workload.engine, "rollout", Mesh(tp=degree))


def _pinned(pins: Pins) -> list[str]:
    names = ("tensor_parallel", "pipeline_parallel", "context_parallel", "expert_parallel")
    return [name for name in names if getattr(pins, name) is not None]


def _pinned_words(pins: Pins) -> str:
    names = _pinned(pins)
    return ", ".join(f"engine.{name}={getattr(pins, name)}" for name in names) or "its islands and heads"
