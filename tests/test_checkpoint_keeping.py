"""Which checkpoints stay: the last, the best, what is in use; who may write; whether there is room."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest

from rlctl_train.checkpoint.lock import NOTE, sole_writer
from rlctl_train.checkpoint.manifest import Best, damages, is_complete, read_manifest
from rlctl_train.checkpoint.store import CheckpointStore
from rlctl_train.config.errors import FAILED, PREFLIGHT, UserError


def save(folder: Path, step: int, value: float | None, *, keep: int = 1, best: int = 1, mode: str = "max") -> None:
    assert mode in ("max", "min")
    wanted: Literal["max", "min"] = "max" if mode == "max" else "min"
    store = CheckpointStore(folder, keep, Best(best, "val/accuracy", wanted))
    metrics = {} if value is None else {"val/accuracy": value}
    with store.writing(step, {"metrics": metrics}) as aside:
        (aside / "weights").write_text(str(step))


def steps(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step_")) for path in folder.glob("step_*"))


@pytest.mark.parametrize(("mode", "kept"), [("max", [2, 5]), ("min", [3, 5])])
def test_the_best_stays_beside_the_last_across_restarts(tmp_path: Path, mode: str, kept: list[int]) -> None:
    for step, value in enumerate((0.2, 0.9, 0.1, 0.5, 0.5), 1):  # each with a store of its own, as after a restart
        save(tmp_path, step, value, mode=mode)
    assert steps(tmp_path) == kept


def test_of_equal_values_the_earlier_counts_where_the_metric_was_measured(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step, 0.7)
    assert steps(tmp_path) == [1, 3]


def test_a_checkpoint_without_the_metric_is_never_the_best(tmp_path: Path) -> None:
    for step, value in ((1, None), (2, 0.1), (3, None)):
        save(tmp_path, step, value)
    assert steps(tmp_path) == [2, 3]


def test_several_best_and_several_last_are_kept(tmp_path: Path) -> None:
    for step, value in enumerate((0.9, 0.1, 0.8, 0.2, 0.3, 0.4), 1):
        save(tmp_path, step, value, keep=2, best=2)
    assert steps(tmp_path) == [1, 3, 5, 6]


def test_a_damaged_best_makes_way_for_the_next_one(tmp_path: Path) -> None:
    save(tmp_path, 1, 0.9, best=2)
    save(tmp_path, 2, 0.8, best=2)
    (tmp_path / "step_000001" / "weights").write_text("?")
    save(tmp_path, 3, 0.1)
    assert steps(tmp_path) == [2, 3]


def test_what_is_in_use_is_not_removed(tmp_path: Path) -> None:
    in_use = {1}
    store = CheckpointStore(tmp_path, 1, in_use=in_use)
    for step in (1, 2):
        with store.writing(step):
            pass
    assert steps(tmp_path) == [1, 2]
    in_use.clear()
    with store.writing(3):
        pass
    assert steps(tmp_path) == [3]


def test_large_files_are_hashed_in_the_manifest_and_read_again_only_to_verify(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rlctl_train.checkpoint.manifest.HASHED_BYTES", 10)
    with CheckpointStore(tmp_path, 1).writing(1) as aside:
        (aside / "large").write_bytes(b"a" * 11)
    folder = tmp_path / "step_000001"
    (folder / "large").write_bytes(b"a" * 10 + b"b")
    manifest = read_manifest(folder)
    assert is_complete(folder) and manifest is not None
    assert list(damages(folder, manifest)) == [f"{folder / 'large'} does not have the checksum of its manifest"]


def test_a_file_that_a_rank_wrote_where_nobody_sees_it_is_named(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, 1)
    store.begin(1)
    with pytest.raises(FileNotFoundError, match=r"actor/__1_0\.distcp was written by another process"):
        store.commit(1, {}, {"actor/__1_0.distcp": {"bytes": 1, "sha256": ""}})


def test_room_for_one_is_needed_and_room_for_all_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = 10 * 2**30
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": free}))
    store = CheckpointStore(tmp_path, 2, Best(1, "a", "max"))
    assert store.room(2 * 2**30) is None
    assert "4 checkpoints of 3.00 GiB need 13.20 GiB more" in str(store.room(3 * 2**30))
    with pytest.raises(UserError, match=r"a checkpoint needs 11\.00 GiB but only 10\.00 GiB are free") as told:
        store.room(10 * 2**30)
    assert told.value.exit_code == FAILED


def test_two_runs_cannot_write_one_folder(tmp_path: Path) -> None:
    with sole_writer(tmp_path, "first"):
        being_written = pytest.raises(UserError, match=f"is being written by run first on host .*process {os.getpid()}")
        with being_written as told, sole_writer(tmp_path, "second"):
            pass
        assert told.value.exit_code == PREFLIGHT
    with sole_writer(tmp_path, "second"):
        assert json.loads((tmp_path / NOTE).read_text())["run"] == "second"


def test_a_killed_writer_leaves_the_folder_free(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from rlctl_train.checkpoint.lock import sole_writer\n"
        "with sole_writer(Path(sys.argv[1]), 'killed'): print('held', flush=True); time.sleep(600)"
    )
    writer = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE)
    assert writer.stdout is not None
    assert writer.stdout.readline() == b"held\n"
    with pytest.raises(UserError, match="by run killed"), sole_writer(tmp_path, "next"):
        pass
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    writer.stdout.close()
    with sole_writer(tmp_path, "next"):
        pass


def test_a_file_system_without_locks_is_warned_of_and_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    monkeypatch.setattr("fcntl.flock", no_locks)
    with sole_writer(tmp_path, "first"):
        pass
    assert "has no locks (Operation not supported)" in capsys.readouterr().err


def test_a_folder_that_may_not_be_written_is_said_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(*_: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr("os.open", denied)
    forbidden = pytest.raises(UserError, match=r"checkpoints cannot be written to .*: Permission denied")
    with forbidden as told, sole_writer(tmp_path, "first"):
        pass
    assert told.value.exit_code == PREFLIGHT
