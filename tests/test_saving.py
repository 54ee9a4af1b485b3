"""The driver's part of a save: one at a time, complete when all ranks have written, its failures told."""

from __future__ import annotations

import errno
import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ray.exceptions import RayActorError

from rlctl_train import saving
from rlctl_train.checkpoint.background import in_background
from rlctl_train.checkpoint.manifest import damages, read_manifest
from rlctl_train.checkpoint.sharded import load_sharded
from rlctl_train.checkpoint.shares import HostCopies, Written, agree
from rlctl_train.checkpoint.store import CheckpointStore, refused
from rlctl_train.config.errors import PREFLIGHT, UserError
from rlctl_train.config.trainer import CheckpointConfig
from rlctl_train.saving import Saver
from rlctl_train.training import check_best


class Answers:
    """Stands in for Ray: what is asked is answered by a call on the spot."""

    @staticmethod
    def wait(refs: list[Any], timeout: float) -> tuple[list[Any], list[Any]]:
        return refs, []

    @staticmethod
    def get(ref: Callable[[], Any]) -> Any:
        return ref()


class Rank:
    """One rank that writes; it is through once it is `let_go`, or told to hurry."""

    def __init__(self, write: Callable[[], Written]) -> None:
        self._write, self.let_go = write, threading.Event()
        self.written = self

    def remote(self, wait: bool) -> Callable[[], Written | None]:
        return lambda: self._write() if wait or self.let_go.is_set() else None


@pytest.fixture(autouse=True)
def answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saving, "ray", Answers)
    monkeypatch.setattr(saving, "POLL_S", 0.001)


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(tmp_path, 2)


def begin(saver: Saver, store: CheckpointStore, step: int, value: float = 1.0) -> Rank:
    folder = store.begin(step)
    share = agree({"a": torch.full((8,), value)}, folder / "actor", HostCopies())
    rank = Rank(share.write)
    saver.complete(step, folder, {"actor": [rank]}, {"state.json": json.dumps(step)}, {"metrics": {"b": 1.0}})
    return rank


def test_a_checkpoint_is_complete_when_all_ranks_have_written(store: CheckpointStore) -> None:
    saver = Saver(store, None)
    begin(saver, store, 1)
    saver.check()
    assert store.latest() is None
    saver.wait()
    latest = store.latest()
    assert latest is not None
    loaded = {"a": torch.zeros(8)}
    load_sharded(loaded, latest / "actor")
    assert bool((loaded["a"] == 1).all())
    assert saver.take_metrics().keys() == {"timing_s/write_checkpoint"}
    assert saver.take_metrics() == {}


def test_the_manifest_says_where_each_tensor_lies_and_what_was_measured(store: CheckpointStore) -> None:
    saver = Saver(store, None)
    begin(saver, store, 1)
    saver.wait()
    latest = store.latest()
    assert latest is not None
    manifest = read_manifest(latest)
    assert manifest is not None and manifest["metrics"] == {"b": 1.0}
    (piece,) = manifest["tensors"]["actor/a"]
    assert piece["file"] == "actor/__0_0.distcp" and piece["offset"] == 0
    with (latest / piece["file"]).open("rb") as file:
        assert torch.equal(torch.load(file, weights_only=True), torch.ones(8))
    assert set(manifest["files"]) == {"actor/.metadata", "actor/__0_0.distcp", "state.json"}
    assert list(damages(latest, manifest)) == []


def test_a_failed_write_is_told_once_and_leaves_the_last_checkpoint(store: CheckpointStore, tmp_path: Path) -> None:
    saver = Saver(store, None)
    begin(saver, store, 1)
    saver.wait()
    folder = store.begin(2)

    def full() -> Written:
        raise refused(folder, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))

    with pytest.raises(UserError, match=f"the disk of {tmp_path} filled up while the checkpoint of step 2"):
        saver.complete(2, folder, {"actor": [Rank(full)]}, {}, {})
        saver.wait()
    saver.check()
    latest = store.latest()
    assert latest is not None and latest.name == "step_000001"


def test_a_disk_that_fails_in_the_drivers_part_is_named(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(*_: Any) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(saving, "seal", denied)
    saver = Saver(store, None)
    begin(saver, store, 1)
    with pytest.raises(UserError, match=r"the checkpoint of step 1 could not be written to .*: Permission denied"):
        saver.wait()


def test_a_lost_rank_fails_the_save_after_the_others_are_through(store: CheckpointStore) -> None:
    through = []

    def lost() -> Written:
        raise RayActorError()

    def write() -> Written:
        through.append(True)
        return Written([], [], {}, 0.0)

    saver = Saver(store, None)
    ranks = [Rank(lost), Rank(write)]
    saver.complete(1, store.begin(1), {"actor": ranks}, {}, {})
    with pytest.raises(RayActorError):
        saver.wait()
    assert through and store.latest() is None


def test_a_run_that_fails_for_another_reason_still_completes_its_save(store: CheckpointStore) -> None:
    with pytest.raises(ZeroDivisionError), Saver(store, None) as saver:
        begin(saver, store, 1)
        raise ZeroDivisionError
    assert store.latest() is not None


@pytest.mark.parametrize("reason", [KeyboardInterrupt, RayActorError])
def test_a_run_that_lost_its_workers_or_its_patience_does_not_wait(
    store: CheckpointStore, reason: type[BaseException]
) -> None:
    with pytest.raises(reason), Saver(store, None) as saver:
        rank = begin(saver, store, 1)
        raise reason
    rank.let_go.set()
    assert saver._save is not None
    assert isinstance(saver._save.exception(10), saving.GivenUp)
    assert store.latest() is None


def test_what_is_copied_may_change_while_it_is_written(tmp_path: Path) -> None:
    state = {"a": torch.ones(1000), "b": torch.ones(3, 4).T}
    copies = HostCopies()
    for value in (1.0, 2.0):  # the second time into the same memory
        state["a"].fill_(value)
        share = agree(state, tmp_path / str(value), copies)
        state["a"].fill_(-1.0)
        saving.seal(tmp_path / str(value), [share.write()])
        loaded = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
        load_sharded(loaded, tmp_path / str(value))
        assert bool((loaded["a"] == value).all()) and bool((loaded["b"] == 1).all())
    assert len(copies._held) == 2


def test_a_failure_in_the_background_is_raised_where_the_result_is_asked_for() -> None:
    with pytest.raises(ZeroDivisionError):
        in_background("test", lambda: 1 / 0).result()


def test_keeping_the_best_by_what_is_never_measured_is_refused() -> None:
    config = CheckpointConfig(keep_best=1, best_metric="val/loss")
    check_best(config, {"val/loss": 1.0})
    check_best(CheckpointConfig(), {})
    with pytest.raises(UserError, match=r"checkpoint\.best_metric='val/loss' is not measured") as told:
        check_best(config, {"val/accuracy": 1.0})
    assert told.value.exit_code == PREFLIGHT and "val/accuracy" in told.value.remedy
