"""The watchdog, with a stand-in for the crew: it answers whoever asks where everyone is."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from ray.exceptions import RayError

from rlctl_train.config import RunConfig
from rlctl_train.config.layout import RunFiles
from rlctl_train.crew import Crew
from rlctl_train.status import Status
from rlctl_train.watchdog import Watchdog
from tests import runs


def asked(root: Path, stacks: Any) -> str:
    """Ask a run without a limit on standing still; return the answer."""
    files = RunFiles(root)
    files.logs.mkdir()
    config = RunConfig.model_validate(runs.CONFIG | {"health": {"stall_after_s": None}})
    crew = cast(Crew, SimpleNamespace(stacks=stacks))
    with Watchdog(files, Status(files, 1), crew, config):
        files.stacks_wanted.touch()
        deadline = time.monotonic() + 30
        while files.stacks_wanted.exists():
            assert time.monotonic() < deadline, "nobody answered"
            time.sleep(0.05)
    (path,) = files.logs.glob("stacks-*.txt")
    return path.read_text()


def test_who_asks_is_told_where_the_driver_and_every_worker_are(tmp_path: Path) -> None:
    told = asked(tmp_path, lambda: {"actor worker 0": "running\nin forward"})
    assert told.startswith("asked for in step 0, phase ")
    assert "== driver (process" in told and "in asked" in told
    assert "== actor worker 0: running\nin forward" in told


def test_a_ray_that_does_not_answer_is_part_of_the_answer(tmp_path: Path) -> None:
    def fails() -> dict[str, str]:
        raise RayError("gone")

    assert "== workers: Ray does not answer: gone" in asked(tmp_path, fails)
