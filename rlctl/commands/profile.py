"""`rlctl profile NAME` records a few steps of a run and shows where their time went; `report` shows it again."""

from __future__ import annotations

import json
import re
import socket
from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from rlctl import catalog, held, launchers, render, rundir, settings
from rlctl.commands import _request, launch
from rlctl.commands._group import BareName
from rlctl.commands._request import FREE, FilesOption, RequestArgument
from rlctl.follow import metric_rows
from rlctl.overrides import parse_arguments
from rlctl.perfetto import HOST, PORT, TraceServer
from rlctl.render import OutputOption
from rlctl.rundir import Run, read_json
from rlctl_train.config.errors import UserError
from rlctl_train.config.profile import Profiled, Tool

app = typer.Typer(
    cls=BareName,
    rich_markup_mode=None,
    subcommand_metavar="NAME [KEY=VALUE]... | COMMAND",
    help="Show where time and memory of a step go. A bare NAME runs that preset, file or run for a few steps.",
)

BOUNDED = (
    "trainer.optim.warmup_steps=0",
    "validation.every_steps=0",
    "validation.max_prompts=1",
    "checkpoint.every_steps=0",
    "checkpoint.export_hf=false",
    "checkpoint.remote=null",
    "telemetry.trackers=[]",
)
"""A profile learns nothing that is worth keeping."""
RunArgument = Annotated[str, typer.Argument(metavar="RUN", help="Name or folder of a profiled run.")]


@app.callback()
def main() -> None:
    """Hold the verbs."""


@app.command(name=BareName.bare, hidden=True, context_settings=FREE)
def profile(
    ctx: typer.Context,
    words: RequestArgument = None,
    files: FilesOption = None,
    steps: Annotated[
        str, typer.Option("--steps", metavar="FIRST[:LAST]", help="Steps that are recorded; the run ends after them.")
    ] = "3",
    roles: Annotated[
        str | None, typer.Option("--roles", help=f"Recorded by the tool, by comma: {', '.join(get_args(Profiled))}.")
    ] = None,
    ranks: Annotated[
        str, typer.Option("--ranks", help="Ranks of each role recorded by the tool, by comma, or `all`.")
    ] = "0",
    tool: Annotated[str, typer.Option("--tool", help=f"One of {', '.join(get_args(Tool))}.")] = "auto",
    name: Annotated[
        str | None, typer.Option("--name", help="Name of the run; unset: preset, `profile` and time.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show exactly what would be started.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Start without a question.")] = False,
    local: Annotated[bool, typer.Option("--local", help="On this machine, which is the default.")] = False,
    ray: Annotated[str | None, typer.Option("--ray", metavar="ADDRESS", help="On a Ray cluster.")] = None,
    slurm: Annotated[bool, typer.Option("--slurm", help="As a Slurm job.")] = False,
    cloud: Annotated[bool, typer.Option("--cloud", help="In a cloud or on Kubernetes, through SkyPilot.")] = False,
    gpus: Annotated[
        str | None, typer.Option("--gpus", metavar="NAME:COUNT", help="Accelerators of one machine.")
    ] = None,
    nodes: Annotated[int | None, typer.Option("--nodes", min=1, help="How many such machines.")] = None,
    output: OutputOption = "text",
) -> None:
    """Run a preset, a file, or a run's settings again for a few steps, and say where the time of the last ones went."""
    first, last = _steps(steps)
    asked, files = _run_or_preset(list(words or ()), files)
    given = [
        f"trainer.num_steps={last}",
        *BOUNDED,
        f"profile.tool={tool}",
        f"profile.first_step={first}",
        f"profile.last_step={last}",
        f"profile.roles={json.dumps(_parts(roles))}",
        f"profile.ranks={json.dumps([] if ranks == 'all' else _numbers(ranks))}",
    ]
    base = parse_arguments(asked, _request.options_of(ctx)).optional_name() or (
        files[-1].parent.name if files else "run"
    )
    run_name = name or rundir.auto_name(f"{Path(base).stem}-profile")
    # What was asked for in words comes last, and so prevails.
    place = {"local": local, "ray": ray, "slurm": slurm, "cloud": cloud, "gpus": gpus, "nodes": nodes}
    code = _launched(
        ctx, [*_name_first(asked, given)], files, name=run_name, dry_run=dry_run, yes=yes, output=output, **place
    )
    if dry_run or code:
        raise typer.Exit(code)
    _show(rundir.find(settings.load().runs_root(), run_name), output)


