"""A grader process: `python -m rlctl_train.rewards.worker FD`. Grades what its parent sends, one sample at a time.

It is a fresh interpreter, not a fork: no torch, no threads, no devices of the parent's. It leaves when its
parent does.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import signal
import sys
import threading
import time
from dataclasses import asdict
from multiprocessing.connection import Connection

from pydantic import TypeAdapter

from rlctl_train.config.errors import UserError
from rlctl_train.config.reward import RewardConfig
from rlctl_train.rewards.base import GradedSample, make_grader


def main() -> None:
    """Load the reward, say so, then answer each chunk of samples with one message a sample."""
    threading.Thread(target=_leave_with_parent, args=(os.getppid(),), daemon=True).start()
    parent = Connection(int(sys.argv[1]))
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):  # the parent closed the pool
        _serve(parent)


def _serve(parent: Connection) -> None:
    start = json.loads(parent.recv_bytes())
    # What a reward imports lies where the parent finds it.
    sys.path[:] = start["sys_path"]
    try:
        grade = make_grader(TypeAdapter(RewardConfig).validate_python(start["reward"]))
    except UserError as error:
        _send(parent, {"what": error.what, "remedy": error.remedy})
        return
    _send(parent, {"ready": True})
    while True:
        for fields in pickle.loads(parent.recv_bytes()):
            # The parent enforces the limit. Should it be gone, the kernel ends a grader that still burns CPU.
            signal.setitimer(signal.ITIMER_PROF, 2 * start["time_limit_s"] + 1)
            _send(parent, asdict(grade(GradedSample(*fields))))


def _send(parent: Connection, message: dict[str, object]) -> None:
    parent.send_bytes(json.dumps(message).encode())


def _leave_with_parent(parent_pid: int) -> None:
    while os.getppid() == parent_pid:
        time.sleep(1.0)
    os._exit(0)


if __name__ == "__main__":
    main()
