"""Saving while the worst happens: killed at any moment, no space, no permission. The last good checkpoint stays."""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from rlctl_train.checkpoint.background import in_background
from rlctl_train.checkpoint.manifest import Best, damages, read_manifest
from rlctl_train.checkpoint.sharded import load_sharded
from rlctl_train.checkpoint.shares import HostCopies, agree, seal, tensors_of, told_of
from rlctl_train.checkpoint.store import CheckpointStore, refused
from rlctl_train.config.errors import FAILED, UserError

ROLES = ("actor", "critic")
BEST = Best(1, "value", "max")


def tensors(step: int, size: int = 20_000) -> dict[str, torch.Tensor]:
    return {f"model.{name}": torch.full((size,), float(step)) for name in "abc"}


def save(folder: Path, step: int, state: dict[str, torch.Tensor] | None = None) -> None:
    """Save as a run does: copied, written beside what goes on, committed when all is written."""
    store = CheckpointStore(folder, 2, BEST)
    aside = store.begin(step)
    state = tensors(step) if state is None else state
    shares = {role: agree(state, aside / role, HostCopies()) for role in ROLES}
    under_way = {role: in_background(role, share.write) for role, share in shares.items()}
    for tensor in state.values():
        tensor.fill_(-1.0)  # training goes on
    try:
        written = {role: [future.result()] for role, future in under_way.items()}
        for role, everyone in written.items():
            seal(aside / role, everyone)
        (aside / "state.json").write_text(str(step))
        store.commit(step, {"tensors": tensors_of(written), "metrics": {"value": -abs(step - 3)}}, told_of(written))
    except OSError as error:
        store.drop(step)
        raise refused(aside, error) from error


def check(folder: Path, committed: int) -> None:
    """Hold every checkpoint there to its manifest, and the newest to what was saved last."""
    for path in folder.glob("step_*"):
        manifest = read_manifest(path)
        assert manifest is not None, f"{path} has no manifest"
        assert list(damages(path, manifest)) == []
    latest = CheckpointStore(folder, 2, BEST).latest()
    if committed:
        assert latest is not None
    if latest is None:
        return
    step = int((latest / "state.json").read_text())
    assert committed <= step <= committed + 1
    for role in ROLES:
        loaded = tensors(0)
        load_sharded(loaded, latest / role)
        assert all(bool((tensor == step).all()) for tensor in loaded.values())


def kill_a_saver(folder: Path, draw: random.Random) -> int:
    """Let a fork save step after step and kill it at a random moment; return the last step that it told of."""
    told, tell = os.pipe()
    child = os.fork()
    if not child:
        try:
            for step in range(1, 100):
                save(folder, step)
                os.write(tell, bytes([step]))
        finally:
            os._exit(1)
    os.close(tell)
    committed = 0
    for _ in range(draw.randrange(4)):
        committed = os.read(told, 1)[0]
    time.sleep(draw.uniform(0, 0.04))  # a moment of the next save
    os.kill(child, signal.SIGKILL)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    while more := os.read(told, 1):
        committed = more[0]
    os.close(told)
    return committed


@pytest.mark.parametrize(
    "num_kills", [20, pytest.param(200, marks=pytest.mark.long)], ids=["in short", "as long as it takes"]
)
def test_whenever_a_saver_is_killed_its_last_checkpoint_loads(tmp_path: Path, num_kills: int) -> None:
    draw = random.Random(num_kills)
    killed_under_way = 0
    for trial in range(num_kills):
        folder = tmp_path / str(trial)
        committed = kill_a_saver(folder, draw)
        killed_under_way += any(folder.glob(".step_*.writing"))
        check(folder, committed)
        save(folder, committed + 2)
        assert not list(folder.glob(".step_*"))
        shutil.rmtree(folder)
    assert killed_under_way >= num_kills // 4, "hardly any save was interrupted"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a disk of 3 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a file system takes root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_real_disk_that_fills_up_is_named_and_the_last_checkpoint_stays(small_disk: Path) -> None:
    folder = small_disk / "checkpoints"
    save(folder, 1)
    with pytest.raises(UserError, match=r"the disk of .*checkpoints filled up while the checkpoint of step 2") as told:
        save(folder, 2, tensors(2, 400_000))
    assert told.value.exit_code == FAILED
    check(folder, 1)
    assert not list(folder.glob(".step_*"))


def test_a_disk_that_turns_read_only_is_named_and_the_last_checkpoint_stays(small_disk: Path) -> None:
    folder = small_disk / "checkpoints"
    save(folder, 1)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(UserError, match=r"the checkpoint of step 2 could not be written to .*: Read-only file system"):
        save(folder, 2)
    check(folder, 1)


@pytest.mark.parametrize("lost_at", ["a shard", "the manifest", "the name"])
def test_permission_lost_in_the_middle_is_named_and_the_last_checkpoint_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost_at: str
) -> None:
    save(tmp_path, 1)

    def denied(*_: Any, **__: Any) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    match lost_at:
        case "a shard":
            monkeypatch.setattr("rlctl_train.checkpoint.shares._Stream.write", lambda *_: denied())
        case "the manifest":
            monkeypatch.setattr("rlctl_train.checkpoint.store.write_json", denied)
        case "the name":
            monkeypatch.setattr(Path, "rename", denied)
    with pytest.raises(UserError, match=r"the checkpoint of step 2 could not be written to .*: Permission denied"):
        save(tmp_path, 2)
    monkeypatch.undo()
    check(tmp_path, 1)


def test_a_write_that_torch_reports_as_something_else_is_the_disks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    share = agree(tensors(1), tmp_path / "actor")

    class Full:
        def write(self, data: Any) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        def __getattr__(self, name: str) -> Any:
            return lambda *_: 0

    init = "rlctl_train.checkpoint.shares._Stream.__init__"
    monkeypatch.setattr(init, lambda self, raw, disk: vars(self).update(_raw=Full(), _disk=disk))
    with pytest.raises(OSError, match="No space left"):
        share.write()
