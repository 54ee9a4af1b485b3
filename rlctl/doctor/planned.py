"""The plan itself as a finding: a run that does not fit is told like every other reason."""

from __future__ import annotations

from rlctl.doctor.case import Case
from rlctl.doctor.finding import Finding, fail, skip, verdict


def check(case: Case) -> Finding:
    """Say whether the planner found a way to run."""
    if case.config is None:
        return skip("plan", "no run is given")
    problems = [] if case.refusal is None else [fail(case.refusal.what, case.refusal.remedy)]
    plan = case.plan
    fine = (
        ""
        if plan is None
        else f"{plan.trainer_devices} trainer and {plan.rollout_devices} rollout {plan.device} device(s)"
    )
    return verdict("plan", problems, fine)
