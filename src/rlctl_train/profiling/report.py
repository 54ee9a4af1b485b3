"""What a profile shows, as pages to look at: one for a run, one for two side by side. Each is a file by itself."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, get_args

from rlctl_train.config.layout import RunFiles
from rlctl_train.profiling import picture
from rlctl_train.profiling.steps import read_steps
from rlctl_train.profiling.summary import compare, compare_operations
from rlctl_train.profiling.traces import Kind
from rlctl_train.telemetry import page

SMALL = 0.005
"""Share of a step below which a row is left out."""


def write_page(files: RunFiles, summary: Mapping[str, Any]) -> Path:
    """Write `profile/report.html`, self-contained, and return where it is."""
    title = f"Profile of {files.root.name}"
    body = [page.header(title, f"{len(summary['steps'])} step(s)")]
    for made, step in zip(summary["steps"], read_steps(files.profile), strict=True):
        body += [f"<h2>Step {made['step']}</h2>\n", page.tiles(_tiles(made)), _advice(made["advice"])]
        body += [_figure("Who works when", picture.lanes(step)), _phases(made), _devices(made), _workers(made)]
        body += [_critical(made), _bubbles(made), _figure("Memory held", picture.memory(step)), _memory(made)]
        body += [*_operation_tables(made), _allocations(made)]
    body.append(_traces(summary["traces"]))
    path = files.profile / "report.html"
    path.write_text(page.document(title, body), encoding="utf-8")
    return path


def write_comparison(files: RunFiles, first: Mapping[str, Any], second: Mapping[str, Any]) -> Path:
    """Write a page that holds another run's profile against the one in `files`, and return where it is."""
    names = [str(one["run"]) for one in (first, second)]
    title, rows = f"{names[0]} against {names[1]}", compare(first, second)
    body = [page.header(title, "median steps"), page.tiles(_step_tiles(names, rows[0]))]
    body.append(_figure("Phases", picture.bars(names, [row for row in rows if row["phase"] != "step"])))
    body.append(page.table("Phases", ("phase", *names, "times"), [_seconds_row("phase", row) for row in rows]))
    changed = compare_operations(first, second)[: 2 * picture.MOST_BARS]
    if changed:
        cells = [_seconds_row("operation", row) for row in changed]
        body.append(page.table("Operations that differ most", ("operation", *names, "times"), cells))
    for name, one in zip(names, (first, second), strict=True):
        body += [f"<h2>{escape(name)}</h2>\n", *(_advice(step["advice"]) for step in one["steps"])]
    path = files.profile / f"against-{names[1]}.html"
    path.write_text(page.document(title, body), encoding="utf-8")
    return path


def _tiles(made: Mapping[str, Any]) -> list[tuple[str, str]]:
    figures = [("a step", f"{made['seconds']:.3g} s"), ("tokens per second", f"{made['tokens_per_s']:,.0f}")]
    figures += [(f"{one['name']} has work", f"{one['at_work']:.0%}") for one in made["devices"][:4]]
    figures += [(f"{one['name']} at work", f"{one['busy']:.0%}") for one in made["workers"][:4]]
    return [*figures, ("two roles at once", f"{made['overlap']:.0%}"), ("nobody at work", f"{made['nobody']:.0%}")]


def _step_tiles(names: Sequence[str], step: Mapping[str, Any]) -> list[tuple[str, str]]:
    times = "" if step["times"] is None else f"{step['times']:.2f}x"
    return [
        *((name, _s(step[key])) for name, key in zip(names, ("first_s", "second_s"), strict=True)),
        ("times", times),
    ]


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
            _s(phase["seconds"]),
            f"{phase['share']:.1%}",
            _s(phase["predicted_s"]),
            "" if phase["tflops"] is None else f"{phase['tflops']:.3g}",
            _share(phase["mfu"]),
            ", ".join(f"{name} {seconds:.3g} s" for name, seconds in phase["busy_s"].items()),
        )
        for phase in made["phases"]
    ]
    rows.append(("between phases", _s(made["between_s"]), f"{made['between_s'] / made['seconds']:.1%}", "", "", "", ""))
    return page.table("Phases", ("phase", "time", "share", "predicted", "TFLOP/s/device", "MFU", "at work"), rows)


