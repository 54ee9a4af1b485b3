"""Where an output grows before it has its name: `.NAME.merging` beside the target, with a journal of what is done.

One process at a time holds it. What is in the journal has reached the disk, so that a process that is killed at any
moment can be followed by another that goes on; the target's name is given by one rename, when everything is there.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rlctl_train.checkpoint.safetensors_writer import Finished
from rlctl_train.checkpoint.store import MANIFEST, sync
from rlctl_train.config.errors import FAILED, UserError


@dataclass(frozen=True)
class Workplace:
    """The hidden folder of one output."""

    target: Path

    @property
    def root(self) -> Path:
        """Return the hidden folder, which lies on the same disk as the target."""
        return self.target.parent / f".{self.target.name}.merging"

    @property
    def out(self) -> Path:
        """Return the folder that becomes the target."""
        return self.root / "out"

    @property
    def _journal(self) -> Path:
        return self.root / "journal.jsonl"

    @property
    def _replaced(self) -> Path:
        return self.root / "replaced"

    def resume(self, fingerprint: str) -> dict[str, str]:
        """Return the checksums of tensors that are done, by name; of another merge's leavings, nothing stays."""
        lines = _lines(self._journal)
        if lines and lines[0].get("fingerprint") == fingerprint and self.out.is_dir():
            return {line["tensor"]: line["checksum"] for line in lines[1:]}
        if self._replaced.exists() and not self.target.exists():  # it died between two renames
            self._replaced.rename(self.target)
        for leaving in (self.out, self._replaced):
            shutil.rmtree(leaving, ignore_errors=True)
        self.out.mkdir()
        self._journal.write_text("")
        self._append([{"fingerprint": fingerprint}])
        sync(self.root)
        return {}

    def is_done(self, fingerprint: str) -> bool:
        """Say whether the target is this very merge's, finished by a process that died before it had cleaned up."""
        lines = _lines(self._journal)
        if self.out.exists() or not lines or lines[0].get("fingerprint") != fingerprint:
            return False
        try:
            return json.loads((self.target / MANIFEST).read_text())["source"]["fingerprint"] == fingerprint
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def note(self, finished: Sequence[Finished]) -> None:
        """Put down that tensors have reached the disk."""
        self._append([{"tensor": done.name, "checksum": done.checksum} for done in finished])

    def publish(self) -> None:
        """Give the output its name; what had it goes."""
        for path in [*self.out.rglob("*"), self.out]:
            sync(path)
        if self.target.exists():
            shutil.rmtree(self._replaced, ignore_errors=True)
            self.target.rename(self._replaced)
        self.out.rename(self.target)
        sync(self.target.parent)

    def clean(self) -> None:
        """Remove the hidden folder, its journal last: by it another process knows that the target is this merge's."""
        for folder in (self.out, self._replaced):
            shutil.rmtree(folder, ignore_errors=True)
        self._journal.unlink(missing_ok=True)
        shutil.rmtree(self.root)

    def _append(self, lines: Sequence[Mapping[str, str]]) -> None:
        with self._journal.open("a") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
            file.flush()
            os.fsync(file.fileno())


@contextmanager
def claimed(target: Path) -> Iterator[Workplace]:
    """Hold the workplace of a target; refuse it while another process does."""
    place = Workplace(target)
    while True:
        place.root.mkdir(parents=True, exist_ok=True)
        lock = place.root / "lock"
        with lock.open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(
                    f"another process is merging into {target} at this moment", "wait for it, or choose another --out",
                    exit_code=FAILED,
                ) from None  # fmt: skip
            if lock.exists() and lock.stat().st_ino == os.fstat(file.fileno()).st_ino:
                yield place
                return


def _lines(journal: Path) -> list[dict[str, str]]:
    """Read the journal up to the first line that is not whole."""
    found: list[dict[str, str]] = []
    for line in journal.read_text().split("\n")[:-1] if journal.is_file() else ():
        try:
            found.append(json.loads(line))
        except ValueError:
            break
    return found
