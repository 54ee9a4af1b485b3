"""Remote checkpoints: manifest last, tried again, pruned by the same rule, fetched whole or not at all.

In fsspec's memory, and in a server that speaks S3, through s3fs.
"""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import pytest

from rlctl_train.checkpoint.manifest import MANIFEST, Best, Keep, is_complete
from rlctl_train.checkpoint.remote import RemoteError, RemoteStore
from rlctl_train.checkpoint.store import CheckpointStore
from rlctl_train.checkpoint.uploads import Uploads
from rlctl_train.config.errors import PREFLIGHT, UserError

ACCOUNT = {"AWS_ACCESS_KEY_ID": "somebody", "AWS_SECRET_ACCESS_KEY": "nothing", "AWS_DEFAULT_REGION": "us-east-1"}


@dataclass(frozen=True)
class Place:
    """A remote place with nothing in it."""

    url: str
    files: Any

    @property
    def root(self) -> str:
        return f"{self.url.partition('://')[2]}/mine/checkpoints"

    def remote(self, keep: Keep | None = None, waits: list[float] | None = None) -> RemoteStore:
        return RemoteStore(self.url, "mine", keep or Keep(9), ([] if waits is None else waits).append)

    def steps(self) -> list[str]:
        self.files.invalidate_cache()
        return sorted(path.rstrip("/").rpartition("_")[2] for path in self.files.ls(self.root, detail=False))


@pytest.fixture(scope="module")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    if "TESTS_S3_SERVER" not in os.environ:
        pytest.skip("a server that speaks S3 is not here: nox -s tests")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = probe.getsockname()
    with (tmp_path_factory.mktemp("s3") / "log").open("w") as log:
        words = [os.environ["TESTS_S3_SERVER"], "-H", address[0], "-p", str(address[1])]
        server = subprocess.Popen(words, stdout=log, stderr=log, env=os.environ | ACCOUNT)
        try:
            deadline = time.monotonic() + 60
            while True:
                try:
                    socket.create_connection(address, timeout=1).close()
                    break
                except OSError:
                    assert server.poll() is None and time.monotonic() < deadline, "the server did not come up"
                    time.sleep(0.1)
            yield f"http://{address[0]}:{address[1]}"
        finally:
            server.kill()
            server.wait()


@pytest.fixture(params=["memory", "s3"])
def place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    if request.param == "s3":
        for name, value in {**ACCOUNT, "AWS_ENDPOINT_URL": request.getfixturevalue("s3_server")}.items():
            monkeypatch.setenv(name, value)
    fsspec.config.conf.clear()
    files: Any = fsspec.filesystem(request.param, skip_instance_cache=True)
    files.mkdir("bucket")
    yield Place(f"{request.param}://bucket/runs", files)
    files.rm("bucket", recursive=True)
    type(files).clear_instance_cache()


def saved(folder: Path, step: int, value: float = 0.0) -> Path:
    with CheckpointStore(folder, 9).writing(step, {"metrics": {"a": value}}) as aside:
        (aside / "actor").mkdir()
        (aside / "actor" / "shard").write_text(f"weights of {step}")
        (aside / "state.json").write_text(str(step))
    return folder / f"step_{step:06d}"


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


def test_a_checkpoint_goes_there_and_comes_back_whole(place: Place, tmp_path: Path) -> None:
    place.remote().send(saved(tmp_path / "here", 3))
    (tmp_path / "there").mkdir()
    fetched = place.remote().fetch(tmp_path / "there")
    assert fetched == tmp_path / "there" / "step_000003" and is_complete(fetched)
    assert (fetched / "actor" / "shard").read_text() == "weights of 3"


