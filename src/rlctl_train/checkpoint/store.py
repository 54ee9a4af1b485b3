"""Checkpoint folders of a run: written aside, verified, renamed into place, pruned.

A folder `step_000120` is complete by construction: it is renamed from a hidden one only after every file in it
has reached the disk and is listed, with its size, in `manifest.json`. A crash at any moment leaves the last
complete one; what it left half-done is hidden and removed by the next save.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rlctl_train.config.errors import FAILED, UserError
from rlctl_train.config.layout import write_json

MANIFEST = "manifest.json"
HASHED_BYTES = 2**20
"""Files up to this size are listed with their SHA-256; larger ones, the tensors, with their size alone."""
SPARE = 1.1
"""A save needs this many times the size of the last checkpoint in free space."""


class CheckpointStore:
    """The checkpoints of one run. One process writes; any may ask for `latest`."""

    def __init__(self, folder: Path, keep_last: int) -> None:
        assert keep_last >= 1
        self._folder, self._keep_last = folder, keep_last

    @contextmanager
    def writing(self, step: int, manifest: Mapping[str, Any] | None = None, num_bytes: int = 0) -> Iterator[Path]:
        """Give the folder to write into; commit it when the block ends, drop it when the block fails."""
        folder = self.begin(step, num_bytes)
        try:
            yield folder
            self.commit(step, manifest or {})
        except OSError as error:
            shutil.rmtree(folder, ignore_errors=True)
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise _no_space(self._folder, "the disk filled up while a checkpoint was written") from error
            raise
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise

    def begin(self, step: int, num_bytes: int = 0) -> Path:
        """Clean up after earlier crashes and return an empty folder for `step`.

        `num_bytes` is the expected size; the size of the last checkpoint counts when it is larger.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        self._clean()
        self._check_space(num_bytes)
        folder = self._temporary(step)
        folder.mkdir()
        return folder

    def commit(self, step: int, manifest: Mapping[str, Any]) -> Path:
        """Make the folder that `begin` gave the checkpoint of `step`, and remove those no longer kept."""
        folder, target = self._temporary(step), self._folder / _name(step)
        files = {str(path.relative_to(folder)): _entry(path) for path in _files(folder)}
        write_json(folder / MANIFEST, {"schema_version": 1, "step": step, "files": files, **manifest})
        _sync_tree(folder)
        if target.exists():
            target.rename(self._replaced(step))
        folder.rename(target)
        _sync(self._folder)
        self._prune(step)
        self._clean()
        return target

    def latest(self) -> Path | None:
        """Return the newest checkpoint whose files are all there in their listed sizes, or None."""
        return next((path for _, path in self._newest_first() if is_complete(path)), None)

    def _newest_first(self) -> list[tuple[int, Path]]:
        found = {_step(path): path for path in self._folder.glob("step_*")}
        # A crash between the two renames of a save that replaces its own step leaves only the replaced one.
        for path in self._folder.glob(".step_*.replaced"):
            found.setdefault(_step(path), path)
        return sorted(found.items(), reverse=True)

    def _prune(self, step: int) -> None:
        older = [path for number, path in self._newest_first() if number < step and is_complete(path)]
        kept = {self._folder / _name(step), *older[: self._keep_last - 1]}
        for _, path in self._newest_first():
            if path not in kept:  # a later step belongs to a future that a resume has abandoned
                path.rename(self._folder / f".{path.name.strip('.')}.removed")

    def _clean(self) -> None:
        for path in self._folder.glob(".step_*.replaced"):
            target = self._folder / _name(_step(path))
            if not target.exists():
                path.rename(target)
        for path in self._folder.glob(".step_*"):
            shutil.rmtree(path)

    def _check_space(self, num_bytes: int) -> None:
        last = self.latest()
        size = sum(path.stat().st_size for path in _files(last)) if last else 0
        needed, free = int(max(num_bytes, size) * SPARE), shutil.disk_usage(self._folder).free
        if free < needed:
            what = f"a checkpoint needs {needed / 2**30:.2f} GiB but only {free / 2**30:.2f} GiB are free"
            raise _no_space(self._folder, what)

    def _temporary(self, step: int) -> Path:
        return self._folder / f".{_name(step)}.writing"

    def _replaced(self, step: int) -> Path:
        return self._folder / f".{_name(step)}.replaced"


def is_complete(folder: Path) -> bool:
    """Say whether every file of the folder's manifest is there, in the listed size and, if listed, hash."""
    try:
        files = json.loads((folder / MANIFEST).read_text())["files"]
        return all(_matches(folder / name, entry) for name, entry in files.items())
    except (OSError, ValueError, KeyError, TypeError):  # no manifest, or not one of ours
        return False


def _matches(path: Path, entry: Mapping[str, Any]) -> bool:
    if path.stat().st_size != entry["bytes"]:
        return False
    return entry["sha256"] is None or entry["sha256"] == _sha256(path)


def _entry(path: Path) -> dict[str, Any]:
    size = path.stat().st_size
    return {"bytes": size, "sha256": _sha256(path) if size <= HASHED_BYTES else None}


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _sync_tree(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _name(step: int) -> str:
    return f"step_{step:06d}"


def _step(path: Path) -> int:
    digits = path.name.strip(".").split(".")[0].removeprefix("step_")
    return int(digits) if digits.isdigit() else -1


def _no_space(folder: Path, what: str) -> UserError:
    remedy = (
        f"free space on the disk of {folder}, or lower checkpoint.keep_last; `rlctl runs resume` then continues "
        "from the last checkpoint"
    )
    return UserError(what, remedy, exit_code=FAILED)
