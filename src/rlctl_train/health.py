"""Health gates: checks whose failure stops a run before it goes silently wrong."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass

from rlctl_hw.types import Plan

from rlctl_train.config import RunConfig
from rlctl_train.config.errors import DOES_NOT_FIT, UserError
from rlctl_train.config.rollout import VllmRollout
from rlctl_train.config.trainer import HealthConfig


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


class MismatchGates:
    """Judges how far rollout and trainer are apart, step by step; a warning is given once a gate."""

    def __init__(self, config: RunConfig, plan: Plan) -> None:
        self._config, self._plan = config, plan
        self._told: set[str] = set()

    def check(self, metrics: Mapping[str, float]) -> None:
        """Compare those metrics that are there with their limits; stop or warn."""
        failed = [(gate, value) for gate, value in _beyond(self._config.health, metrics) if gate.key not in self._told]
        if not failed:
            return
        self._told |= {gate.key for gate, _ in failed}
        numbers = "; ".join(
            f"{gate.what} is {value:.3g} (health.{gate.key} allows {gate.limit:g})" for gate, value in failed
        )
        what = f"rollout and trainer disagree on the probabilities of the same tokens: {numbers}"
        remedy = f"likely causes, first first: {'; '.join(likely_causes(self._config, self._plan))}"
        if self._config.health.on_mismatch == "stop":
            raise UserError(what, f"{remedy}; to go on regardless: health.on_mismatch=warn", exit_code=DOES_NOT_FIT)
        print(f"warning: {what}\n  -> {remedy}; algo.correction makes up for a part of it", file=sys.stderr)


def likely_causes(config: RunConfig, plan: Plan) -> list[str]:
    """Return what may pull rollout and trainer apart under these settings, the likeliest first, each with a way out."""
    rollout = config.rollout
    causes = []
    if plan.rollout_dtype != plan.compute_dtype:
        causes.append(
            f"precision: the rollout engine computes in {plan.rollout_dtype}, the trainer in {plan.compute_dtype} "
            "(make rollout.dtype and engine.compute_dtype equal)"
        )
    elif plan.rollout_dtype != "float32":
        causes.append(
            f"precision: both round to {plan.rollout_dtype}, each in its own order (try rollout.dtype=float32)"
        )
    if isinstance(rollout, VllmRollout) and not rollout.engine_args.get("disable_cascade_attn", False):
        causes.append("vLLM's cascade attention (rollout.engine_args.disable_cascade_attn=true)")
    if rollout.temperature != 1:
        causes.append(f"a temperature of {rollout.temperature:g} that one side leaves out (try rollout.temperature=1)")
    causes.append("stale weights: those that sampled are not those that are trained (see health.logprob_gap)")
    return causes


@dataclass(frozen=True)
class _Gate:
    key: str
    """Of its limit, under `health`."""
    limit: float | None
    metric: str
    what: str


def _beyond(config: HealthConfig, metrics: Mapping[str, float]) -> list[tuple[_Gate, float]]:
    """Return the gates whose metric is there and beyond its limit, with its value; NaN is beyond any."""
    gates = (
        _Gate("probs_diff", config.probs_diff, "training/rollout_probs_diff_mean", "their mean difference"),
        _Gate("rollout_kl", config.rollout_kl, "rollout_corr/k3_kl", "their KL in nats"),
        _Gate("chi_square", config.chi_square, "rollout_corr/chi2_token", "their chi-square divergence"),
    )
    there = [(gate, metrics[gate.metric]) for gate in gates if gate.limit is not None and gate.metric in metrics]
    return [(gate, value) for gate, value in there if not value <= (gate.limit or 0.0)]
