"""A plan in sentences, and its memory as a table of phases and parts: plain data, for whoever renders it."""

from __future__ import annotations

from dataclasses import dataclass

from rlctl_hw.memory import peak_gib
from rlctl_hw.needs import PARTS, PHASES
from rlctl_hw.types import Choice, Plan

PHASE_WORDS = {
    "load": "load",
    "generation": "generation",
    "logprobs": "log-probabilities",
    "reference_logprobs": "reference log-probabilities",
    "teacher_logprobs": "teacher's log-probabilities",
    "values": "values",
    "reward_model_logprobs": "reward model's log-probabilities",
    "reward_model_update": "reward model update",
    "actor_update": "actor update",
    "critic_update": "critic update",
    "optimizer_step": "optimizer step",
    "weight_sync": "weight sync",
    "checkpoint": "checkpoint",
}


@dataclass(frozen=True)
class MemoryTable:
    """GiB on the fullest device: one row a phase, one column a part, and each row's total."""

    phases: tuple[str, ...]
    parts: tuple[str, ...]
    gib: tuple[tuple[float, ...], ...]
    totals_gib: tuple[float, ...]


def sentences(plan: Plan) -> list[str]:
    """Say what will run where, why each number is what it is, how full memory gets, and what to know besides."""
    return [_who(plan), *map(_choice, plan.choices), *_memory(plan), *plan.notes]


def memory_table(plan: Plan) -> MemoryTable:
    """Arrange the plan's memory parts; empty rows and columns are left out."""
    gib = {(part.phase, part.part): part.gib for part in plan.memory}
    phases = tuple(phase for phase in PHASES if any(key[0] == phase for key in gib))
    parts = tuple(part for part in PARTS if any(key[1] == part for key in gib))
    rows = tuple(tuple(gib.get((phase, part), 0.0) for part in parts) for phase in phases)
    return MemoryTable(phases, parts, rows, tuple(sum(row) for row in rows))


def _who(plan: Plan) -> str:
    nodes = "" if plan.num_nodes == 1 else f" on {plan.num_nodes} nodes"
    unit = "CPU worker" if plan.device == "cpu" else f"{plan.device} device"
    train = f"{_count(plan.trainer_devices, unit)} {_verb(plan.trainer_devices, 'train')} in {plan.compute_dtype}"
    generate = f"{_count(plan.rollout_devices, unit)} {_verb(plan.rollout_devices, 'generate')} in {plan.rollout_dtype}"
    return f"{train} and {generate}{nodes}."


def _count(number: int, unit: str) -> str:
    return f"{number} {unit}" if number == 1 else f"{number} {unit}s"


def _verb(number: int, verb: str) -> str:
    return f"{verb}s" if number == 1 else verb


def _choice(choice: Choice) -> str:
    return f"{choice.key} = {choice.value}: {choice.reason} ({choice.origin})."


def _memory(plan: Plan) -> list[str]:
    if not plan.memory:
        return []
    phase, peak = peak_gib(plan.memory)
    whose = "the host's" if plan.device == "cpu" else "each device's"
    share = f" of {whose} {plan.device_memory_gib:.1f} GiB" if plan.device_memory_gib else ""
    return [f"Memory is fullest during {PHASE_WORDS.get(phase, phase)}: {peak:.2f} GiB{share}."]
