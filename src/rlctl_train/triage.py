"""What can be said of a run that ran out of memory: where, and what the planner expected there."""

from __future__ import annotations

from ray.exceptions import RayTaskError
from rlctl_hw.types import Plan

from rlctl_train import out_of_memory
from rlctl_train.config.errors import FAILED, UserError, first_line
from rlctl_train.status import Status

PHASES = {
    "generate": ("generation",),
    "logprobs": ("logprobs", "reference_logprobs", "teacher_logprobs", "reward_model_logprobs"),
    "values": ("values",),
    "update": ("actor_update", "critic_update", "reward_model_update", "optimizer_step"),
    "sync": ("weight_sync",),
    "checkpoint": ("checkpoint",),
}
"""Phases of a step, as the status names them, and the planner's."""


def ran_out(error: BaseException) -> bool:
    """Return whether an error, or what caused it in a worker, says that memory was not enough."""
    return out_of_memory.ran_out(_cause(error))


def triage(error: BaseException, status: Status, plan: Plan) -> UserError:
    """Return what a person can act on: phase, the largest part that was expected in it, and how to ask for less."""
    cause = _cause(error)
    bands = [band for band in plan.bands if band.phase in PHASES.get(status.phase, ())]
    expected = ""
    if bands:
        band = max(bands, key=lambda one: one.high_gib)
        parts = [part for part in plan.memory if part.phase == band.phase]
        largest = max(parts, key=lambda part: part.gib, default=None)
        most = "" if largest is None else f", most of it {largest.part} ({largest.gib:.2f} GiB)"
        expected = (
            f"; the planner expected {band.gib:.2f} GiB in {band.phase} (at most {band.high_gib:.2f}) of "
            f"{plan.device_memory_gib:.2f}{most}"
        )
    account = out_of_memory.account(cause)
    held = "" if account is None else f"; the worker held {account}"
    return UserError(
        f"out of memory in {status.place}: {first_line(cause)}{held}{expected}",
        "`rlctl runs show` names settings that need less; `rlctl plan --fix` and `rlctl calibrate` correct the plan",
        exit_code=FAILED,
    )


def _cause(error: BaseException) -> BaseException:
    return error.cause if isinstance(error, RayTaskError) else error
