"""The watchdog, with a stand-in for the crew: it answers whoever asks where everyone is."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import cast

from ray.exceptions import RayError

from rlctl_train.config import RunConfig
from rlctl_train.config.layout import RunFiles
from rlctl_train.crew import Crew
from rlctl_train.status import Status
from rlctl_train.watchdog import Watchdog
from tests import runs


def watching(root: Path, **health: float | None) -> Watchdog:
    """Return a watchdog over a new run folder."""
    files = RunFiles(root)
    files.logs.mkdir()
    config = RunConfig.model_validate(runs.CONFIG | {"health": {"stall_after_s": None, **health}})
    return Watchdog(files, Status(files, 1), config)


def crew_of(stacks: Callable[[], dict[str, str]]) -> Crew:
    return cast(Crew, SimpleNamespace(stacks=stacks))


def asked(root: Path) -> str:
    """Ask a run that is watched; return the answer."""
    files = RunFiles(root)
    files.stacks_wanted.touch()
    deadline = time.monotonic() + 30
    while files.stacks_wanted.exists():
        assert time.monotonic() < deadline, "nobody answered"
        time.sleep(0.05)
    (path,) = files.logs.glob("stacks-*.txt")
    return path.read_text()


def test_who_asks_is_told_where_the_driver_and_every_worker_are(tmp_path: Path) -> None:
    dog = watching(tmp_path)
    with dog.looking(), dog.over(crew_of(lambda: {"actor worker 0": "running\nin forward"})):
        told = asked(tmp_path)
    assert told.startswith("asked for in step 0, phase ")
    assert "== driver (process" in told and "in asked" in told
    assert "== actor worker 0: running\nin forward" in told


def test_a_ray_that_does_not_answer_is_part_of_the_answer(tmp_path: Path) -> None:
    def fails() -> dict[str, str]:
        raise RayError("gone")

    dog = watching(tmp_path)
    with dog.looking(), dog.over(crew_of(fails)):
        assert "== workers: Ray does not answer: gone" in asked(tmp_path)


def test_a_driver_without_workers_says_where_it_is_itself_and_has_no_limit(tmp_path: Path) -> None:
    with watching(tmp_path, stall_after_s=0.001).looking():
        told = asked(tmp_path)  # with workers, the driver would have ended for standing still
    assert "in asked" in told and told.count("\n== ") == 1
