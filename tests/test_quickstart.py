"""The quickstarts, whole, by the command a stranger types: a tiny model learns sums it has never seen."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from rlctl_train.config.layout import RunFiles
from tests.plain import plain_accuracy

pytestmark = pytest.mark.long


@pytest.mark.parametrize("preset", ["quickstart", "quickstart-ppo"])
def test_the_quickstart_lifts_held_out_accuracy_from_below_a_half_to_above_nine_tenths(
    tmp_path: Path, preset: str
) -> None:
    rlctl = Path(sys.executable).with_name("rlctl")
    done = subprocess.run(
        [rlctl, "launch", preset, "--name", "first", "--yes"], cwd=tmp_path, capture_output=True, text=True, timeout=590
    )
    assert done.returncode == 0, done.stderr
    run = tmp_path / "runs" / "first"
    summary = json.loads((run / "summary.json").read_text())
    assert summary["val_accuracy_start"] < 0.5
    assert summary["val_accuracy_end"] >= 0.90
    assert summary["val_accuracy_end"] == pytest.approx(plain_accuracy(RunFiles(run)), abs=0.02)
    shown = subprocess.run([rlctl, "runs", "show", "first", "-o", "json"], cwd=tmp_path, capture_output=True, text=True)
    held = {row["phase"]: row for row in json.loads(shown.stdout)["prediction"]}
    assert {"generation", "actor_update", "optimizer_step", "weight_sync"} <= held.keys()
    for row in held.values():
        assert row["gib"] is None or row["low_gib"] < row["measured_gib"] < row["high_gib"], row
