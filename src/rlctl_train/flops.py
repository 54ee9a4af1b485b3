"""The model's own operations in each phase, and the rate at which devices do them: MFU where their peak is known.

Two operations a parameter and token, 2 s^2 a of causal attention a layer and pass; a backward pass is two forward ones,
and what is computed again to save memory is none (PaLM, arXiv 2204.02311, appendix B). Sequences that answer the same
prompt share its pass.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from rlctl_hw.types import Plan

UPDATE, FROZEN_UPDATE = 3, 2
"""Forward passes that an update is worth; where the weights are frozen, no gradients of them are computed."""


class Flops:
    """Counts the operations of each timed phase of a step."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._of = {one.role: one for one in plan.pass_flops}
        self._counted: dict[str, float] = {}

    def count(self, timing: str, role: str, lengths: np.ndarray, group_size: int, passes: int = 1) -> None:
        """Count passes of a role over sequences of `lengths` [S, 2] (prompt, response), groups of which share a prompt.

        A role that no device holds by itself is the actor's other face.
        """
        if not self._of:
            return
        flops = self._of.get(role) or self._of["actor"]
        tokens, squares = lengths[:, 1].sum() + lengths[::group_size, 0].sum(), np.square(lengths.sum(1)).sum()
        self._counted[timing] = self._counted.get(timing, 0.0) + passes * flops.of(float(tokens), float(squares))

    def take(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Return the rates of the phases counted since the last call, by their seconds in `metrics`."""
        made: dict[str, float] = {}
        for timing, flops in self._counted.items():
            devices = self._plan.rollout_devices if timing == "gen" else self._plan.trainer_devices
            seconds = metrics.get(f"timing_s/{timing}")
            if not seconds:
                continue
            made[f"perf/tflops/{timing}"] = rate = flops / seconds / devices / 1e12
            if self._plan.peak_tflops is not None:
                made[f"perf/mfu/{timing}"] = rate / self._plan.peak_tflops
        self._counted = {}
        return made
