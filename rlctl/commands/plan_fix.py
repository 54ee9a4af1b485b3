"""`rlctl plan NAME --fix`: the smallest change that makes a run fit, as a diff, with its gain and its cost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rlctl_hw.plan import plan
from rlctl_hw.remedies import Remedy, remedies
from rlctl_hw.timing import step_seconds
from rlctl_hw.types import DoesNotFit, Hardware, Plan, Workload

from rlctl import planning, render
from rlctl.commands._request import Request
from rlctl.render import Output
from rlctl_train.config.errors import DOES_NOT_FIT, UserError

ENOUGH = 64
"""Times the device's memory: what the run would take if memory were no matter is predicted with so much."""


def fix(request: Request, asked: Workload, hardware: Hardware, *, write: Path | None, output: Output) -> None:
    """Show the smallest change of settings that fits, and the others; write it to a file, if asked."""
    refusal = _refusal(asked, hardware)
    if refusal is None:
        if not render.document(output, name=request.name, fits=True, changes=[]):
            render.say("it fits as it is: there is nothing to fix")
        return
    found = [remedy for remedy in remedies(asked, hardware) if remedy.settings]
    if not found:
        planning.plan_for(asked, hardware)
    changes = [_change(remedy, refusal, asked, hardware) for remedy in found]
    if write is not None:
        _write(write, found[0].settings, request.name)
    if render.document(output, name=request.name, fits=False, problem=refusal.what, changes=changes):
        return
    render.say(f"as asked: {refusal.what}\n")
    for remedy, change in zip(found, changes, strict=True):
        for key, value in remedy.settings.items():
            render.text(f"-{key} = {_shown(_current(request, key))}")
            render.text(f"+{key} = {_shown(value)}")
        render.text(f" {change['words']}\n")
    first = " ".join(f"{key}={_shown(value)}" for key, value in found[0].settings.items())
    render.say(f"the first is the smallest; take it with: {first}")
    if write is not None:
        render.say(f"wrote {write}; put it on top with `-c {write}`")


def _refusal(asked: Workload, hardware: Hardware) -> DoesNotFit | None:
    try:
        plan(asked, hardware, with_remedies=False)
    except DoesNotFit as refusal:
        return refusal
    return None


def _change(remedy: Remedy, refusal: DoesNotFit, asked: Workload, hardware: Hardware) -> dict[str, Any]:
    """Return one change with the memory it saves where it lacked, and the time it costs, as plain values."""
    fixed = plan(remedy.workload, remedy.hardware)
    after = next((band.gib for band in fixed.bands if band.phase == refusal.phase), None)
    saved = None if refusal.need_gib is None or after is None else refusal.need_gib - after
    lost = _lost_s(asked, hardware, fixed)
    words = [f"saves {saved:.1f} GiB in {refusal.phase}"] if saved is not None else ["fits"]
    if lost is not None:
        words.append(f"costs {lost:+.3g} s a step against a device with memory enough")
    return {"settings": remedy.settings, "saved_gib": saved, "lost_s": lost, "words": ", ".join(words)}


def _lost_s(asked: Workload, hardware: Hardware, fixed: Plan) -> float | None:
    """Return how much longer a step takes than if memory were no matter; None where no time is predicted."""
    after = step_seconds(fixed)
    try:
        before = step_seconds(plan(asked, planning.with_memory(hardware, ENOUGH), with_remedies=False))
    except DoesNotFit:
        return None
    return None if before is None or after is None else after[0] - before[0]


def _current(request: Request, key: str) -> Any:
    origin = request.resolved.origins.get(key)
    return None if origin is None else origin.value


def _shown(value: Any) -> str:
    return "null" if value is None else render.cell(value)


def _write(file: Path, settings: dict[str, Any], name: str | None) -> None:
    """Write settings as TOML with dotted keys; the word null unsets."""
    if file.exists():
        raise UserError(f"{file} exists", "choose another name", exit_code=DOES_NOT_FIT)
    lines = [f"# Put on top of {name}: the smallest change that fits, by `rlctl plan --fix`.", ""]
    lines += [f"{key} = {json.dumps('null' if value is None else value)}" for key, value in settings.items()]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
