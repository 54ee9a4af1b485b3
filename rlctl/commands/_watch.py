"""Following a run that was just started, on a terminal or in a pipe, until its driver ends."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Iterator, Mapping
from typing import Any

from rlctl import planning, render
from rlctl.follow import Tail, Watch
from rlctl.launchers.base import TERMS, Launcher, Order
from rlctl.leaner import leaner
from rlctl.rundir import Run, Status
from rlctl.settings import Settings
from rlctl_train.config import RunConfig
from rlctl_train.config.errors import FAILED, INTERRUPTED, OUT_OF_MEMORY

POLL_S = 0.2
KILL_AFTER_S = 15.0
"""Time the driver has between the second signal and its end by force."""
LOG_LINES = 10


def environment(base: Mapping[str, str], settings: Settings) -> dict[str, str]:
    """Return the driver's environment: this one, and the person's download cache where HF_HOME is not set."""
    found = dict(base)
    if settings.cache_dir is not None:
        found.setdefault("HF_HOME", str(settings.cache_dir.expanduser().resolve()))
    return found


def may_cost(order: Order, launcher: Launcher, *, yes: bool) -> bool:
    """Say what a launch takes and sends, and ask, where it costs money; return whether it may."""
    if order.config.launch.type != "cloud":
        return True
    render.say(launcher.preview(order)[TERMS])
    return yes or render.ask("Start it?", costs=True)


def hand_over(run: Run, launcher: Launcher, *, detach: bool) -> int:
    """Leave the run to itself and say what to do next, or follow it to its end; return the exit code."""
    if detach:
        render.say(f"started {run.name} in {run.files.root}")
        for verb, what in (("show", "how it stands"), ("logs -f", "what it prints"), ("stop", "save and leave")):
            render.say(f"  rlctl runs {verb} {run.name}   # {what}")
        return 0
    with _goes_on_alone(run, launcher):
        code = _follow(run, launcher)
    status = run.status()
    if code != 0 and status.error is None and code != INTERRUPTED:
        render.say(f"the last lines of {run.files.driver_log}:")
        for line in Tail(run.files.driver_log).lines()[-LOG_LINES:]:
            render.say(f"  {line}")
    if status.state == "done":
        _say_done(run)
    elif status.state == "lost" and code == INTERRUPTED:
        render.say(f"stopped before it could save: `rlctl runs resume {run.name}` continues from the last checkpoint")
    else:
        advise(run, status)
    return code


@contextlib.contextmanager
def _goes_on_alone(run: Run, launcher: Launcher) -> Iterator[None]:
    """Say so when following ends before the driver does, whatever the reason."""
    try:
        yield
    finally:
        if launcher.status(run).state != "ended":
            render.say(f"{run.name} goes on without this view; `rlctl runs stop {run.name}` ends it")


def advise(run: Run, status: Status) -> None:
    """Say the way on for a run that ended before it was done."""
    if status.state == "stopped":
        render.say(f"saved: `rlctl runs resume {run.name}` continues at step {status.step}")
    elif status.error is not None:
        render.error(f"run {run.name} failed: {status.error['what']}", status.error["remedy"])
        if status.error.get("kind") == OUT_OF_MEMORY:
            _say_leaner(run)
    elif status.state in ("lost", "failed"):
        what = f"the driver of {run.name} is gone without a word (killed, or out of memory)"
        render.error(what, f"read {run.files.driver_log}, then continue with `rlctl runs resume {run.name}`")


def _say_leaner(run: Run) -> None:
    """Name the nearest settings that need less memory."""
    config = RunConfig.model_validate(run.config())
    found = leaner(planning.workload_of(config), planning.machine_of(config.launch), run.plan())
    if found is None:
        render.say("no setting that the planner knows needs less: a larger device, more of them, or a smaller model")
        return
    settings = " ".join(f"{key}={str(value).lower()}" for key, value in found.settings.items())
    render.say(f"needs less, as planned for {found.share:.0%} of the memory:")
    render.say(f"  rlctl runs resume {run.name} {settings}")


def _say_done(run: Run) -> None:
    summary = run.summary() or {}
    before, after, seconds = (summary.get(key) for key in ("val_accuracy_start", "val_accuracy_end", "wall_s"))
    accuracy = "" if None in (before, after) else f": held-out accuracy {before:.3g} -> {after:.3g}"
    took = "" if seconds is None else f" in {render.duration(seconds)}"
    render.say(f"done{took}{accuracy}")
    if run.files.report.is_file():
        render.say(f"  {run.files.report}   # curves and samples, for a browser")
    render.say(f"  rlctl runs show {run.name}   # the same in this terminal")


def _follow(run: Run, launcher: Launcher) -> int:
    signals = _Signals(run, launcher)
    watch, view = Watch(run), render.live_view(run.name)
    standing, ask_at = launcher.status(run), 0.0
    with signals.caught(), view or contextlib.nullcontext():
        while True:
            if time.monotonic() >= ask_at:
                before, standing = standing, launcher.status(run)
                ask_at = time.monotonic() + launcher.poll_s
                if standing.state == "unknown" and before != standing:
                    (view.say if view else render.say)(f"{standing.detail}; asking again")
                launcher.fetch(run)
            ended = standing.state == "ended"
            rows = watch.poll()
            progress = watch.progress()
            if view is not None:
                view.show(progress)
            else:
                for row in rows:
                    render.step_line(row, progress.status.num_steps)
            if ended:
                break
            for line in (watch.news(progress.status), signals.act()):
                if line is not None:
                    (view.say if view else render.say)(line)
            time.sleep(POLL_S)
    code = standing.exit_code if standing.exit_code is not None else progress.status.exit_code
    if code is not None and code >= 0:
        return code
    return INTERRUPTED if signals.count else FAILED


class _Signals:
    """Ctrl-C and SIGTERM of the front desk, handed to the driver: once to save and leave, again to leave at once."""

    def __init__(self, run: Run, launcher: Launcher) -> None:
        self._run, self._launcher = run, launcher
        self.count = 0
        self._passed_on = 0
        self._kill_at: float | None = None

    @contextlib.contextmanager
    def caught(self) -> Iterator[None]:
        """Take over the signals for a while."""
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        before = {number: signal.signal(number, self._note) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def act(self) -> str | None:
        """Pass on what arrived since the last call; return what to tell the person."""
        line = None
        if self.count > self._passed_on:
            self._passed_on += 1
            self._launcher.interrupt(self._run)
            if self._passed_on == 1:
                line = "saving; press again to kill"
            elif self._kill_at is None:
                self._kill_at = time.monotonic() + KILL_AFTER_S
        if self._kill_at is not None and time.monotonic() > self._kill_at:
            self._launcher.kill(self._run)
            self._kill_at = time.monotonic() + KILL_AFTER_S  # a launcher far away takes its time
        return line

    def _note(self, number: int, frame: Any) -> None:
        self.count += 1
