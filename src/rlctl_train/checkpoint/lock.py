"""One writer per folder of checkpoints: a lock that the driver holds for its life, and a note of who holds it."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from rlctl_train.config.errors import PREFLIGHT, UserError
from rlctl_train.config.layout import write_json

LOCK, NOTE = ".lock", ".lock.json"
FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT)


@contextmanager
def sole_writer(folder: Path, run: str) -> Iterator[None]:
    """Hold the folder within the block; raise UserError where another process holds it.

    The kernel lets go of the lock when the process ends, however it ends. A file system without locks, as mounted
    buckets are, is warned of.
    """
    with ExitStack() as held:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
            held.callback(os.close, descriptor)
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"{folder} is being written by {_holder(folder)}",
                "wait until that run ends or stop it (`rlctl runs stop`), or start this one in another folder",
                exit_code=PREFLIGHT,
            ) from error
        except OSError as error:
            if error.errno in FORBIDDEN:
                raise _unwritable(folder, error) from error
            warning = f"{folder} has no locks ({error.strerror}): see to it that no other run writes there"
            print(warning, file=sys.stderr)
        _leave_note(folder, run)
        yield


def _leave_note(folder: Path, run: str) -> None:
    try:
        write_json(folder / NOTE, {"run": run, "host": socket.gethostname(), "pid": os.getpid()})
    except OSError as error:
        raise _unwritable(folder, error) from error


def _holder(folder: Path) -> str:
    try:
        note = json.loads((folder / NOTE).read_text())
        return f"run {note['run']} on host {note['host']} (process {note['pid']})"
    except (OSError, ValueError, KeyError, TypeError):  # it has only just taken the lock
        return "another run"


def _unwritable(folder: Path, error: OSError) -> UserError:
    return UserError(
        f"checkpoints cannot be written to {folder}: {error.strerror}",
        "make the folder writable, or start the run in another place (RLCTL_RUNS_DIR)",
        exit_code=PREFLIGHT,
    )
