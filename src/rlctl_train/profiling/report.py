"""What a profile shows: one record for programs, one page to look at. Reads a run folder; needs no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from statistics import median
from typing import Any, get_args

from rlctl_train.config.layout import RunFiles
from rlctl_train.profiling import picture
from rlctl_train.profiling.advice import advise
from rlctl_train.profiling.devices import read_devices
from rlctl_train.profiling.steps import StepProfile, read_steps
from rlctl_train.profiling.traces import TRACE, Event, Kind, Operation, operations
from rlctl_train.telemetry import page
from rlctl_train.telemetry.metrics import read_metrics

MOST = 8
"""Operations named per worker and phase."""
PERFETTO = "https://ui.perfetto.dev"


def summarize(files: RunFiles, predicted_s: Mapping[str, float]) -> dict[str, Any]:
    """Return everything the profile of a run says; `predicted_s` are the planner's seconds by phase, where it has any.

    Seconds and shares of each phase are those of the driver; `busy_s` of each worker are what it was at work in it.
    """
    profiled = read_steps(files.profile)
    workers = sorted({(worker.role, worker.rank) for step in profiled for worker in step.workers})
    found = read_devices(files.profile, (f"{role}-{rank}" for role, rank in workers))
    metrics = {line["step"]: line for line in read_metrics(files.metrics) if line.get("phase") == "train"}
    steps = []
    for step in profiled:
        traced = {one.name: _operations(step, found.events[f"{one.role}-{one.rank}"]) for one in step.workers}
        measured = metrics.get(step.step, {})
        steps.append(
            {
                "step": step.step,
                "seconds": step.seconds,
                "between_s": step.between_s,
                "tokens_per_s": measured.get("perf/total_num_tokens", 0.0) / step.seconds,
                "overlap": step.overlap,
                "nobody": step.nobody,
                "phases": [
                    {
                        "name": phase.name,
                        "seconds": phase.seconds,
                        "share": phase.share,
                        "predicted_s": predicted_s.get(phase.name),
                        "busy_s": phase.busy_s,
                    }
                    for phase in step.phases
                ],
                "workers": [
                    {
                        "name": worker.name,
                        "host": worker.host,
                        "device": worker.device,
                        "busy": step.busy_share(worker),
                        "peak_gib": max((one.bytes_after for one in worker.ranges), default=0) / 2**30,
                    }
                    for worker in step.workers
                ],
                "operations": {
                    name: {phase: [vars(one) for one in found[:MOST]] for phase, found in by_phase.items()}
                    for name, by_phase in traced.items()
                    if by_phase
                },
                "kinds": {
                    name: {phase: _by_kind(found) for phase, found in by_phase.items()}
                    for name, by_phase in traced.items()
                    if by_phase
                },
                "advice": advise(step, measured, predicted_s, _communication(traced)),
            }
        )
    traces = sorted(str(file) for file in files.profile.rglob(f"*{TRACE}"))
    return {"run": files.root.name, "steps": steps, "traces": traces, "unread": found.unread}


def write_page(files: RunFiles, summary: Mapping[str, Any]) -> Path:
    """Write `profile/report.html`, self-contained, and return where it is."""
    title = f"Profile of {files.root.name}"
    body = [page.header(title, f"{len(summary['steps'])} step(s)")]
    for made, step in zip(summary["steps"], read_steps(files.profile), strict=True):
        body += [f"<h2>Step {made['step']}</h2>\n", page.tiles(_tiles(made)), _advice(made["advice"])]
        body += [_figure("Who works when", picture.lanes(step)), _phases(made), _workers(made)]
        body += [_figure("Memory held", picture.memory(step)), *_operation_tables(made)]
    body.append(_traces(summary["traces"]))
    path = files.profile / "report.html"
    path.write_text(page.document(title, body), encoding="utf-8")
    return path


def compare(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the median step of two profiles side by side, phase by phase; `times` is the second over the first."""
    sides = [_phase_medians(one["steps"]) for one in (first, second)]
    rows = []
    for name in dict.fromkeys([*sides[0], *sides[1]]):
        before, after = (side.get(name) for side in sides)
        rows.append(
            {"phase": name, "first_s": before, "second_s": after, "times": after / before if before and after else None}
        )
    return rows


