"""A merge that is killed at any moment leaves no half-made target, and another one finishes it with equal bytes."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import shutil
from pathlib import Path

import pytest
import torch

from rlctl_train.checkpoint import safetensors_writer
from rlctl_train.checkpoint.merge import MergeOptions, MergePlan, merge, plan_merge
from rlctl_train.checkpoint.stored import Checkpoint
from rlctl_train.checkpoint.verify import verify
from rlctl_train.config.errors import UserError
from tests import dying
from tests.stored_checkpoints import in_files

MOST_LINES = 42_000
"""About as many lines as one such merge runs, in all its threads."""


def contents(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def make_plan(tmp_path: Path) -> MergePlan:
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "config.json").write_text('{"model_type": "own"}')
    tensors = in_files(tmp_path / "raw", {f"t{number}": torch.randn(40, 50) for number in range(24)}, 2)
    checkpoint = Checkpoint("rlctl", tmp_path, tensors, tmp_path / "config")
    return plan_merge(checkpoint, MergeOptions(dtype="bfloat16", shard_gb=3e-5))


def merge_and_die(plan: MergePlan, target: Path, after_lines: int, *, overwrite: bool) -> int:
    """Merge in a child process that dies; return its wait status."""

    def act() -> None:
        safetensors_writer.SYNC_BYTES = 9000  # tensors come into the journal a few at a time
        merge(plan, target, overwrite=overwrite)

    return dying.status_of(act, after_lines)


def kill_often(tmp_path: Path, times: int) -> None:
    plan, draw, whole, killed = make_plan(tmp_path), random.Random(0), tmp_path / "whole", 0
    merge(plan, whole)
    expected = contents(whole)
    for trial in range(times):
        folder = tmp_path / "trial"
        folder.mkdir()
        target, overwrite = folder / "out", trial % 3 == 0
        if overwrite:
            target.mkdir()
            (target / "old").touch()
        for _ in range(draw.randrange(1, 4)):
            status = merge_and_die(plan, target, draw.randrange(1, MOST_LINES), overwrite=overwrite)
            killed += os.WIFSIGNALED(status)
            assert not target.exists() or set(contents(target)) == {"old"} or contents(target) == expected
        whole_already = target.exists() and contents(target) == expected
        with contextlib.suppress(*[UserError] if whole_already else []):  # then it may say that the target exists
            merge(plan, target, overwrite=overwrite)
        assert contents(target) == expected and not verify(target).findings
        assert [path.name for path in folder.iterdir()] == ["out"]
        shutil.rmtree(folder)
    assert killed >= times / 2


def test_a_merge_killed_at_any_of_ten_moments_is_finished_by_the_next(tmp_path: Path) -> None:
    kill_often(tmp_path, 10)


@pytest.mark.long
def test_a_merge_killed_at_any_of_two_hundred_moments_is_finished_by_the_next(tmp_path: Path) -> None:
    kill_often(tmp_path, 200)
