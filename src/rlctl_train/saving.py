"""Saving beside training: the driver's part. At most one save is under way; it is complete when all ranks have written.

Ranks copy their state while training pauses and write it while training goes on. A thread of the driver asks them
whether they have, and then makes their files one checkpoint.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import ray
from ray.exceptions import RayError

from rlctl_train.checkpoint.background import in_background
from rlctl_train.checkpoint.shares import Written, seal, tensors_of, told_of
from rlctl_train.checkpoint.store import CheckpointStore, refused
from rlctl_train.checkpoint.uploads import Uploads
from rlctl_train.crew import WorkersLost

POLL_S = 0.2
"""Time between two questions to the ranks; each is answered between two phases of a step."""
FINISH_S = 60.0
"""Longest wait for a save under way when the run fails for another reason."""

Writers = Mapping[str, list[Any]]
"""Role -> the actors of its ranks."""


class GivenUp(Exception):
    """The save is no longer wanted."""


class Saver:
    """Makes checkpoints of what ranks write. Leaving its block by an error ends what is under way."""

    def __init__(self, store: CheckpointStore, uploads: Uploads | None) -> None:
        self._store, self._uploads = store, uploads
        self._save: Future[float] | None = None
        self._hurry, self._given_up, self._committing = threading.Event(), threading.Event(), threading.Lock()
        self._seconds: float | None = None

    def __enter__(self) -> Saver:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._save is None:
            return
        if not isinstance(error, RayError | WorkersLost | KeyboardInterrupt):
            # The workers are there, and what they have been given to write is worth having.
            self._hurry.set()
            with suppress(TimeoutError):
                self._save.exception(FINISH_S)
        self._given_up.set()
        with self._committing:  # a commit that has begun is finished
            pass

    def complete(self, step: int, folder: Path, writers: Writers, texts: Mapping[str, str], more: Any) -> None:
        """Make one checkpoint, in the background, of what the ranks have begun to write into `folder`.

        `texts` are further files by name; `more` goes into the manifest.
        """
        assert self._save is None, "wait for the save before"
        self._hurry.clear()
        self._save = in_background("save", lambda: self._complete(step, folder, writers, texts, more))

    def check(self) -> None:
        """Raise what has gone wrong with the save under way, if anything has."""
        if self._save is not None and self._save.done():
            self._take()

    def wait(self) -> None:
        """Wait for the save under way; raise what went wrong with it."""
        if self._save is not None:
            self._hurry.set()
            self._take()

    def take_metrics(self) -> dict[str, float]:
        """Return the time in the background of the last save that is complete, once."""
        seconds, self._seconds = self._seconds, None
        return {} if seconds is None else {"timing_s/write_checkpoint": seconds}

    def _take(self) -> None:
        save, self._save = self._save, None
        assert save is not None
        self._seconds = save.result()

    def _complete(
        self, step: int, folder: Path, writers: Writers, texts: Mapping[str, str], more: Mapping[str, Any]
    ) -> float:
        start = time.perf_counter()
        try:
            written = self._collect(writers)
            with self._committing:
                if self._given_up.is_set():
                    raise GivenUp
                self._commit(step, folder, written, texts, more)
        except OSError as error:
            self._store.drop(step)
            raise refused(folder, error) from error
        except RayError:
            self._store.drop(step)
            raise
        return time.perf_counter() - start

    def _commit(
        self,
        step: int,
        folder: Path,
        written: Mapping[str, list[Written]],
        texts: Mapping[str, str],
        more: Mapping[str, Any],
    ) -> None:
        for role, everyone in written.items():
            seal(folder / role, everyone)
        for name, text in texts.items():
            (folder / name).write_text(text)
        target = self._store.commit(step, {**more, "tensors": tensors_of(written)}, told_of(written))
        if self._uploads is not None:
            self._uploads.add(target)

    def _collect(self, writers: Writers) -> dict[str, list[Written]]:
        """Return what each rank has written, when all have; raise one's failure when all are through."""
        waiting = {(role, rank): actor for role, actors in writers.items() for rank, actor in enumerate(actors)}
        answers: dict[tuple[str, int], Written] = {}
        failure: RayError | None = None
        while waiting:
            hurried = self._hurry.is_set()
            asked = {key: actor.written.remote(hurried) for key, actor in waiting.items()}
            for key, ref in asked.items():
                try:
                    answer = self._get(ref)
                except RayError as error:
                    failure = failure or error
                    del waiting[key]
                    continue
                if answer is not None:
                    answers[key] = answer
                    del waiting[key]
            if waiting:
                self._hurry.wait(POLL_S)
        if failure is not None:
            raise failure
        return {role: [answers[role, rank] for rank in range(len(actors))] for role, actors in writers.items()}

    def _get(self, ref: ray.ObjectRef) -> Written | None:
        while not ray.wait([ref], timeout=POLL_S)[0]:
            if self._given_up.is_set():
                raise GivenUp
        return ray.get(ref)