def test_the_manifest_is_sent_last(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = place.remote()
    put = Failing(store, "put_file", 0)
    monkeypatch.setattr(store._fs, "put_file", put)
    store.send(saved(tmp_path, 3))
    assert [path.rpartition("/")[2] for path in put.calls] == ["shard", "state.json", MANIFEST]


def test_a_failed_transfer_is_tried_again_after_ever_longer_waits(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    waits: list[float] = []
    store = place.remote(waits=waits)
    monkeypatch.setattr(store._fs, "put_file", Failing(store, "put_file", 3))
    store.send(saved(tmp_path, 3))
    assert waits == [1, 2, 4]
    assert "the network is away; trying again in 4 s (3 of 5)" in capsys.readouterr().err
    assert place.remote().fetch(tmp_path / "x") is not None


def test_an_upload_broken_off_is_no_checkpoint(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = place.remote()
    store.send(saved(tmp_path / "here", 1))
    monkeypatch.setattr(store._fs, "put_file", Failing(store, "put_file", 99))
    with pytest.raises(RemoteError, match=r"sending step_000002 to .* failed 5 times: the network is away"):
        store.send(saved(tmp_path / "here", 2))
    fetched = place.remote().fetch(tmp_path / "there")
    assert fetched is not None and fetched.name == "step_000001"


def test_a_step_that_is_sent_again_is_incomplete_meanwhile(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = place.remote()
    folder = saved(tmp_path, 1)
    store.send(folder)
    monkeypatch.setattr(store._fs, "put_file", Failing(store, "put_file", 99))
    with pytest.raises(RemoteError):
        store.send(folder)
    assert place.remote().fetch(tmp_path / "there") is None


def test_remote_checkpoints_are_pruned_by_the_same_rule(place: Place, tmp_path: Path) -> None:
    for step, value in ((1, 0.1), (2, 0.9), (3, 0.2), (4, 0.3)):
        place.remote(Keep(1, Best(1, "a", "max"))).send(saved(tmp_path, step, value))
    assert place.steps() == ["000002", "000004"]


def test_a_damaged_remote_checkpoint_is_passed_over(
    place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for step in (1, 2):
        place.remote().send(saved(tmp_path / "here", step))
    place.files.pipe_file(f"{place.root}/step_000002/actor/shard", b"weights of 1")
    fetched = place.remote().fetch(tmp_path / "there")
    assert fetched is not None and fetched.name == "step_000001"
    assert "step_000002 is damaged and passed over" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "there").iterdir()] == ["step_000001"]


def test_an_empty_place_has_nothing_to_fetch(place: Place, tmp_path: Path) -> None:
    assert place.remote().fetch(tmp_path) is None


def test_a_place_that_cannot_be_written_is_said_before_training(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"checkpoint\.remote=.* cannot be written to") as told:
        RemoteStore(f"file://{tmp_path}/file", "mine", Keep(1))
    assert told.value.exit_code == PREFLIGHT
    with pytest.raises(UserError, match="cannot be written to: Protocol not known: nowhere"):
        RemoteStore("nowhere://bucket", "mine", Keep(1))


def test_a_remote_that_fails_later_is_counted_and_training_goes_on(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    store = place.remote()
    monkeypatch.setattr(store._fs, "put_file", Failing(store, "put_file", 5))
    with Uploads(store) as uploads:
        uploads.add(saved(tmp_path, 1))
        uploads.wait()
        assert uploads.failures == 1 and not uploads.in_use
        uploads.add(saved(tmp_path, 2))
    assert uploads.failures == 1
    assert place.steps() == ["000002"]
    assert "training goes on" in capsys.readouterr().err


def test_of_several_that_wait_only_the_newest_is_sent(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = place.remote()
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


@pytest.mark.parametrize("place", ["s3"], indirect=True)
def test_a_bucket_that_is_not_there_is_said_and_not_made(place: Place) -> None:
    with pytest.raises(UserError, match=r"checkpoint\.remote=.* there is no bucket 'bukcet'") as told:
        RemoteStore("s3://bukcet/runs", "mine", Keep(1))
    assert told.value.exit_code == PREFLIGHT
    assert not place.files.exists("bukcet")