def _phase_medians(steps: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the median seconds of every phase, and of the whole step."""
    found: dict[str, list[float]] = {}
    for step in steps:
        found.setdefault("step", []).append(step["seconds"])
        for phase in step["phases"]:
            found.setdefault(phase["name"], []).append(phase["seconds"])
    return {name: median(seconds) for name, seconds in found.items()}


def _operations(step: StepProfile, events: Sequence[Event]) -> dict[str, list[Operation]]:
    """Return what a worker's events are in a step, by phase; nothing where no tool recorded it."""
    start, end = step.span
    inside = [event for event in events if start <= event.start_ns < end]
    found = {phase.name: operations(inside, phase.spans) for phase in step.phases}
    return {name: made for name, made in found.items() if made}


def _by_kind(made: Sequence[Operation]) -> dict[str, float]:
    """Return the seconds of operations by what they are for."""
    return {kind: sum(one.seconds for one in made if one.kind == kind) for kind in get_args(Kind)}


def _communication(traced: Mapping[str, Mapping[str, list[Operation]]]) -> dict[str, float]:
    rates = {}
    for name, by_phase in traced.items():
        for phase, made in by_phase.items():
            seconds = _by_kind(made)
            if total := sum(seconds.values()):
                rates[f"{name} in {phase}"] = seconds["communication"] / total
    return rates


def _tiles(made: Mapping[str, Any]) -> list[tuple[str, str]]:
    figures = [("a step", f"{made['seconds']:.3g} s"), ("tokens per second", f"{made['tokens_per_s']:,.0f}")]
    figures += [(f"{one['name']} at work", f"{one['busy']:.0%}") for one in made["workers"][:6]]
    return [*figures, ("two roles at once", f"{made['overlap']:.0%}"), ("nobody at work", f"{made['nobody']:.0%}")]


def _advice(sentences: Sequence[str]) -> str:
    if not sentences:
        return ""
    lines = "".join(f"<li>{escape(sentence[0].upper() + sentence[1:])}.</li>" for sentence in sentences)
    return f'<ul class="card" style="padding: 14px 34px; margin: 12px 0 0">{lines}</ul>\n'


def _figure(title: str, svg: str) -> str:
    return (
        f'<h2>{title}</h2>\n<figure class="card chart" role="img" aria-label="{title}">{svg}</figure>\n' if svg else ""
    )


def _phases(made: Mapping[str, Any]) -> str:
    rows = [
        (
            phase["name"],
            f"{phase['seconds']:.3g} s",
            f"{phase['share']:.1%}",
            "" if phase["predicted_s"] is None else f"{phase['predicted_s']:.3g} s",
            ", ".join(f"{name} {seconds:.3g} s" for name, seconds in phase["busy_s"].items()),
        )
        for phase in made["phases"]
    ]
    rows.append(("between phases", f"{made['between_s']:.3g} s", f"{made['between_s'] / made['seconds']:.1%}", "", ""))
    return page.table("Phases", ("phase", "time", "share", "predicted", "at work"), rows)


def _workers(made: Mapping[str, Any]) -> str:
    rows = [
        (one["name"], one["host"], one["device"], f"{one['busy']:.1%}", f"{one['peak_gib']:.2f}")
        for one in made["workers"]
    ]
    return page.table("Workers", ("worker", "host", "device", "at work", "memory, GiB"), rows)


def _operation_tables(made: Mapping[str, Any]) -> list[str]:
    kinds = [
        (worker, phase, *(f"{seconds[kind] * 1e3:,.1f} ms" for kind in get_args(Kind)))
        for worker, by_phase in made["kinds"].items()
        for phase, seconds in by_phase.items()
    ]
    tables = [page.table("What devices do", ("worker", "phase", *get_args(Kind)), kinds)] if kinds else []
    for worker, by_phase in made["operations"].items():
        rows = [
            (phase, one["name"], one["kind"], f"{one['calls']:,}", f"{one['seconds'] * 1e3:,.1f} ms")
            for phase, found in by_phase.items()
            for one in found
        ]
        tables.append(page.table(f"Operations of {worker}", ("phase", "operation", "kind", "calls", "own time"), rows))
    return tables


def _traces(traces: Sequence[str]) -> str:
    if not traces:
        return ""
    names = "".join(f"<li><code>{escape(one)}</code></li>" for one in traces)
    return f"<h2>Traces</h2>\n<p>Open them at <code>{PERFETTO}</code>:</p>\n<ul>{names}</ul>\n"
