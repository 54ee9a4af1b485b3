"""Checkpoint folders of a run: written aside, verified, renamed into place, pruned.

A folder `step_000120` is complete by construction: it is renamed from a hidden one only after every file in it
has reached the disk and is listed, with size and hash, in `manifest.json`. A crash at any moment leaves the last
complete one; what it left half-done is hidden and removed by the next save.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rlctl_train.checkpoint.manifest import (
    MANIFEST,
    Best,
    Keep,
    files_of,
    is_complete,
    make_manifest,
    read_manifest,
    step_name,
    step_of,
)
from rlctl_train.config.errors import FAILED, UserError
from rlctl_train.config.layout import write_json

SPARE = 1.1
"""A save needs this many times the size of the last checkpoint in free space."""
GIB = 2**30
FULL = (errno.ENOSPC, errno.EDQUOT)


class CheckpointStore:
    """The checkpoints of one run. One process writes; any may ask for `latest`."""

    def __init__(
        self, folder: Path, keep_last: int, best: Best | None = None, in_use: Collection[int] = frozenset()
    ) -> None:
        """Steps that are `in_use`, being uploaded for instance, are not removed as long as they are."""
        self._folder, self._keep, self._in_use = folder, Keep(keep_last, best), in_use

    @contextmanager
    def writing(self, step: int, manifest: Mapping[str, Any] | None = None, num_bytes: int = 0) -> Iterator[Path]:
        """Give the folder to write into; commit it when the block ends, drop it when the block fails."""
        folder = self.begin(step, num_bytes)
        try:
            yield folder
            self.commit(step, manifest or {})
        except OSError as error:
            self.drop(step)
            raise refused(folder, error) from error
        except BaseException:
            self.drop(step)
            raise

    def begin(self, step: int, num_bytes: int = 0) -> Path:
        """Clean up after earlier crashes and return an empty folder for `step`.

        `num_bytes` is the expected size; the size of the last checkpoint counts when it is larger.
        """
        folder = self._temporary(step)
        with refusals_told(folder):
            self._folder.mkdir(parents=True, exist_ok=True)
            self._clean()
            self._check_space(num_bytes)
            folder.mkdir()
        return folder

    def commit(
        self, step: int, manifest: Mapping[str, Any], files: Mapping[str, Mapping[str, Any]] | None = None
    ) -> Path:
        """Make the folder that `begin` gave the checkpoint of `step`, and remove those no longer kept.

        `files` are entries of the manifest that are known already; the other files are hashed here.
        """
        folder, target = self._temporary(step), self._folder / step_name(step)
        write_json(folder / MANIFEST, make_manifest(folder, step, files or {}, manifest))
        sync_tree(folder)
        if target.exists():
            target.rename(self._replaced(step))
        folder.rename(target)
        sync(self._folder)
        self._prune(step)
        self._clean()
        return target

    def drop(self, step: int) -> None:
        """Give up what was begun."""
        shutil.rmtree(self._temporary(step), ignore_errors=True)

    def latest(self) -> Path | None:
        """Return the newest checkpoint whose files are all there in their listed sizes, or None."""
        return next((path for _, path in self._newest_first() if is_complete(path)), None)

    def room(self, num_bytes: int) -> str | None:
        """Refuse a disk on which not even one checkpoint of that size has room.

        Return what to warn of where one has, and all that are to be kept have not.
        """
        with refusals_told(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
            self._check_space(num_bytes)
        there = sum(1 for _ in self._newest_first())
        kept = self._keep.last + (self._keep.best.num if self._keep.best else 0) + 1  # a new one before an old one goes
        needed, free = int(num_bytes * max(1, kept - there) * SPARE), shutil.disk_usage(self._folder).free
        if free >= needed:
            return None
        return (
            f"{kept} checkpoints of {num_bytes / GIB:.2f} GiB need {needed / GIB:.2f} GiB more, and the disk of "
            f"{self._folder} has {free / GIB:.2f} GiB free: lower checkpoint.keep_last, or free space"
        )

    def _newest_first(self) -> list[tuple[int, Path]]:
        found = {step_of(path): path for path in self._folder.glob("step_*")}
        # A crash between the two renames of a save that replaces its own step leaves only the replaced one.
        for path in self._folder.glob(".step_*.replaced"):
            found.setdefault(step_of(path), path)
        return sorted(found.items(), reverse=True)

    def _prune(self, step: int) -> None:
        there = self._newest_first()
        # A later step belongs to a future that a resume has abandoned.
        complete = [(number, path) for number, path in there if number <= step and is_complete(path)]
        kept = self._keep.steps({number: read_manifest(path) or {} for number, path in complete})
        for number, path in there:
            if number not in kept and number not in self._in_use:
                path.rename(self._folder / f".{path.name.strip('.')}.removed")

    def _clean(self) -> None:
        for path in self._folder.glob(".step_*.replaced"):
            target = self._folder / step_name(step_of(path))
            if not target.exists():
                path.rename(target)
        for path in self._folder.glob(".step_*"):
            shutil.rmtree(path)

    def _check_space(self, num_bytes: int) -> None:
        last = self.latest()
        size = sum(path.stat().st_size for path in files_of(last)) if last else 0
        needed, free = int(max(num_bytes, size) * SPARE), shutil.disk_usage(self._folder).free
        if free < needed:
            what = f"a checkpoint needs {needed / GIB:.2f} GiB but only {free / GIB:.2f} GiB are free"
            raise _no_space(self._folder, what)

    def _temporary(self, step: int) -> Path:
        return self._folder / f".{step_name(step)}.writing"

    def _replaced(self, step: int) -> Path:
        return self._folder / f".{step_name(step)}.replaced"


@contextmanager
def refusals_told(folder: Path) -> Iterator[None]:
    """Turn what the disk refuses within the block into a UserError; `folder` is the hidden one of a step."""
    try:
        yield
    except OSError as error:
        raise refused(folder, error) from error


def refused(folder: Path, error: OSError) -> UserError:
    """Say that the disk took no checkpoint; `folder` is the hidden one of a step, or that of all checkpoints."""
    step = step_of(folder)
    place, which = (folder, "a checkpoint") if step < 0 else (folder.parent, f"the checkpoint of step {step}")
    if error.errno in FULL:
        return _no_space(place, f"the disk of {place} filled up while {which} was written")
    return UserError(
        f"{which} could not be written to {place}: {error.strerror or error}",
        f"make {place} writable and its disk sound; `rlctl runs resume` then continues from the last checkpoint",
        exit_code=FAILED,
    )


def sync_tree(folder: Path) -> None:
    """Wait until everything in a folder would survive a power cut."""
    for path in [*folder.rglob("*"), folder]:
        sync(path)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, would survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _no_space(folder: Path, what: str) -> UserError:
    remedy = (
        f"free space on the disk of {folder}, or lower checkpoint.keep_last; `rlctl runs resume` then continues "
        "from the last checkpoint"
    )
    return UserError(what, remedy, exit_code=FAILED)
