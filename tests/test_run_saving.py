"""Where checkpoints cannot be written: a disk that fills up, and a folder that another run writes."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from rlctl_train.checkpoint.lock import sole_writer
from rlctl_train.checkpoint.manifest import damages, read_manifest
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
    with sole_writer(files.checkpoints, "another"):
        assert runs.run(files) == 4
    assert runs.status(files)["error"]["what"].startswith(
        f"{files.checkpoints} is being written by run another on host"
    )
