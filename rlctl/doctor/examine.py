"""Running checks side by side, each under its time limit; what a check answers comes back without secrets."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from queue import Empty, Queue
from threading import Thread

from rlctl import redact
from rlctl.doctor.case import Case
from rlctl.doctor.finding import Finding, fail, verdict, warn
from rlctl.doctor.registry import CHECKS, Check


def examine(case: Case, checks: Sequence[Check] = CHECKS) -> list[Finding]:
    """Run the checks and return their findings in the same order; none raises, none outlasts its limit."""
    running = [(check, _start(check, case)) for check in checks]
    start = time.monotonic()
    return [_clean(_answer(check, queue, start), case) for check, queue in running]


def _start(check: Check, case: Case) -> Queue[Finding]:
    queue: Queue[Finding] = Queue()
    # A daemon, because a driver that hangs inside a call can be neither stopped nor waited for.
    Thread(target=lambda: queue.put(_run(check, case)), daemon=True, name=f"doctor-{check.name}").start()
    return queue


def _run(check: Check, case: Case) -> Finding:
    try:
        return check.load()(case)
    # A machine in a bad state may answer anything; a check that stumbles over it must not stop the others.
    except Exception as error:
        what = f"could not be examined: {type(error).__name__}: {error}"
        return verdict(check.name, [warn(what, "report this with the output of `rlctl env`")], "")


def _answer(check: Check, queue: Queue[Finding], start: float) -> Finding:
    try:
        return queue.get(timeout=max(0.0, start + check.limit_s - time.monotonic()))
    except Empty:
        what = f"gave no answer within its limit of {check.limit_s:g} s"
        make = fail if check.on_timeout == "fail" else warn
        return verdict(check.name, [make(what, "a driver, disk or name server hangs: see `dmesg`")], "")


def _clean(finding: Finding, case: Case) -> Finding:
    def clean(text: str) -> str:
        return redact.message(" ".join(text.split()), case.host.env)

    problems = tuple(replace(p, what=clean(p.what), remedy=clean(p.remedy)) for p in finding.problems)
    return replace(finding, what=clean(finding.what), problems=problems)
