"""Losses in mid-run: whatever dies or stands still, the same driver goes on, bit for bit as if nothing had happened.

And a run whose machine is lost goes on from what it sent elsewhere.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM

from rlctl_train.checkpoint.manifest import damages, read_manifest
from rlctl_train.checkpoint.probe import read_probe
from rlctl_train.config.layout import RunFiles
from tests import runs

pytestmark = pytest.mark.slow

SLOW = {"plan": {"rollout_max_concurrent": 1}, "rollout": {"ignore_eos": True, "max_response_tokens": 24}}
"""Responses one after another, so that generation can be met at work."""
SECTIONS = {**SLOW, "trainer": {"num_steps": 12}, "validation": {"every_steps": 0}}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> RunFiles:
    """Run one to its end that nothing happens to, keeps its best and sends everything elsewhere."""
    folder = tmp_path_factory.mktemp("whole")
    files = runs.make_run(folder / "run", **saved(folder / "remote"))
    assert runs.run(files) == 0, runs.log(files)
    return files


def saved(remote: Path) -> dict[str, Any]:
    checkpoint = {"every_steps": 2, "keep_last": 2, "keep_best": 1, "remote": f"file://{remote}"}
    return {**SECTIONS, "validation": {"every_steps": 2}, "checkpoint": checkpoint}


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


def test_every_kind_of_process_may_be_killed_and_the_run_learns_what_it_would_have_learnt(
    whole: RunFiles, tmp_path: Path
) -> None:
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
        rollout = freeze_rollout(files, process, 7, after_s=0.0)
        os.kill(worker(files, "score worker"), signal.SIGSTOP)  # the run waits for it, until its node is known as dead
        os.kill(rollout, signal.SIGCONT)
        runs.kill(raylet_of(process))
        assert process.wait(240) == 0, runs.log(files)
    finally:
        process.kill()
    assert runs.status(files)["state"] == "done" and runs.status(files)["restarts"] == 4
    assert "phase generate; made anew, the step goes on (restart 1 of 4)" in runs.log(files)
    assert "going on from step" in runs.status(files)["notice"]
    assert runs.learning_trace(files) == runs.learning_trace(whole)
    assert [line["health/restarts"] for line in runs.lines(files)][-1] == 4


def test_the_pause_and_the_time_beside_training_are_told(whole: RunFiles) -> None:
    pauses = [line for line in runs.lines(whole, "checkpoint") if "timing_s/save_checkpoint" in line]
    everywhere = [*runs.lines(whole), *runs.lines(whole, "checkpoint")]
    assert [line["step"] for line in pauses] == list(range(2, 13, 2))
    assert sum("timing_s/write_checkpoint" in line for line in everywhere) == 6
    assert runs.lines(whole)[-1]["health/remote_save_failures"] == 0


def test_every_checkpoint_is_whole_and_the_best_is_kept(whole: RunFiles) -> None:
    kept = sorted(whole.checkpoints.glob("step_*"))
    manifests = [read_manifest(folder) for folder in kept]
    measured = {line["step"]: line["val/accuracy"] for line in runs.lines(whole, "validation") if line["step"]}
    best = min(measured, key=lambda step: (-measured[step], step))
    assert {folder.name for folder in kept} == {f"step_{best:06d}", "step_000010", "step_000012"}
    for folder, manifest in zip(kept, manifests, strict=True):
        assert manifest is not None and list(damages(folder, manifest)) == []
        assert manifest["metrics"]["val/accuracy"] == measured[manifest["step"]]


def test_the_probe_is_what_the_exported_weights_say(whole: RunFiles) -> None:
    probe = read_probe(whole.hf)
    assert probe is not None and len(probe["sequences"]) == 4
    assert probe["sequences"] == (read_probe(whole.checkpoints / "step_000012") or {})["sequences"]
    model = AutoModelForCausalLM.from_pretrained(whole.hf, dtype=torch.float32)
    for sequence in probe["sequences"]:
        prompt, response = sequence["prompt_ids"], torch.tensor(sequence["response_ids"])
        logits = model(torch.tensor([prompt + sequence["response_ids"]])).logits[0, len(prompt) - 1 : -1]
        logp = (logits / probe["temperature"]).log_softmax(-1).gather(1, response[:, None])[:, 0]
        torch.testing.assert_close(logp.tolist(), sequence["logp"], rtol=1e-4, atol=1e-4)


def test_a_run_without_any_checkpoint_goes_on_from_the_remote_one(whole: RunFiles, tmp_path: Path) -> None:
    """The machine is lost after step 10: what is left is the config, and what was sent."""
    remote = tmp_path / "remote"
    shutil.copytree(whole.root.parent / "remote", remote)
    shutil.rmtree(remote / "run" / "checkpoints" / "step_000012")
    files = runs.make_run(tmp_path / "run", **saved(remote))
    assert runs.run(files) == 0, runs.log(files)
    assert "going on from step_000010, fetched from" in runs.log(files)
    assert runs.learning_trace(files) == runs.learning_trace(whole)[10:]


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
