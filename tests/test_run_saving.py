"""Real runs and their checkpoints: what is written beside training resumes bit for bit, here and from elsewhere."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from rlctl_train.checkpoint.lock import sole_writer
from rlctl_train.checkpoint.manifest import damages, read_manifest
from rlctl_train.checkpoint.probe import read_probe
from rlctl_train.config.layout import RunFiles
from tests import runs

pytestmark = pytest.mark.slow

SECTIONS = {"trainer": {"num_steps": 6}, "validation": {"every_steps": 2}}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> RunFiles:
    """Run one to its end that keeps its best and sends everything elsewhere."""
    folder = tmp_path_factory.mktemp("whole")
    checkpoint = {"every_steps": 2, "keep_last": 2, "keep_best": 1, "remote": f"file://{folder}/remote"}
    files = runs.make_run(folder / "run", **SECTIONS, checkpoint=checkpoint)
    assert runs.run(files) == 0, runs.log(files)
    return files


def test_the_pause_and_the_time_beside_training_are_told(whole: RunFiles) -> None:
    pauses = [line for line in runs.lines(whole, "checkpoint") if "timing_s/save_checkpoint" in line]
    everywhere = [*runs.lines(whole), *runs.lines(whole, "checkpoint")]
    assert [line["step"] for line in pauses] == [2, 4, 6]
    assert sum("timing_s/write_checkpoint" in line for line in everywhere) == 3
    assert runs.lines(whole)[-1]["health/remote_save_failures"] == 0


def test_every_checkpoint_is_whole_and_the_best_is_kept(whole: RunFiles) -> None:
    kept = sorted(whole.checkpoints.glob("step_*"))
    manifests = [read_manifest(folder) for folder in kept]
    measured = {line["step"]: line["val/accuracy"] for line in runs.lines(whole, "validation") if line["step"]}
    best = min(measured, key=lambda step: (-measured[step], step))
    assert {folder.name for folder in kept} == {f"step_{best:06d}", "step_000004", "step_000006"}
    for folder, manifest in zip(kept, manifests, strict=True):
        assert manifest is not None and list(damages(folder, manifest)) == []
        assert manifest["metrics"]["val/accuracy"] == measured[manifest["step"]]


def test_the_probe_is_what_the_exported_weights_say(whole: RunFiles) -> None:
    probe = read_probe(whole.hf)
    assert probe is not None and len(probe["sequences"]) == 4
    assert probe["sequences"] == (read_probe(whole.checkpoints / "step_000006") or {})["sequences"]
    model = AutoModelForCausalLM.from_pretrained(whole.hf, dtype=torch.float32)
    for sequence in probe["sequences"]:
        prompt, response = sequence["prompt_ids"], torch.tensor(sequence["response_ids"])
        logits = model(torch.tensor([prompt + sequence["response_ids"]])).logits[0, len(prompt) - 1 : -1]
        logp = (logits / probe["temperature"]).log_softmax(-1).gather(1, response[:, None])[:, 0]
        torch.testing.assert_close(logp.tolist(), sequence["logp"], rtol=1e-4, atol=1e-4)


def test_a_run_without_any_checkpoint_goes_on_from_the_remote_one(whole: RunFiles, tmp_path: Path) -> None:
    """The machine is lost after step 4: what is left is the config, and what was sent."""
    remote = tmp_path / "remote"
    shutil.copytree(whole.root.parent / "remote", remote)
    shutil.rmtree(remote / "run" / "checkpoints" / "step_000006")
    checkpoint = {"every_steps": 2, "keep_last": 2, "keep_best": 1, "remote": f"file://{remote}"}
    files = runs.make_run(tmp_path / "run", **SECTIONS, checkpoint=checkpoint)
    assert runs.run(files) == 0, runs.log(files)
    assert "going on from step_000004, fetched from" in runs.log(files)
    assert runs.learning_trace(files) == runs.learning_trace(whole)[4:]


def test_a_disk_that_fills_up_while_a_worker_writes_ends_the_run_with_the_last_checkpoint(tmp_path: Path) -> None:
    files = runs.make_run(tmp_path / "run", trainer={"num_steps": 6}, validation={"every_steps": 0})
    disk = files.checkpoints
    disk.mkdir()
    # Room for the files of one checkpoint and a half: their number cannot be foreseen, as their size can.
    mount = ["mount", "-t", "tmpfs", "-o", "size=50m,nr_inodes=12", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a file system takes root")
    try:
        assert runs.run(files) == 1
        assert f"the disk of {disk} filled up while the checkpoint of step 4" in runs.status(files)["error"]["what"]
        assert [folder.name for folder in disk.glob("step_*")] == ["step_000002"]
        manifest = read_manifest(disk / "step_000002")
        assert manifest is not None and list(damages(disk / "step_000002", manifest)) == []
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_folder_that_another_run_writes_is_refused_before_anything_starts(tmp_path: Path) -> None:
    files = runs.make_run(tmp_path / "run", **SECTIONS)
    with sole_writer(files.checkpoints, "another"):
        assert runs.run(files) == 4
    assert runs.status(files)["error"]["what"].startswith(
        f"{files.checkpoints} is being written by run another on host"
    )
