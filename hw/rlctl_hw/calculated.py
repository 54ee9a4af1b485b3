"""Needs of a trainer role on an accelerator, asked of the memory calculator: at rest, and at work on one pass."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

from rlctl_hw.calculator import estimate
from rlctl_hw.calculator.overheads import DOUBT, communication, context
from rlctl_hw.calculator.stages import stages
from rlctl_hw.calculator.states import states
from rlctl_hw.needs import FORWARD_ONLY, GIB, Need
from rlctl_hw.setup import Estimate, Setup, Task
from rlctl_hw.types import DeviceKind, Layout, ModelShape, Workload

LEAST_TOKENS = 8


def rest_needs(role: str, workload: Workload, layout: Layout) -> dict[str, Need]:
    """Return weights, gradients and moments of a role on one rank, by part, with nothing offloaded.

    FSDP2 has gradients during an update only; Megatron's buffer for them stays.
    """
    task: Task = "logprob" if role in FORWARD_ONLY else "update"
    return dict(_states(_setup(role, task, LEAST_TOKENS * layout.mesh.cp, 1, workload, layout)))


def pass_needs(
    role: str, *, backward: bool, tokens: int, num_passes: int, workload: Workload, layout: Layout
) -> list[Need]:
    """Return everything a role's process holds at the peak of one pass over `tokens`."""
    task: Task = "update" if backward else "logprob"
    setup = _setup(role, task, tokens, num_passes, workload, layout)
    if workload.engine == "fsdp2" and layout.savings.offload_optimizer:
        setup = replace(setup, optim_offload=True, optim_offload_share=1.0)
    # One rank alone has nobody to talk to.
    return [need for need in _needs(_estimate(setup)) if layout.trainer_devices > 1 or need.part != "communication"]


def process_needs(workload: Workload, layout: Layout) -> list[Need]:
    """Return what one process of a role takes before it holds anything: context and collectives."""
    return list(_process(workload.shape, layout.device, layout.trainer_devices == 1))


def _setup(role: str, task: Task, tokens: int, num_passes: int, workload: Workload, layout: Layout) -> Setup:
    fsdp2, savings, mesh = workload.engine == "fsdp2", layout.savings, layout.mesh
    return Setup(
        shape=workload.shape_of(role),
        engine=workload.engine,
        task=task,
        mesh=mesh,
        seq_len=-(-tokens // mesh.cp) * mesh.cp,
        num_micro_batches=num_passes,
        recompute=savings.recompute,
        loss="chunked" if fsdp2 else "plain",
        logits_chunk_tokens=workload.logits_chunk_tokens,
        param_dtype="float32" if fsdp2 else "bfloat16",
        compute_dtype=layout.compute_dtype,
        base_dtype=layout.compute_dtype if workload.rank_of(role) else None,
        optim_offload=savings.host_optimizer_share > 0,
        optim_offload_share=savings.host_optimizer_share,
        lora_rank=workload.rank_of(role),
        reshard_after_forward=savings.reshard_after_forward,
        critic=role == "critic",
        device=layout.device,
        catalogue=layout.catalogue,
    )


@lru_cache(maxsize=64)
def _process(shape: ModelShape, device: DeviceKind, alone: bool) -> tuple[Need, ...]:
    setup = Setup(shape, "fsdp2", "logprob", device=device)
    terms = (context(setup),) if alone else (context(setup), communication(setup))
    return tuple(Need(t.name, t.num_bytes, t.origin, DOUBT[t.name][1]) for t in terms)


@lru_cache(maxsize=8192)
def _estimate(setup: Setup) -> Estimate:
    return estimate(setup)


@lru_cache(maxsize=8192)
def _states(setup: Setup) -> tuple[tuple[str, Need], ...]:
    """Return the states of the pipeline stage that has most."""
    kept = [states(setup, stage) for stage in stages(setup)]
    own = max(kept, key=lambda one: one.weights.num_bytes + one.gradients.num_bytes + one.optimizer.num_bytes)
    terms = (own.weights, own.gradients, own.optimizer)
    return tuple((t.name, Need(t.name, t.num_bytes, t.origin, DOUBT[t.name][1])) for t in terms if t.num_bytes)


def _needs(found: Estimate) -> list[Need]:
    return [Need(part.name, part.gib * GIB, part.origin, DOUBT[part.name][1]) for part in found.parts]