def _devices(made: Mapping[str, Any]) -> str:
    rows = [
        (
            one["name"],
            one["host"],
            ", ".join(one["workers"]),
            f"{one['at_work']:.1%}",
            f"{one['idle']:.1%}",
            _share(one["computed"]),
            ", ".join(f"{phase} {share:.0%}" for phase, share in one["computed_by_phase"].items()),
        )
        for one in made["devices"]
    ]
    columns = ("device", "host", "workers", "has work", "idle", "computes", "by phase")
    return page.table("Devices", columns, rows) if rows else ""


def _workers(made: Mapping[str, Any]) -> str:
    rows = [
        (one["name"], one["host"], one["device"], f"{one['busy']:.1%}", f"{one['peak_gib']:.2f}")
        for one in made["workers"]
    ]
    return page.table("Workers", ("worker", "host", "device", "at work", "memory, GiB"), rows)


def _critical(made: Mapping[str, Any]) -> str:
    rows = [
        (one["phase"], one["who"], one["what"], _s(one["seconds"]), f"{one['seconds'] / made['seconds']:.1%}")
        for one in _weighty(made["critical"], made["seconds"])
    ]
    return page.table("Critical path", ("phase", "worker", "what", "time", "share of the step"), rows) if rows else ""


def _bubbles(made: Mapping[str, Any]) -> str:
    rows = [
        (one["device"], one["phase"], one["meanwhile"], _s(one["seconds"]), f"{one['seconds'] / made['seconds']:.1%}")
        for one in _weighty(made["bubbles"], made["seconds"])
    ]
    columns = ("device", "stands still in", "meanwhile", "time", "share of the step")
    return page.table("Bubbles", columns, rows) if rows else ""


def _memory(made: Mapping[str, Any]) -> str:
    rows = [
        (one["phase"], one["part"], _size(one["predicted_gib"]), _size(one["measured_gib"])) for one in made["memory"]
    ]
    columns = ("phase", "part", "predicted", "measured")
    return page.table("Memory of the fullest device", columns, rows) if rows else ""


def _allocations(made: Mapping[str, Any]) -> str:
    rows = [
        (worker, phase, _size(peak["gib"]), asker, _size(gib))
        for worker, by_phase in made["allocations"].items()
        for phase, peak in by_phase.items()
        for asker, gib in peak["by_asker"].items()
    ]
    columns = ("worker", "phase", "most at once", "asked for by", "of it")
    return page.table("Tensors that come and go", columns, rows) if rows else ""


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
    how = (
        "Open them with <code>rlctl profile open RUN STEP/WORKER</code>, or drop them on <code>ui.perfetto.dev</code>:"
    )
    return f"<h2>Traces</h2>\n<p>{how}</p>\n<ul>{names}</ul>\n"


def _weighty(rows: Iterable[Mapping[str, Any]], seconds: float) -> list[Mapping[str, Any]]:
    return [row for row in rows if row["seconds"] > SMALL * seconds]


def _seconds_row(what: str, row: Mapping[str, Any]) -> tuple[str, str, str, str]:
    return row[what], _s(row["first_s"]), _s(row["second_s"]), "" if row["times"] is None else f"{row['times']:.2f}x"


def _s(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds:.3g} s"


def _size(gib: float | None) -> str:
    if gib is None:
        return ""
    return f"{gib:.2f} GiB" if gib >= 0.1 else f"{gib * 1024:.3g} MiB"


def _share(share: float | None) -> str:
    return "" if share is None else f"{share:.1%}"
