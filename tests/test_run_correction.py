"""Whole runs with rollout correction: what it measures, and that equal policies make it change nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests import runs

pytestmark = pytest.mark.long

TRAINER = {"num_steps": 3, "mini_batches_per_step": 2}
TIS = {"weights": {"level": "token"}, "rejections": [{"type": "k3", "level": "geometric"}], "veto": 1e-4}


def test_weights_of_equal_policies_change_nothing_but_rounding(tmp_path: Path) -> None:
    traces = []
    for name, correction in (("plain", None), ("corrected", TIS)):
        algo: dict[str, Any] = {"type": "grpo", "group_size": 4, "correction": correction}
        files = runs.make_run(
            tmp_path / name, plan={"trainer_devices": 2, "rollout_devices": 2}, algo=algo, trainer=TRAINER
        )
        assert runs.run(files) == 0, runs.log(files)
        traces.append(runs.learning_trace(files))
        for line in runs.lines(files):
            assert line["rollout_corr/rollout_is_mean"] == pytest.approx(1, abs=1e-4)
            assert abs(line["rollout_corr/k3_kl"]) < 1e-6 and line["training/rollout_probs_diff_mean"] < 1e-4
            assert line.get("rollout_corr/rollout_rs_masked_fraction", 0) == 0
        assert "warning: rollout and trainer" not in runs.log(files)
    for plain, weighed in zip(*traces, strict=True):
        assert weighed == pytest.approx(plain, rel=2e-3, abs=1e-5)


def test_a_bypass_asks_for_log_probabilities_in_the_first_step_alone(tmp_path: Path) -> None:
    algo = {
        "type": "grpo",
        "group_size": 4,
        "loss": {"type": "gpg"},
        "correction": {
            "mode": "bypass",
            "weights": {"level": "sequence"},
            "rejections": [{"type": "k2", "upper": 0.5}],
        },
    }
    files = runs.make_run(tmp_path / "run", algo=algo, trainer=TRAINER)
    assert runs.run(files) == 0, runs.log(files)
    assert ["timing_s/old_log_prob" in line for line in runs.lines(files)] == [True, False, False]
    for line in runs.lines(files):
        assert 0.5 < line["rollout_corr/rollout_is_mean"] < 1.5 and line["rollout_corr/rollout_rs_masked_fraction"] < 1
