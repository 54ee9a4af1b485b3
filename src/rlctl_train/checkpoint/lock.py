"""One writer per folder of checkpoints: a lock that the driver holds for its life, and a note of who holds it."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from rlctl_train.config.errors import PREFLIGHT, UserError

LOCK = ".lock"


@contextmanager
def sole_writer(folder: Path, run: str) -> Iterator[None]:
    """Hold the folder within the block; raise UserError where another process holds it.

    The kernel lets go of the lock when the process ends, however it ends.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / LOCK).open("a+")
    except OSError as error:
        raise UserError(
            f"checkpoints cannot be written to {folder}: {error.strerror}",
            "make the folder writable, or start the run in another place (RLCTL_RUNS_DIR)",
            exit_code=PREFLIGHT,
        ) from error
    with file:
        _take(file, folder)
        file.truncate(0)
        json.dump({"run": run, "host": socket.gethostname(), "pid": os.getpid()}, file)
        file.flush()
        yield


def _take(file: IO[str], folder: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UserError(
            f"{folder} is being written by {_holder(file)}",
            "wait until that run ends or stop it (`rlctl runs stop`), or start this one in another folder",
            exit_code=PREFLIGHT,
        ) from error
    except OSError as error:
        print(f"{folder} has no locks ({error.strerror}): see to it that no other run writes there", file=sys.stderr)


def _holder(file: IO[str]) -> str:
    file.seek(0)
    try:
        note = json.loads(file.read())
        return f"run {note['run']} on host {note['host']} (process {note['pid']})"
    except (ValueError, KeyError, TypeError):  # it has only just taken the lock
        return "another run"
