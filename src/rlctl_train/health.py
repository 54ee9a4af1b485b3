"""Health gates: checks whose failure stops a run before it goes silently wrong."""

from __future__ import annotations

import sys

from rlctl_hw.types import Plan

from rlctl_train.config import RunConfig
from rlctl_train.config.errors import DOES_NOT_FIT, UserError


def logprob_gap_limit(config: RunConfig, plan: Plan) -> float:
    """Return the largest tolerated log-probability gap, in nats: the user's, else by precision."""
    if config.health.logprob_gap is not None:
        return config.health.logprob_gap
    return 1e-4 if {plan.compute_dtype, plan.rollout_dtype} == {"float32"} else 0.2


def check_logprob_gap(config: RunConfig, plan: Plan, metrics: dict[str, float]) -> None:
    """Compare the first step's gap between rollout and trainer with its limit; stop or warn."""
    gap, limit = metrics["health/logprob_gap"], logprob_gap_limit(config, plan)
    if gap <= limit:
        return
    what = (
        f"rollout and trainer disagree on the log-probabilities of the same tokens by {gap:.3g} nats "
        f"(health.logprob_gap allows {limit:g})"
    )
    remedy = (
        f"likely causes: different precision (rollout {plan.rollout_dtype}, trainer {plan.compute_dtype}), weights "
        "that did not reach the rollout engine, or other rotary settings; to go on regardless: health.on_failure=warn"
    )
    if config.health.on_failure == "stop":
        raise UserError(what, remedy, exit_code=DOES_NOT_FIT)
    print(f"warning: {what}\n  -> {remedy}", file=sys.stderr)