@app.command()
def report(
    name: RunArgument,
    compare: Annotated[
        str | None, typer.Option("--compare", metavar="RUN", help="A profile to hold it against.")
    ] = None,
    output: OutputOption = "text",
) -> None:
    """Show the profile of a run: phases, workers, operations, memory, and what stands out."""
    root = settings.load().runs_root()
    run = rundir.find(root, name)
    launchers.fetch(run)
    if compare is None:
        _show(run, output)
        return
    other = rundir.find(root, compare)
    from rlctl_train.profiling.report import write_comparison
    from rlctl_train.profiling.summary import compare as side_by_side

    first, second = _summary(run), _summary(other)
    rows, page = side_by_side(first, second), write_comparison(run.files, first, second)
    if render.document(output, first=run.name, second=other.name, phases=rows, page=str(page)):
        return
    columns = ("PHASE", run.name.upper(), other.name.upper(), "TIMES")
    render.table(
        columns, [(one["phase"], _s(one["first_s"]), _s(one["second_s"]), _times(one["times"])) for one in rows]
    )
    render.say(f"\n{page}   # the same with pictures, for a browser")


@app.command(name="open")
def open_trace(
    name: RunArgument,
    trace: Annotated[
        str | None,
        typer.Argument(metavar="TRACE", help="Such as 3/actor-0 or ray_timeline; unset: a trace of the last step."),
    ] = None,
) -> None:
    """Serve a trace to Perfetto in a browser, once; on a machine behind ssh, forward its port with -L."""
    from rlctl_train.profiling.traces import TRACE

    run = rundir.find(settings.load().runs_root(), name)
    traces = {_trace_name(path): path for path in sorted(run.files.profile.rglob(f"*{TRACE}"), reverse=True)}
    if not traces or (trace is not None and trace not in traces):
        what = f"{run.name!r} has no trace" + (f" {trace!r}" if trace else "")
        raise UserError(what, f"name one of: {', '.join(traces)}" if traces else "record some with --tool torch")
    server = TraceServer(traces[trace] if trace is not None else next(iter(traces.values())))
    render.text(server.address)
    render.say(f"open it in a browser; from another machine, first: ssh -L {PORT}:{HOST}:{PORT} {socket.gethostname()}")
    server.serve()


def _trace_name(path: Path) -> str:
    """Return what a person calls a trace: `3/actor-0`, or `ray_timeline`, which is of all steps."""
    name, step = path.name.partition(".")[0], path.parent.name.removeprefix("step_")
    return f"{int(step)}/{name}" if step.isdigit() else name


def _show(run: Run, output: render.Output) -> None:
    from rlctl_train.profiling.report import write_page

    summary = _summary(run)
    page = write_page(run.files, summary)
    if render.document(output, page=str(page), **summary):
        return
    for step in summary["steps"]:
        render.heading(f"step {step['step']}: {step['seconds']:.3g} s, {step['tokens_per_s']:,.0f} tokens/s")
        rows = [
            (one["name"], _s(one["seconds"]), f"{one['share']:.1%}", _s(one["predicted_s"]), _percent(one["mfu"]))
            for one in [*step["phases"], {"name": "between", **_rest(step)}]
        ]
        render.table(("PHASE", "TIME", "SHARE", "PREDICTED", "MFU"), rows)
        render.table(
            ("DEVICE", "HAS WORK", "COMPUTES", "WORKERS"),
            [
                (one["name"], _percent(one["at_work"]), _percent(one["computed"]), " ".join(one["workers"]))
                for one in step["devices"]
            ],
        )
        render.table(("WORKER", "AT WORK"), [(one["name"], _percent(one["busy"])) for one in step["workers"]])
        for sentence in step["advice"]:
            render.text(f"- {sentence}")
    render.say(f"\n{page}   # the same with pictures, for a browser")
    for reason in [*summary["unread"], *_left(run)]:
        render.note(reason)
    for trace in summary["traces"]:
        render.say(f"rlctl profile open {run.name} {_trace_name(Path(trace))}   # {trace} in Perfetto")


