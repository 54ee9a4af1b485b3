"""The run folder: create it whole or not at all, find it, list all, read where it stands, lock it for one driver."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rlctl_hw.types import Plan

from rlctl import launchers
from rlctl.farside.environment import environment_of
from rlctl.launchers.base import Job, JobStatus, Order
from rlctl.spelling import unknown
from rlctl_train.config.errors import LAUNCH, UserError
from rlctl_train.config.launch_base import Elsewhere
from rlctl_train.config.layout import RunFiles, write_json

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
ENDED = ("stopped", "done", "failed", "lost")


@dataclass(frozen=True)
class Status:
    """Where a run stands. `state` is `lost` when its driver is gone without having said so."""

    state: str
    phase: str = ""
    step: int = 0
    num_steps: int = 0
    started: float | None = None
    updated: float | None = None
    error: dict[str, str] | None = None
    exit_code: int | None = None
    restarts: int = 0
    """Times that the driver has replaced lost workers."""
    notice: str | None = None
    """What last went wrong and how it went on."""


@dataclass(frozen=True)
class Run:
    """One run folder."""

    files: RunFiles

    @property
    def name(self) -> str:
        """Return the run's name."""
        return self.files.root.name

    def config(self) -> dict[str, Any]:
        """Return the stored configuration as plain values."""
        return read_json(self.files.config)

    def plan(self) -> Plan:
        """Return the plan the run was started with."""
        try:
            return Plan.from_json(read_json(self.files.plan))
        except (KeyError, TypeError) as error:
            hint = "the run was started by another version of rlctl: use that one"
            raise UserError(f"{self.files.plan} is not a plan of this version: {error}", hint) from error

    def origin(self) -> dict[str, Any]:
        """Return where the values of the configuration came from; empty for a run that no command made."""
        return read_json(self.files.origin) if self.files.origin.is_file() else {}

    def summary(self) -> dict[str, Any] | None:
        """Return the totals, or None before the end."""
        return read_json(self.files.summary) if self.files.summary.is_file() else None

    def job(self) -> Job | None:
        """Return what was last started for this run, or None before the first."""
        if not self.files.driver.is_file():
            return None
        try:
            return Job(**read_json(self.files.driver))
        except TypeError as error:
            hint = "the run was started by another version of rlctl: use that one"
            raise UserError(f"{self.files.driver} is not a job of this version: {error}", hint) from error

    def status(self) -> Status:
        """Return where the run stands: what it wrote, and what its launcher says of a job that waits or is gone."""
        status, job = self._written(), self.job()
        if status.state == "done" or job is None:
            return status
        launcher = launchers.load(job.launcher)
        standing = launcher.status(self)
        if standing.state == "queued":
            return replace(status, state="queued", phase=standing.detail)
        if standing.state == "unknown":
            return replace(status, phase=standing.detail)
        if standing.state == "ended" and status.state not in ENDED:
            launcher.fetch(self)
            status = self._written()  # it may have ended after it was read
            return status if status.state in ENDED else replace(status, state="lost")
        return status

    def is_live(self) -> bool:
        """Return whether its job waits, runs, or may do so where its launcher cannot be asked."""
        job = self.job()
        return job is not None and launchers.load(job.launcher).status(self).state != "ended"

    def _written(self) -> Status:
        known = Status.__dataclass_fields__
        raw = read_json(self.files.status)
        return Status(**{key: value for key, value in raw.items() if key in known})


def auto_name(base: str) -> str:
    """Return a name for a run nobody named: preset and local time."""
    stem = re.sub(r"[^A-Za-z0-9._-]", "-", base).lstrip(".-_") or "run"
    return f"{stem}-{time.strftime('%Y%m%d-%H%M%S')}"


def check_name(root: Path, name: str) -> None:
    """Refuse a name that cannot be a folder or is taken."""
    if not NAME.fullmatch(name):
        raise UserError(
            f"{name!r} cannot be a run's name", "use letters, digits, '.', '_' and '-', at most 100 of them"
        )
    if (root / name).exists():
        raise _in_use(root, name)


