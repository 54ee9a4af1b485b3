"""Interruptions: whatever ends a run, resume goes on from the last save, bit for bit as if nothing had happened."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from tests import runs

pytestmark = pytest.mark.long

SECTIONS = {
    "trainer": {"num_steps": 14},
    "validation": {"every_steps": 0},
    "launch": {"type": "local", "max_restarts": 0},
}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[float, ...]]:
    files = runs.make_run(tmp_path_factory.mktemp("whole") / "run", **SECTIONS)
    assert runs.run(files) == 0, runs.log(files)
    assert all(line["actor/grad_norm"] > 0 for line in runs.lines(files)), "nothing is learnt: nothing is compared"
    return runs.learning_trace(files)


def test_killed_driver_trainer_and_rollout_each_cost_no_more_than_the_last_save(
    tmp_path: Path, uninterrupted: list[tuple[float, ...]]
) -> None:
    files = runs.make_run(tmp_path / "run", **SECTIONS)
    for step, victim in ((3, "driver"), (6, "actor worker 0"), (9, "rollout worker 0")):
        process = runs.start(files)
        runs.wait_for_step(files, process, step)
        workers = json.loads((files.logs / "workers.json").read_text())
        runs.kill(process.pid if victim == "driver" else workers[victim])
        assert process.wait(120) != 0
        if victim != "driver":
            assert runs.status(files)["state"] == "failed"
            assert "died" in runs.status(files)["error"]["what"]
    assert runs.run(files) == 0, runs.log(files)
    assert runs.learning_trace(files) == uninterrupted


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_signal_saves_and_leaves_and_resume_repeats_nothing(
    tmp_path: Path, uninterrupted: list[tuple[float, ...]], number: signal.Signals
) -> None:
    files = runs.make_run(tmp_path / "run", **SECTIONS)
    process = runs.start(files)
    runs.wait_for_step(files, process, 5)
    process.send_signal(number)
    assert process.wait(120) == 130, runs.log(files)
    assert runs.status(files)["state"] == "stopped"
    stopped_at = runs.status(files)["step"]
    assert (files.checkpoints / f"step_{stopped_at:06d}").is_dir()
    if number == signal.SIGTERM:
        assert runs.run(files) == 0, runs.log(files)
        assert runs.learning_trace(files) == uninterrupted
