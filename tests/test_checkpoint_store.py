"""The checkpoint store: whatever moment a process dies at, the last complete checkpoint is found."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
from pathlib import Path

import pytest

from rlctl_train.checkpoint.store import MANIFEST, CheckpointStore
from rlctl_train.config.errors import FAILED, UserError
from tests import dying


def save(store: CheckpointStore, step: int, text: str | None = None) -> None:
    with store.writing(step) as folder:
        (folder / "actor").mkdir()
        for name in ("state.json", "actor/shard_0", "actor/shard_1"):
            (folder / name).write_text(text or str(step))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_an_empty_or_missing_folder_has_no_checkpoint(tmp_path: Path) -> None:
    assert CheckpointStore(tmp_path / "none", 2).latest() is None
    assert CheckpointStore(tmp_path, 2).latest() is None


def test_the_newest_checkpoints_are_kept_and_older_ones_removed(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, 2)
    for step in (5, 10, 15):
        save(store, step)
    assert names(tmp_path) == ["step_000010", "step_000015"]
    assert store.latest() == tmp_path / "step_000015"


def test_checkpoints_from_before_a_restart_are_pruned_too(tmp_path: Path) -> None:
    save(CheckpointStore(tmp_path, 1), 5)
    save(CheckpointStore(tmp_path, 1), 10)
    assert names(tmp_path) == ["step_000010"]


def test_the_manifest_lists_every_file_and_what_the_caller_adds(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, 1)
    store.begin(3).joinpath("a").write_text("abc")
    manifest = json.loads((store.commit(3, {"world_size": 2}) / MANIFEST).read_text())
    assert manifest["step"] == 3 and manifest["world_size"] == 2
    assert manifest["files"]["a"]["bytes"] == 3


@pytest.mark.parametrize("harm", ["truncate", "delete", "flip", "manifest"])
def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path, harm: str) -> None:
    store = CheckpointStore(tmp_path, 3)
    save(store, 1)
    save(store, 2)
    shard = tmp_path / "step_000002" / "actor" / "shard_1"
    match harm:
        case "truncate":
            shard.write_text("")
        case "delete":
            shard.unlink()
        case "flip":
            shard.write_text("9")
        case "manifest":
            (tmp_path / "step_000002" / MANIFEST).write_text("{")
    assert store.latest() == tmp_path / "step_000001"


def test_steps_of_an_abandoned_future_are_removed(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, 2)
    for step in (1, 2, 3):
        save(store, step)
    (tmp_path / "step_000003" / "state.json").unlink()
    save(store, 2, "again")
    assert store.latest() == tmp_path / "step_000002"
    assert names(tmp_path) == ["step_000002"]
    assert (tmp_path / "step_000002" / "state.json").read_text() == "again"


def test_a_failed_save_leaves_nothing_behind(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, 1)
    save(store, 1)
    with pytest.raises(ZeroDivisionError), store.writing(2) as folder:
        (folder / "half").write_text("x")
        raise ZeroDivisionError
    assert names(tmp_path) == ["step_000001"]


def test_too_little_space_is_said_before_anything_is_written(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, 1)
    with pytest.raises(UserError, match="GiB are free") as caught:
        store.begin(1, num_bytes=10**18)
    assert caught.value.exit_code == FAILED
    assert names(tmp_path) == []


def test_a_disk_that_fills_up_is_the_users_to_mend(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, 1)
    with pytest.raises(UserError, match="filled up"), store.writing(1):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert names(tmp_path) == []


def test_the_last_good_checkpoint_survives_a_kill_at_any_moment(tmp_path: Path) -> None:
    """The saver is killed after a random number of lines, thirty times, and each time found again."""
    draw = random.Random(0)
    for trial in range(30):
        folder = tmp_path / str(trial)
        save(CheckpointStore(folder, 2), 1)
        status = _save_and_die(folder, after_lines=draw.randrange(1, 2500))
        assert os.WTERMSIG(status) == signal.SIGKILL
        latest = CheckpointStore(folder, 2).latest()
        assert latest is not None
        told = folder.with_suffix(".committed")
        committed = int(told.read_text()) if told.exists() else 1
        contents = {(latest / name).read_text() for name in ("state.json", "actor/shard_0", "actor/shard_1")}
        assert len(contents) == 1
        assert int(contents.pop()) in (committed, committed + 1)
        save(CheckpointStore(folder, 2), 50)
        assert all(not name.startswith(".") for name in names(folder))
        shutil.rmtree(folder)


def _save_and_die(folder: Path, after_lines: int) -> int:
    """Save again and again in a child process that dies; return its wait status.

    Every third save has the step of the one before, so that replacing a checkpoint is interrupted too.
    """

    def act() -> None:
        store = CheckpointStore(folder, 2)
        for number in range(2, 40):
            save(store, number - (number % 3 == 0), str(number))
            folder.with_suffix(".new").write_text(str(number))
            folder.with_suffix(".new").rename(folder.with_suffix(".committed"))

    return dying.status_of(act, after_lines)
