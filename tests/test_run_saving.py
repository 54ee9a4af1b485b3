"""Where checkpoints cannot be written: a disk that fills up, and a folder that another run writes."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import ray

from rlctl_train.checkpoint.lock import sole_writer
from rlctl_train.checkpoint.manifest import damages, read_manifest
from rlctl_train.config import RunConfig
from rlctl_train.config.errors import PREFLIGHT, UserError
from rlctl_train.driver import drive
from rlctl_train.status import Status
from rlctl_train.training import StopFlag
from tests import runs

pytestmark = pytest.mark.slow


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
    files = runs.make_run(tmp_path / "run")
    config = RunConfig.model_validate(json.loads(files.config.read_text()))
    with sole_writer(files.checkpoints, "another"), pytest.raises(UserError) as caught:
        drive(files, config, Status(files, config.trainer.num_steps), StopFlag())
    assert caught.value.what.startswith(f"{files.checkpoints} is being written by run another on host")
    assert caught.value.exit_code == PREFLIGHT
    assert not files.data.exists() and not ray.is_initialized()
