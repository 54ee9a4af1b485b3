"""Losses in mid-run: whatever dies or stands still, the same driver goes on, bit for bit as if nothing had happened."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from rlctl_train.config.layout import RunFiles
from tests import runs

pytestmark = pytest.mark.slow

SLOW = {"plan": {"rollout_max_concurrent": 1}, "rollout": {"ignore_eos": True, "max_response_tokens": 24}}
"""Responses one after another, so that generation can be met at work."""
SECTIONS = {**SLOW, "trainer": {"num_steps": 12}, "validation": {"every_steps": 0}}


def worker(files: RunFiles, name: str) -> int:
    return json.loads((files.logs / "workers.json").read_text())[name]


def freeze_rollout(files: RunFiles, process: subprocess.Popen[bytes], step: int, after_s: float) -> int:
    """Stop the rollout worker `after_s` from the beginning of a generation, at `step` or later; return its process id.

    The run then waits for it.
    """
    runs.wait_for_step(files, process, step)
    pid = worker(files, "rollout worker 0")
    while True:
        assert process.poll() is None, f"the driver ended early:\n{runs.log(files)}"
        if runs.status(files)["phase"] == "generate":
            time.sleep(after_s)
            os.kill(pid, signal.SIGSTOP)
            found = runs.status(files)
            time.sleep(0.3)
            if found["phase"] == "generate" and runs.status(files) == found:
                return pid
            os.kill(pid, signal.SIGCONT)


def wait_for_restart(files: RunFiles, process: subprocess.Popen[bytes], number: int) -> None:
    while runs.status(files)["restarts"] < number:
        assert process.poll() is None, f"the driver ended early:\n{runs.log(files)}"
        time.sleep(0.05)


def raylet_of(process: subprocess.Popen[bytes]) -> int:
    return next(p.pid for p in psutil.Process(process.pid).children(recursive=True) if p.name() == "raylet")


def test_every_kind_of_process_may_be_killed_and_the_run_learns_what_it_would_have_learnt(tmp_path: Path) -> None:
    whole = runs.make_run(tmp_path / "whole", **SECTIONS)
    assert runs.run(whole) == 0, runs.log(whole)
    files = runs.make_run(tmp_path / "run", **SECTIONS, launch={"type": "local", "max_restarts": 4})
    process = runs.start(files)
    try:
        runs.kill(freeze_rollout(files, process, 2, after_s=0.05))
        wait_for_restart(files, process, 1)
        for number, (name, step) in enumerate((("actor worker 0", 4), ("score worker", 6)), start=2):
            runs.wait_for_step(files, process, step)
            runs.kill(worker(files, name))
            wait_for_restart(files, process, number)
            assert f"{name} died" in runs.status(files)["notice"]
        runs.wait_for_step(files, process, 8)
        os.kill(worker(files, "score worker"), signal.SIGSTOP)  # the run waits for it, until its node is known as dead
        runs.kill(raylet_of(process))
        assert process.wait(240) == 0, runs.log(files)
    finally:
        process.kill()
    assert runs.status(files)["state"] == "done" and runs.status(files)["restarts"] == 4
    assert "phase generate; made anew, the step goes on (restart 1 of 4)" in runs.log(files)
    assert "going on from step" in runs.status(files)["notice"]
    assert runs.learning_trace(files) == runs.learning_trace(whole)
    assert [line["health/restarts"] for line in runs.lines(files)][-1] == 4


@pytest.mark.long
def test_a_worker_that_stands_still_is_found_and_the_stacks_say_where(tmp_path: Path) -> None:
    long = {"algo": {"group_size": 8}, "trainer": {"prompts_per_step": 16}}
    limits = {"health": {"stall_after_s": 15}, "launch": {"type": "local", "max_restarts": 0}}
    files = runs.make_run(tmp_path / "run", **{**SECTIONS, **long, **limits})
    process = runs.start(files)
    try:
        freeze_rollout(files, process, 2, after_s=0.5)
        assert process.wait(240) == 1, runs.log(files)
    finally:
        process.kill()
    error = runs.status(files)["error"]["what"]
    assert "rollout worker 0 stood still" in error and "phase generate" in error and "launch.max_restarts=0" in error
    (stacks,) = files.logs.glob("stacks-*.txt")
    assert stacks.name in error
    driver, *workers = stacks.read_text().split("\n== ")[1:]
    of = {text.split(":")[0]: text for text in workers}
    assert "in sample" in driver and "rollout_engine" not in driver
    assert "rollout/hf.py" in of["rollout worker 0"] and "in generate" in of["rollout worker 0"]
    assert "rollout/hf.py" not in of["actor worker 0"] and "main_loop" in of["actor worker 0"]
