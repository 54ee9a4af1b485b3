"""Checkpoints in another place, by fsspec: sent after they are complete here, pruned by the same rule, fetched.

A remote checkpoint is complete when its manifest is there: that is sent last and removed first.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import fsspec

from rlctl_train.checkpoint.manifest import (
    MANIFEST,
    Keep,
    damages,
    files_of,
    read_manifest,
    step_name,
    step_of,
)
from rlctl_train.checkpoint.store import sync, sync_tree
from rlctl_train.config.errors import PREFLIGHT, UserError, first_line

TRIES = 5
FIRST_WAIT_S = 1.0
"""Before the second try; each further wait is twice as long."""
PROOF = ".writable"

T = TypeVar("T")


class RemoteError(Exception):
    """The remote place did not do what was asked of it, however often."""


class RemoteStore:
    """The checkpoints of one run in a remote place, under `<url>/<run>/checkpoints`."""

    def __init__(self, url: str, run: str, keep: Keep, sleep: Callable[[float], None] = time.sleep) -> None:
        """Connect, write a file there and remove it again: what cannot be reached is said before training begins."""
        self.place, self._keep, self._sleep = f"{url.rstrip('/')}/{run}/checkpoints", keep, sleep
        try:
            self._fs, self._root = fsspec.core.url_to_fs(self.place)
            bucket = self._root.partition("/")[0]  # empty where paths begin at a root
            if bucket and not self._fs.exists(bucket):
                raise FileNotFoundError(f"there is no bucket {bucket!r}")  # `makedirs` would make it
            self._fs.makedirs(self._root, exist_ok=True)
            self._fs.pipe_file(f"{self._root}/{PROOF}", b"")
            self._fs.rm_file(f"{self._root}/{PROOF}")
        except ImportError as error:
            remedy = "install what speaks it (`rlctl[s3]` for s3://, gcsfs for gs://, pyarrow for hdfs://)"
            raise UserError(f"checkpoint.remote={url!r}: {error}", remedy, exit_code=PREFLIGHT) from error
        except Exception as error:  # the boundary to any file system there is, each with errors of its own
            raise UserError(
                f"checkpoint.remote={url!r} cannot be written to: {first_line(error)}",
                "check address, network and credentials, or unset checkpoint.remote",
                exit_code=PREFLIGHT,
            ) from error

    def send(self, folder: Path) -> None:
        """Send a complete checkpoint, its manifest last, and remove remote ones no longer kept."""
        target = f"{self._root}/{folder.name}"
        what = f"sending {folder.name} to {self.place}"
        if self._patiently(what, lambda: self._fs.exists(f"{target}/{MANIFEST}")):
            self._patiently(what, lambda: self._fs.rm_file(f"{target}/{MANIFEST}"))
        for path in [*files_of(folder), folder / MANIFEST]:
            remote = f"{target}/{path.relative_to(folder)}"
            self._patiently(what, lambda path=path, remote=remote: self._put(path, remote))
        self._patiently(f"pruning {self.place}", lambda: self._prune(step_of(folder)))

    def fetch(self, checkpoints: Path) -> Path | None:
        """Bring the newest complete checkpoint here, verified by its hashes; None where there is none."""
        for step, name in self._newest_first():
            manifest = self._manifest(name)
            if manifest is None:
                continue
            aside = checkpoints / f".{step_name(step)}.fetching"
            shutil.rmtree(aside, ignore_errors=True)
            for file in [*manifest["files"], MANIFEST]:
                local, remote = aside / file, f"{self._root}/{name}/{file}"
                local.parent.mkdir(parents=True, exist_ok=True)
                self._patiently(
                    f"fetching {name} from {self.place}",
                    lambda remote=remote, local=local: self._fs.get_file(remote, str(local)),
                )
            held = read_manifest(aside)
            faults = ["its manifest cannot be read"] if held is None else list(damages(aside, held))
            if not faults:
                sync_tree(aside)
                aside.rename(checkpoints / step_name(step))
                sync(checkpoints)
                return checkpoints / step_name(step)
            print(f"{self.place}/{name} is damaged and passed over: {faults[0]}", file=sys.stderr)
            shutil.rmtree(aside)
        return None

    def _put(self, path: Path, remote: str) -> None:
        self._fs.makedirs(remote.rpartition("/")[0], exist_ok=True)
        self._fs.put_file(str(path), remote)

    def _prune(self, step: int) -> None:
        """Remove what is not kept; an upload that was broken off has no manifest, and goes too."""
        found = {number: (name, self._manifest(name)) for number, name in self._newest_first()}
        complete = {number: manifest for number, (_, manifest) in found.items() if manifest and number <= step}
        kept = self._keep.steps(complete)
        for number, (name, manifest) in found.items():
            if number not in kept:
                if manifest:
                    self._fs.rm_file(f"{self._root}/{name}/{MANIFEST}")
                self._fs.rm(f"{self._root}/{name}", recursive=True)

    def _newest_first(self) -> Iterator[tuple[int, str]]:
        def listed() -> list[str]:
            self._fs.invalidate_cache()
            with suppress(FileNotFoundError):
                return [str(path).rstrip("/").rpartition("/")[2] for path in self._fs.ls(self._root, detail=False)]
            return []

        names = self._patiently(f"listing {self.place}", listed)
        yield from sorted(((step_of(Path(n)), n) for n in names if n.startswith("step_")), reverse=True)

    def _manifest(self, name: str) -> dict[str, Any] | None:
        def read() -> dict[str, Any] | None:
            with suppress(FileNotFoundError, ValueError):
                return json.loads(self._fs.cat_file(f"{self._root}/{name}/{MANIFEST}"))
            return None

        return self._patiently(f"reading {self.place}/{name}", read)

    def _patiently(self, what: str, act: Callable[[], T]) -> T:
        """Try again after 1, 2, 4 and 8 seconds, and say so; raise RemoteError after the last try."""
        for tried in range(1, TRIES + 1):
            try:
                return act()
            except Exception as error:  # the boundary to any file system there is, each with errors of its own
                if tried == TRIES:
                    raise RemoteError(f"{what} failed {TRIES} times: {first_line(error)}") from error
                wait_s = FIRST_WAIT_S * 2 ** (tried - 1)
                print(
                    f"{what}: {first_line(error)}; trying again in {wait_s:g} s ({tried} of {TRIES})", file=sys.stderr
                )
                self._sleep(wait_s)
        raise AssertionError("unreachable")
