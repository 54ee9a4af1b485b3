"""GraderPool: rewards in worker processes, where a crash or a hang costs one sample its score and nothing else.

A worker takes a chunk of samples and answers sample by sample, so the pool always knows which one is being
graded: when a worker dies or exceeds the time limit, that sample is a recorded zero, a fresh worker takes
the rest of the chunk, and scores already given stay.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from multiprocessing import Pipe
from multiprocessing.connection import wait
from types import TracebackType

from rlctl_train.config.errors import UserError
from rlctl_train.config.reward import GraderConfig, RewardConfig
from rlctl_train.rewards.base import Grade, GradedSample, failed

__all__ = ["Grade", "GradedSample", "GraderPool"]

MAX_CHUNK = 64
START_LIMIT_S = 120.0
"""Longest time a worker may take to start and to import the reward, in seconds."""

Job = tuple[int, GradedSample]
"""A sample and its place in the result."""


class GraderPool:
    """Grades samples in `grader.num_workers` processes. Use it from one thread at a time."""

    def __init__(self, reward: RewardConfig, grader: GraderConfig) -> None:
        self._limit_s = grader.time_limit_s
        self._workers = [_Worker(reward, grader.time_limit_s) for _ in range(grader.num_workers)]
        try:
            for worker in self._workers:
                worker.await_ready()
        except UserError:
            self.close()
            raise

    def score(self, samples: Sequence[GradedSample]) -> list[Grade]:
        """Grade every sample; the result has the order of `samples`, whoever graded what."""
        grades: list[Grade | None] = [None] * len(samples)
        chunk = max(1, min(MAX_CHUNK, len(samples) // (4 * len(self._workers))))
        jobs = list(enumerate(samples))
        chunks = deque(jobs[i : i + chunk] for i in range(0, len(jobs), chunk))
        while chunks or any(worker.jobs for worker in self._workers):
            for worker in self._workers:
                if chunks and not worker.jobs:
                    self._take(worker, chunks.popleft(), grades)
            self._collect(grades)
        return [grade for grade in grades if grade is not None]

    def close(self) -> None:
        """End the worker processes."""
        for worker in self._workers:
            worker.kill()

    def __enter__(self) -> GraderPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _take(self, worker: _Worker, jobs: list[Job], grades: list[Grade | None]) -> None:
        """Give a worker a chunk; when no worker can be started any more, the chunk's samples are recorded zeros."""
        try:
            worker.take(jobs)
        except UserError as error:
            worker.kill()
            for place, _ in jobs:
                grades[place] = failed(error.what)

    def _collect(self, grades: list[Grade | None]) -> None:
        """Wait for news from any worker, at most until the nearest deadline, and write it down."""
        busy = {worker.connection: worker for worker in self._workers if worker.jobs}
        if not busy:
            return
        nearest = min(worker.since for worker in busy.values()) + self._limit_s
        wait(list(busy), timeout=max(nearest - time.monotonic(), 0.0))
        for connection, worker in busy.items():
            if connection.poll():
                failure = worker.read(grades)
            elif time.monotonic() - worker.since >= self._limit_s:
                failure = f"grading took longer than grader.time_limit_s={self._limit_s:g} seconds"
            else:
                continue
            if failure is not None:
                self._replace(worker, failure, grades)

    def _replace(self, worker: _Worker, failure: str, grades: list[Grade | None]) -> None:
        place, _ = worker.jobs.popleft()
        grades[place] = failed(failure)
        rest = list(worker.jobs)
        worker.kill()
        if rest:
            self._take(worker, rest, grades)


class _Worker:
    """One grader process and the samples it still owes."""

    def __init__(self, reward: RewardConfig, time_limit_s: float) -> None:
        self._start_message = json.dumps(
            {"reward": reward.model_dump(mode="json"), "time_limit_s": time_limit_s, "sys_path": sys.path}
        ).encode()
        self.jobs: deque[Job] = deque()
        self.since = 0.0
        self._start()

    def _start(self) -> None:
        self.connection, theirs = Pipe()
        path = os.pathsep.join(entry for entry in sys.path if entry)
        self._process: subprocess.Popen[bytes] | None = subprocess.Popen(
            [sys.executable, "-P", "-m", "rlctl_train.rewards.worker", str(theirs.fileno())],
            pass_fds=(theirs.fileno(),),
            stdin=subprocess.DEVNULL,
            stdout=2,  # what a reward prints is talk, and our stdout is data
            start_new_session=True,  # so that a kill reaches what the reward started, and Ctrl-C only us
            env={**os.environ, "PYTHONPATH": path},
        )
        theirs.close()
        self._is_ready = False

    def await_ready(self) -> None:
        """Wait until the reward is loaded; one that does not load is the user's to mend."""
        try:
            self.connection.send_bytes(self._start_message)
            if not self.connection.poll(START_LIMIT_S):
                raise UserError(
                    f"the reward took longer than {START_LIMIT_S:g} seconds to import", "make its file import faster"
                )
            message = json.loads(self.connection.recv_bytes())
        except (EOFError, OSError) as error:
            raise UserError(
                f"the grader process ended while it loaded the reward ({self._ending()})",
                "import the reward's file in a Python of your own to see why",
            ) from error
        if "what" in message:
            raise UserError(message["what"], message["remedy"])
        self._is_ready = True

    def take(self, jobs: list[Job]) -> None:
        """Send samples to grade, to a fresh process if the last one was killed."""
        if self._process is None or self._process.poll() is not None:
            self.kill()
            self._start()
        if not self._is_ready:
            self.await_ready()
        with contextlib.suppress(OSError):  # a process that died just now is found by `read`
            self.connection.send_bytes(pickle.dumps([tuple(vars(sample).values()) for _, sample in jobs]))
        self.jobs = deque(jobs)
        self.since = time.monotonic()

    def read(self, grades: list[Grade | None]) -> str | None:
        """Write down every grade that has arrived; return how the process ended, if it did."""
        try:
            while self.jobs and self.connection.poll():
                grade = Grade(**json.loads(self.connection.recv_bytes()))
                place, _ = self.jobs.popleft()
                grades[place] = grade
                self.since = time.monotonic()
        except (EOFError, OSError):
            return f"the grader process ended ({self._ending()})"
        return None

    def kill(self) -> None:
        """End the process and everything it started."""
        self.jobs.clear()
        if self._process is None:
            return
        self.connection.close()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._process = None

    def _ending(self) -> str:
        assert self._process is not None
        try:
            code = self._process.wait(timeout=1.0)
        except subprocess.TimeoutExpired:
            return "it closed its connection"
        return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
