"""Remote checkpoints: manifest last, tried again, pruned by the same rule, fetched whole or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from rlctl_train.checkpoint.manifest import MANIFEST, Best, Keep, is_complete
from rlctl_train.checkpoint.remote import RemoteError, RemoteStore
from rlctl_train.checkpoint.store import CheckpointStore
from rlctl_train.checkpoint.uploads import Uploads
from rlctl_train.config.errors import PREFLIGHT, UserError

URL = "memory://bucket/runs"
ROOT = "/bucket/runs/mine/checkpoints"


@pytest.fixture
def memory() -> Iterator[Any]:
    files = fsspec.filesystem("memory")
    yield files
    files.store.clear()
    files.pseudo_dirs[:] = [""]


def remote(keep: Keep | None = None, waits: list[float] | None = None) -> RemoteStore:
    return RemoteStore(URL, "mine", keep or Keep(9), ([] if waits is None else waits).append)


def saved(folder: Path, step: int, value: float = 0.0) -> Path:
    with CheckpointStore(folder, 9).writing(step, {"metrics": {"a": value}}) as aside:
        (aside / "actor").mkdir()
        (aside / "actor" / "shard").write_text(f"weights of {step}")
        (aside / "state.json").write_text(str(step))
    return folder / f"step_{step:06d}"


def steps(memory: Any) -> list[str]:
    return sorted(path.rpartition("_")[2] for path in memory.ls(ROOT, detail=False))


class Failing:
    """Makes one verb of a file system fail a number of times, and notes the calls."""

    def __init__(self, store: RemoteStore, verb: str, times: int) -> None:
        self.calls: list[str] = []
        self._left, self._verb = times, getattr(store._fs, verb)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        self.calls.append(str(arguments[-1]))
        self._left -= 1
        if self._left >= 0:
            raise ConnectionError("the network is away")
        return self._verb(*arguments, **named)


def test_a_checkpoint_goes_there_and_comes_back_whole(memory: Any, tmp_path: Path) -> None:
    remote().send(saved(tmp_path / "here", 3))
    (tmp_path / "there").mkdir()
    fetched = remote().fetch(tmp_path / "there")
    assert fetched == tmp_path / "there" / "step_000003" and is_complete(fetched)
    assert (fetched / "actor" / "shard").read_text() == "weights of 3"


def test_the_manifest_is_sent_last(memory: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = remote()
    put = Failing(store, "put_file", 0)
    monkeypatch.setattr(store._fs, "put_file", put)
    store.send(saved(tmp_path, 3))
    assert [path.rpartition("/")[2] for path in put.calls] == ["shard", "state.json", MANIFEST]


def test_a_failed_transfer_is_tried_again_after_ever_longer_waits(
    memory: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    waits: list[float] = []
    store = remote(waits=waits)
    monkeypatch.setattr(store._fs, "put_file", Failing(store, "put_file", 3))
    store.send(saved(tmp_path, 3))
    assert waits == [1, 2, 4]
    assert "the network is away; trying again in 4 s (3 of 5)" in capsys.readouterr().err
    assert remote().fetch(tmp_path / "x") is not None


def test_an_upload_broken_off_is_no_checkpoint(memory: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = remote()
    store.send(saved(tmp_path / "here", 1))
    monkeypatch.setattr(store._fs, "put_file", Failing(store, "put_file", 99))
    with pytest.raises(RemoteError, match=r"sending step_000002 to memory.* failed 5 times: the network is away"):
        store.send(saved(tmp_path / "here", 2))
    fetched = remote().fetch(tmp_path / "there")
    assert fetched is not None and fetched.name == "step_000001"


def test_a_step_that_is_sent_again_is_incomplete_meanwhile(
    memory: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = remote()
    folder = saved(tmp_path, 1)
    store.send(folder)
    monkeypatch.setattr(store._fs, "put_file", Failing(store, "put_file", 99))
    with pytest.raises(RemoteError):
        store.send(folder)
    assert remote().fetch(tmp_path / "there") is None


def test_remote_checkpoints_are_pruned_by_the_same_rule(memory: Any, tmp_path: Path) -> None:
    for step, value in ((1, 0.1), (2, 0.9), (3, 0.2), (4, 0.3)):
        remote(Keep(1, Best(1, "a", "max"))).send(saved(tmp_path, step, value))
    assert steps(memory) == ["000002", "000004"]


def test_a_damaged_remote_checkpoint_is_passed_over(
    memory: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for step in (1, 2):
        remote().send(saved(tmp_path / "here", step))
    memory.pipe_file(f"{ROOT}/step_000002/actor/shard", b"weights of 1")
    fetched = remote().fetch(tmp_path / "there")
    assert fetched is not None and fetched.name == "step_000001"
    assert "step_000002 is damaged and passed over" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "there").iterdir()] == ["step_000001"]


def test_an_empty_place_has_nothing_to_fetch(memory: Any, tmp_path: Path) -> None:
    assert remote().fetch(tmp_path) is None


def test_a_place_that_cannot_be_written_is_said_before_training(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"checkpoint\.remote=.* cannot be written to") as told:
        RemoteStore(f"file://{tmp_path}/file", "mine", Keep(1))
    assert told.value.exit_code == PREFLIGHT
    with pytest.raises(UserError, match="cannot be written to: Protocol not known: nowhere"):
        RemoteStore("nowhere://bucket", "mine", Keep(1))


def test_a_remote_that_fails_later_is_counted_and_training_goes_on(
    memory: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    store = remote()
    monkeypatch.setattr(store._fs, "put_file", Failing(store, "put_file", 5))
    with Uploads(store) as uploads:
        uploads.add(saved(tmp_path, 1))
        uploads.wait()
        assert uploads.failures == 1 and not uploads.in_use
        uploads.add(saved(tmp_path, 2))
    assert uploads.failures == 1
    assert steps(memory) == ["000002"]
    assert "training goes on" in capsys.readouterr().err


def test_of_several_that_wait_only_the_newest_is_sent(
    memory: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = remote()
    uploads = Uploads(store)
    sent: list[str] = []

    def send(folder: Path) -> None:
        if not sent:  # while the first is under way, two more come
            uploads.add(tmp_path / "step_000002")
            uploads.add(tmp_path / "step_000003")
            assert uploads.in_use == {1, 3}
        sent.append(folder.name)

    monkeypatch.setattr(store, "send", send)
    uploads.add(tmp_path / "step_000001")
    uploads.wait()
    assert sent == ["step_000001", "step_000003"] and not uploads.in_use
