"""Whole runs with dynamic sampling: groups are refilled, resume repeats them, and nothing filtered makes it GRPO."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests import runs

pytestmark = pytest.mark.long

REWARD = {"type": "custom", "path": f"{Path(__file__).with_name('digit_reward.py')}:any_digit"}
SECTIONS: dict[str, Any] = {
    "reward": REWARD,
    "algo": {"type": "dapo", "group_size": 2, "overlong_penalty": 0.1},
    "validation": {"every_steps": 0},
}


def test_a_resumed_run_draws_the_same_groups_and_learns_the_same_bit_for_bit(tmp_path: Path) -> None:
    whole = runs.make_run(tmp_path / "whole", **SECTIONS)
    assert runs.run(whole) == 0, runs.log(whole)
    lines = runs.lines(whole)
    assert max(line["sampling/rounds"] for line in lines) > 1 and sum(line["actor/grad_norm"] for line in lines) > 0
    assert all(line["sampling/kept_groups"] + line["sampling/filled_groups"] == 4 for line in lines)
    assert lines[0]["health/logprob_gap"] < 1e-4

    cut = runs.make_run(tmp_path / "cut", **SECTIONS)
    process = runs.start(cut)
    runs.wait_for_step(cut, process, 3)
    runs.kill(process.pid)
    assert process.wait(120) != 0
    assert runs.run(cut) == 0, runs.log(cut)
    assert runs.learning_trace(cut) == runs.learning_trace(whole)
    names = [name for name in lines[0] if name.startswith("sampling/")]
    assert [[line[name] for name in names] for line in runs.lines(cut)] == [[line[n] for n in names] for line in lines]


def test_with_equal_clips_and_nothing_replaced_a_run_is_grpos_bit_for_bit(tmp_path: Path) -> None:
    same = {"group_size": 4, "loss": {"type": "clip"}}
    trainer = {"num_steps": 3, "mini_batches_per_step": 2}
    traces = []
    for algo in ({"type": "grpo"}, {"type": "dapo", "max_rounds": 1, "overlong_penalty": 0}):
        files = runs.make_run(tmp_path / algo["type"], algo=algo | same, trainer=trainer, validation={"every_steps": 0})
        assert runs.run(files) == 0, runs.log(files)
        traces.append(runs.learning_trace(files))
    assert traces[0] == traces[1]