def _left(run: Run) -> list[str]:
    """Say what did not come home from other machines, and how to bring it."""
    if not run.files.left.is_file():
        return []
    left, job = read_json(run.files.left), run.job()
    host = job.id if job is not None and job.launcher == "cloud" else left["host"]
    names = ", ".join(f"{name} ({size / 2**20:.0f} MiB)" for name, size in left["files"].items())
    way = f"rsync -a {host}:{left['folder']}/profile/ {run.files.profile}/"
    return [f"too large to come along, and still there: {names}; `{way}` brings it"]


def _summary(run: Run) -> dict[str, Any]:
    from rlctl_train.profiling.summary import summarize

    plan = run.plan()
    rows = held.against(plan, metric_rows(run))
    predicted = {held.TIMINGS[row.phase]: row.seconds for row in rows if row.phase in held.TIMINGS and row.seconds}
    return summarize(run.files, predicted, plan.memory)


def _rest(step: dict[str, Any]) -> dict[str, Any]:
    return {
        "seconds": step["between_s"],
        "share": step["between_s"] / step["seconds"],
        "predicted_s": None,
        "mfu": None,
    }


def _launched(ctx: typer.Context, words: list[str], files: list[Path] | None, **options: Any) -> int:
    """Launch and follow a run; return the exit code."""
    try:
        launch.launch(ctx, words, files, **options)
    except typer.Exit as left:
        return left.exit_code
    return 0


def _name_first(asked: list[str], given: list[str]) -> list[str]:
    """Put settings of ours between the name and what was asked for in words."""
    named = bool(asked) and "=" not in asked[0] and not asked[0].startswith("-")
    return [*asked[:named], *given, *asked[named:]]


def _run_or_preset(words: list[str], files: list[Path] | None) -> tuple[list[str], list[Path] | None]:
    """Take the name of a run for its settings; presets and files come first."""
    if not words or "=" in words[0] or words[0].startswith("-") or files:
        return words, files
    name = words[0]
    if name in catalog.names() or catalog.is_file(name):
        return words, files
    try:
        run = rundir.find(settings.load().runs_root(), name)
    except UserError:
        return words, files  # the catalogue has the better spelling to offer
    return words[1:], [run.files.config]


def _steps(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+)(?::(\d+))?", text)
    if found is None:
        raise UserError(f"--steps {text!r} is neither a step nor FIRST:LAST", "give for example --steps 3:5")
    first = int(found[1])
    return first, int(found[2] or first)


def _numbers(text: str) -> list[int]:
    if not re.fullmatch(r"\d+(,\d+)*", text):
        raise UserError(f"--ranks {text!r} is not a list of ranks", "give for example --ranks 0,1 or --ranks all")
    return [int(part) for part in text.split(",")]


def _parts(text: str | None) -> list[str]:
    return [part.strip() for part in (text or "").split(",") if part.strip()]


def _s(seconds: float | None) -> str | None:
    return None if seconds is None else f"{seconds:.3g} s"


def _percent(share: float | None) -> str | None:
    return None if share is None else f"{share:.1%}"


def _times(value: float | None) -> str | None:
    return None if value is None else f"{value:.2f}x"
