"""Slurm's commands, each with a limit of time: with its controller down they would hang for minutes."""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rlctl_train.config.errors import LAUNCH, UserError

ASK_LIMIT_S = 10.0
SUBMIT_LIMIT_S = 60.0
FRESH_S = 2.0
"""How long one answer about all jobs serves every question of this process."""
SILENT_S = 15.0
"""How long a controller that did not answer is not asked again."""

SILENCE = ("Unable to contact slurm controller", "Socket timed out")
"""What clients complain of when nobody answers them."""


@dataclass(frozen=True)
class JobFacts:
    """What Slurm says of one job."""

    state: str
    reason: str = ""
    exit_code: int | None = None
    """Of the batch script; None where a signal ended it or Slurm does not say."""


class SlurmError(UserError):
    """A command of Slurm that failed or did not answer."""

    def __init__(self, what: str, remedy: str) -> None:
        super().__init__(what, remedy, exit_code=LAUNCH)

    def __reduce__(self) -> tuple[object, ...]:
        return SlurmError, (self.what, self.remedy)


def command(words: Sequence[str], limit_s: float | None = None, environment: Mapping[str, str] | None = None) -> str:
    """Run one command and return what it printed; raises SlurmError with what it complained of."""
    done = _run(words, ASK_LIMIT_S if limit_s is None else limit_s, environment)
    if done.returncode == 0:
        return done.stdout
    if any(complaint in done.stderr for complaint in SILENCE):
        raise _no_controller(words[0])
    said = (done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}").splitlines()[0]
    raise SlurmError(f"{words[0]}: {said}", "see the launch.* settings in docs/launching.md, or ask the site")


def ping() -> None:
    """Refuse to go on with a controller that is down; `scontrol ping` says so at once where others try for long."""
    if "UP" not in _run(["scontrol", "ping"], ASK_LIMIT_S, None).stdout.split():
        raise _no_controller("scontrol ping")


def _run(
    words: Sequence[str], limit_s: float, environment: Mapping[str, str] | None
) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            words, env=environment, timeout=limit_s, capture_output=True, text=True, stdin=subprocess.DEVNULL
        )
    except FileNotFoundError as error:
        hint = "install Slurm's client programs, or run rlctl on a login node of the cluster"
        raise SlurmError(f"{words[0]} is not installed here", hint) from error
    except subprocess.TimeoutExpired as error:
        raise _no_controller(f"{words[0]} did not answer within {limit_s:g} s") from error


def _no_controller(how: str) -> SlurmError:
    return SlurmError(
        f"Slurm's controller is down or out of reach ({how})",
        "look with `scontrol ping`, and try again once it is up; jobs that run go on meanwhile",
    )


class Queue:
    """What the queue says of the person's jobs, asked for all of them at once and kept for a moment."""

    def __init__(self) -> None:
        self._jobs: dict[str, JobFacts] = {}
        self._ended: dict[str, JobFacts] = {}
        self._asked: float | None = None
        self._error: tuple[float, SlurmError] | None = None

    def job(self, number: str) -> JobFacts | None:
        """Return the job's facts, or None where Slurm has forgotten it; raises SlurmError when it cannot be asked."""
        if number in self._ended:
            return self._ended[number]
        if self._error is not None and time.monotonic() - self._error[0] < SILENT_S:
            raise self._error[1]
        try:
            found = self._look(number)
        except SlurmError as error:
            self._error = time.monotonic(), error
            raise
        self._error = None
        return found

    def forget(self) -> None:
        """Ask anew at the next question: something was just submitted or cancelled."""
        self._asked = None

    def _look(self, number: str) -> JobFacts | None:
        if self._asked is None or time.monotonic() - self._asked > FRESH_S:
            ping()
            listed = command(["squeue", "--noheader", f"--user={os.getuid()}", "--format=%i|%T|%r"])
            rows = [line.strip().split("|", 2) for line in listed.splitlines() if line.strip()]
            self._jobs = {row[0]: JobFacts(row[1], row[2]) for row in rows}
            self._asked = time.monotonic()
        if number in self._jobs:
            return self._jobs[number]
        found = _remembered(number) or _accounted(number)
        if found is not None:
            self._ended[number] = found
        return found


def _remembered(number: str) -> JobFacts | None:
    """Return what the controller still knows of a job that has left the queue."""
    try:
        shown = command(["scontrol", "--oneliner", "show", "job", number])
    except SlurmError as error:
        if "Invalid job id" in error.what:
            return None
        raise
    fields = dict(re.findall(r"(\S+?)=(\S*)", shown))
    return JobFacts(fields["JobState"], fields.get("Reason", ""), _exit_code(fields.get("ExitCode", "")))


def _accounted(number: str) -> JobFacts | None:
    """Return what accounting knows of a job, at sites that have it."""
    try:
        listed = command(["sacct", "--noheader", "--parsable2", "--allocations", f"--jobs={number}",
                          "--format=State,ExitCode"])  # fmt: skip
    except SlurmError:
        return None
    rows = [line.split("|") for line in listed.splitlines() if line.strip()]
    return JobFacts(rows[-1][0].split()[0], "", _exit_code(rows[-1][1])) if rows else None


def _exit_code(text: str) -> int | None:
    """Read `CODE:SIGNAL`."""
    code, _, number = text.partition(":")
    return int(code) if code.isdigit() and number == "0" else None