def create(root: Path, name: str, *, config: Any, plan: Any, origin: Any) -> Run:
    """Write a new run folder in one move: a crash leaves nothing under the run's name."""
    check_name(root, name)
    draft = root / f".{name}.{os.getpid()}.tmp"
    try:
        draft.mkdir(parents=True)
        files = RunFiles(draft)
        files.logs.mkdir()
        for path, data in ((files.config, config), (files.plan, plan), (files.origin, origin)):
            write_json(path, data)
        write_json(files.status, {"schema_version": 1, "state": "pending", "phase": "setup", "step": 0})
        draft.rename(root / name)
    except OSError as error:
        shutil.rmtree(draft, ignore_errors=True)
        if (root / name).exists():
            raise _in_use(root, name) from error
        hint = "free some space, or set RLCTL_RUNS_DIR to another place"
        raise UserError(f"cannot create the run folder: {error}", hint, exit_code=LAUNCH) from error
    return Run(RunFiles(root / name))


def amend(run: Run, *, config: Any, plan: Any, origin: Any) -> Path:
    """Replace what drives a run, each file in one move; return the folder that keeps what it was before."""
    files = run.files
    number = 1 + len(list(files.history.glob("[0-9]*")))
    kept, draft = files.history / str(number), files.history / f".{number}.tmp"
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    for path in (files.config, files.plan, files.origin):
        if path.is_file():
            shutil.copy2(path, draft)
    draft.rename(kept)
    for path, data in ((files.plan, plan), (files.origin, origin), (files.config, config)):
        write_json(path, data)
    return kept


def find(root: Path, name: str) -> Run:
    """Return the run of that name, or the run folder at that path."""
    for folder in (root / name, Path(name)):
        if (folder / "config.json").is_file() and (folder / "status.json").is_file():
            return Run(RunFiles(folder.resolve()))
    hint = "`rlctl runs ls` lists them" if root.is_dir() else f"there are none yet in {root}; `rlctl launch` makes one"
    raise unknown("run", name, [run.name for run in every(root)], hint)


def every(root: Path) -> list[Run]:
    """Return all runs, the latest last."""
    if not root.is_dir():
        return []
    folders = [p for p in root.iterdir() if not p.name.startswith(".") and (p / "config.json").is_file()]
    return [Run(RunFiles(p)) for p in sorted(folders, key=lambda p: ((p / "config.json").stat().st_mtime, p.name))]


@contextlib.contextmanager
def idle(run: Run) -> Iterator[None]:
    """Hold a run of which nothing runs or waits; refuse it otherwise."""
    with run.files.lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"run {run.name!r} is being started by someone else", "wait a moment") from None
        job = run.job()
        standing = JobStatus("ended") if job is None else launchers.load(job.launcher).status(run)
        if standing.state == "unknown":
            what = f"nobody can say whether run {run.name!r} still runs: {standing.detail}"
            raise UserError(what, "try again once that is mended", exit_code=LAUNCH)
        if job is not None and standing.state != "ended":
            raise UserError(
                f"run {run.name!r} is already running ({job.launcher} {job.id} on {job.host})",
                f"follow it with `rlctl runs logs -f {run.name}` or end it with `rlctl runs stop {run.name}`",
            )
        yield


def start(run: Run, order: Order) -> None:
    """Have the launcher of the run's configuration start its driver; refuse while one runs or waits already."""
    with idle(run):
        if isinstance(order.config.launch, Elsewhere):
            environment_of(order).pack(run.files.root)
            shutil.rmtree(run.files.doctor, ignore_errors=True)
        with _forgotten_end(run):
            write_json(run.files.driver, launchers.load(order.config.launch.type).submit(order).to_json())


@contextlib.contextmanager
def _forgotten_end(run: Run) -> Iterator[None]:
    """Have a resumed run wait for its new driver: the old one's last status would say that it has ended."""
    old = read_json(run.files.status)
    write_json(run.files.status, old | {"state": "pending", "phase": "setup", "error": None, "exit_code": None})
    try:
        yield
    except UserError:
        write_json(run.files.status, old)
        raise


def give_up(run: Run, error: UserError) -> None:
    """Write into the status why a run does not start, as its driver would."""
    raw = read_json(run.files.status)
    told = {"what": error.what, "remedy": error.remedy}
    ended = {"state": "failed", "phase": "ended", "exit_code": error.exit_code, "error": told, "updated": time.time()}
    write_json(run.files.status, raw | ended)


def read_json(path: Path) -> dict[str, Any]:
    """Read one of the run's files; a broken one is named."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}", "the run folder is damaged; start a new run") from error


def _in_use(root: Path, name: str) -> UserError:
    return UserError(
        f"run name {name!r} is in use ({root / name})",
        f"choose another --name, or continue it with `rlctl runs resume {name}`",
    )
