"""`rlctl runs ls|show|logs|stop|resume|diff`: everything that can be asked of runs that exist."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rlctl_hw.placing import num_present
from rlctl_hw.types import Hardware

from rlctl import compare, held, launchers, planning, render, resolve, resuming, rundir, settings
from rlctl.commands import _node_table, _request, _watch
from rlctl.commands._group import HelpfulGroup
from rlctl.commands._request import FREE, HardwareOption
from rlctl.farside.report import reports
from rlctl.follow import Tail, Watch, curves, metric_rows
from rlctl.launchers.base import Order
from rlctl.overrides import Assignment, parse_arguments
from rlctl.render import OutputOption
from rlctl_train.config import RunConfig
from rlctl_train.config.errors import FAILED, UserError
from rlctl_train.config.launch_base import Elsewhere

app = typer.Typer(cls=HelpfulGroup, rich_markup_mode=None, help="List, show, follow, stop, resume and compare runs.")

LOG_POLL_S = 0.2
STACKS = "stacks-*.txt"
STACKS_WITHIN_S = 180.0
"""The driver looks every second, reading all workers' stacks takes a while, and so does the way there and back."""


def _names() -> list[str]:
    return [run.name for run in rundir.every(settings.load().runs_root())]


ResumeArgument = Annotated[
    list[str],
    typer.Argument(
        metavar="RUN [KEY=VALUE]...",
        help="Name or folder of a run, then settings of where and how fast it trains; `null` unsets.",
        autocompletion=_names,
    ),
]
RunArgument = Annotated[str, typer.Argument(metavar="RUN", help="Name or folder of a run.", autocompletion=_names)]


@app.command(name="ls")
def list_runs(output: OutputOption = "text") -> None:
    """List the runs, the latest last."""
    root = settings.load().runs_root()
    found = rundir.every(root)
    for run in found:
        launchers.fetch(run)
    runs = [(run, run.status(), run.summary() or {}) for run in found]
    entries = [{"name": run.name, **asdict(status), "summary": summary} for run, status, summary in runs]
    if render.document(output, runs_dir=str(root), runs=entries):
        return
    if not runs:
        render.say(f"no runs in {root}; `rlctl launch quickstart` makes one")
        return
    rows = [
        (run.name, s.state, s.phase, f"{s.step}/{s.num_steps}", summary.get("val_accuracy_end"), _age(s.updated))
        for run, s, summary in runs
    ]
    render.table(("NAME", "STATE", "PHASE", "STEP", "ACCURACY", "UPDATED"), rows)


@app.command()
def show(name: RunArgument, output: OutputOption = "text") -> None:
    """Show a run: where it stands, its totals, its curves."""
    run = _find(name)
    watch = Watch(run)
    watch.poll()
    progress, summary, points = watch.progress(), run.summary(), curves(run)
    status = progress.status
    lines = metric_rows(run)
    rows = held.against(run.plan(), lines) if lines else ()
    nodes = reports(run)
    if render.document(
        output, name=run.name, folder=str(run.files.root), status=asdict(status), summary=summary, curves=points,
        prediction=held.to_json(rows), doctor=[report.to_json() for report in nodes],
    ):  # fmt: skip
        return
    job = run.job()
    there = [] if job is None or "folder" not in job.facts else [("there", job.facts["folder"])]
    facts: list[tuple[str, Any]] = [
        ("run", run.name),
        ("folder", str(run.files.root)),
        *there,
        ("state", status.state),
        ("phase", status.phase),
    ]
    facts.append(("step", f"{status.step}/{status.num_steps}"))
    if status.notice is not None:
        facts.append(("restarts", f"{status.restarts}, the last: {status.notice}"))
    if status.state not in rundir.ENDED:
        facts += [("reward", progress.reward), ("accuracy", progress.accuracy), ("tokens/s", progress.tokens_per_s)]
        facts.append(("left", None if progress.left_s is None else render.duration(progress.left_s)))
    facts += [(key, value) for key, value in (summary or {}).items() if key != "schema_version"]
    if run.files.hf.is_dir():
        facts.append(("model", str(run.files.hf)))
    if run.files.report.is_file():
        facts.append(("report", str(run.files.report)))
    render.table(("", ""), facts)
    if nodes:
        render.text("")
        _node_table.show(nodes)
    _show_held(rows)
    render.plots(points)
    _watch.advise(run, status)


@app.command()
def logs(
    name: RunArgument,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the run ends.")] = False,
    lines: Annotated[int | None, typer.Option("--lines", "-n", min=0, help="Only the last so many lines.")] = None,
) -> None:
    """Print what the driver of a run printed."""
    run = _find(name)
    tail = Tail(run.files.driver_log)
    seen = tail.lines()
    for line in seen if lines is None else seen[len(seen) - min(lines, len(seen)) :]:
        render.text(line)
    live = follow
    while live:
        live = run.is_live()
        time.sleep(LOG_POLL_S)
        launchers.fetch(run)
        for line in tail.lines():
            render.text(line)


@app.command()
def stop(
    name: RunArgument,
    timeout_s: Annotated[float, typer.Option("--timeout", min=0, help="Longest wait, in seconds.")] = 120.0,
    force: Annotated[bool, typer.Option("--force", help="Kill what has not left in time; nothing is saved.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Give machines of a cloud back without a question.")] = False,
) -> None:
    """Ask a run to save and leave, and wait until it has; with --force, give the machines of a cloud back too."""
    run = _find(name)
    job = run.job()
    if job is not None and job.launcher == "cloud" and force:
        _give_back(run, timeout_s, yes=yes)
        return
    if job is None or launchers.load(job.launcher).status(run).state == "ended":
        render.say(f"run {run.name} is not running: {run.status().state}")
        return
    render.say(f"asked {run.name} to save and leave; waiting up to {render.duration(timeout_s)}")
    if launchers.stop(run, timeout_s):
        launchers.fetch(run)
        render.say(f"{run.name} has ended; `rlctl runs resume {run.name}` continues it")
        return
    if not force:
        hint = f"wait longer with --timeout, or end it without saving: `rlctl runs stop {run.name} --force`"
        raise UserError(
            f"{run.name} has not left after {render.duration(timeout_s)}; it leaves after its step",
            hint,
            exit_code=FAILED,
        )
    launchers.load(job.launcher).kill(run)
    render.say(f"killed {run.name}; `rlctl runs resume {run.name}` continues from its last checkpoint")


def _give_back(run: rundir.Run, timeout_s: float, *, yes: bool) -> None:
    """Stop a run in a cloud if it still goes, and end what it costs, after a question."""
    bucket = run.config()["launch"]["bucket"]
    left = "nothing is kept but what is here" if bucket is None else f"{bucket} keeps its checkpoints"
    if not yes and not render.ask(f"Give the machines of {run.name} back? {left}.", costs=True):
        raise typer.Exit(0)
    if not launchers.stop(run, timeout_s):
        render.say(f"{run.name} has not left after {render.duration(timeout_s)}")
    launchers.fetch(run)
    launchers.load("cloud").kill(run)
    render.say(f"gave the machines of {run.name} back")


@app.command(context_settings=FREE)
def resume(
    ctx: typer.Context,
    words: ResumeArgument,
    hw: HardwareOption = None,
    detach: Annotated[bool, typer.Option("--detach", "-d", help="Return once it runs.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would change, write and start nothing.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Take machines of a cloud without a question.")] = False,
) -> None:
    """Continue a run where it was saved, also on other devices.

    Where they have changed, its plan is made anew. Settings may say where and how fast it trains, not what it learns.

    Example: rlctl runs resume first trainer.num_devices=2
    """
    arguments = parse_arguments(words, _request.options_of(ctx))
    run = _find(arguments.one_name("the name of a run"))
    if run.status().state == "done":
        raise UserError(f"run {run.name!r} is done", f"look at it with `rlctl runs show {run.name}`")
    job = run.job()
    cwd = Path.cwd() if job is None else Path(job.cwd)
    with rundir.idle(run):
        resumed = _replanned(run, cwd, hw, arguments.overrides)
        _say_changes(resumed)
        environment = _watch.environment(os.environ, settings.load())
        order = Order(run.files.root, resumed.config, resumed.plan, cwd, environment)
        launcher = launchers.load(resumed.config.launch.type)
        launcher.check(order)
        if dry_run:
            return
        if not _watch.may_cost(order, launcher, yes=yes):
            raise typer.Exit(0)
        if resumed.changes:
            config, plan = resumed.config.model_dump(mode="json"), resumed.plan.to_json()
            kept = rundir.amend(run, config=config, plan=plan, origin=resumed.origin)
            render.say(f"  what drove it so far is kept in {kept}")
    rundir.start(run, order)
    raise typer.Exit(_watch.hand_over(run, launcher, detach=detach))


@app.command()
def stacks(name: RunArgument) -> None:
    """Print where every thread of a live run is: the driver and all its workers."""
    run = _find(name)
    job = run.job()
    if job is None or not run.is_live():
        raise UserError(f"run {run.name!r} is not running", f"`rlctl runs show {run.name}` says how it stands")
    before = set(run.files.logs.glob(STACKS))
    launchers.load(job.launcher).ask_stacks(run)
    deadline = time.monotonic() + STACKS_WITHIN_S
    while not (made := set(run.files.logs.glob(STACKS)) - before):
        if time.monotonic() > deadline or not run.is_live():
            run.files.stacks_wanted.unlink(missing_ok=True)
            what = f"the driver of {run.name!r} did not answer within {STACKS_WITHIN_S:g} s"
            remedy = "it may wait, start or end; where it runs, `py-spy dump --pid PID` reads it from outside"
            raise UserError(what, remedy, exit_code=FAILED)
        time.sleep(LOG_POLL_S)
        launchers.fetch(run)
    path = max(made)
    render.text(path.read_text().rstrip("\n"))
    render.say(f"kept in {path}")


@app.command()
def diff(first: RunArgument, second: RunArgument, output: OutputOption = "text") -> None:
    """Compare two runs: settings that differ, then totals."""
    runs = [_find(first), _find(second)]
    settings_rows = compare.differences(*(resolve.flat(run.config()) for run in runs))
    totals = [{k: v for k, v in (run.summary() or {}).items() if k != "schema_version"} for run in runs]
    total_rows = [(key, totals[0].get(key), totals[1].get(key)) for key in dict.fromkeys([*totals[0], *totals[1]])]
    names = [run.name for run in runs]
    if render.document(
        output, first=names[0], second=names[1],
        settings=compare.to_json(settings_rows), summary=compare.to_json(total_rows),
    ):  # fmt: skip
        return
    if settings_rows:
        render.table(("SETTING", *names), settings_rows)
    else:
        render.say("the settings are the same")
    if total_rows:
        render.text("")
        render.table(("TOTAL", *names), total_rows)


def _replanned(run: rundir.Run, cwd: Path, hw: str | None, changes: Sequence[Assignment]) -> resuming.Resumption:
    """Return how a run goes on, with relative paths meant from the folder in which it was started."""
    named = None if hw is None else planning.hardware_named(hw)
    with contextlib.chdir(cwd if cwd.is_dir() else Path.cwd()):
        resumed = resuming.replan(run, named, changes)
    if hw is not None and named is not None:
        _check_has(hw, named, resumed.config)
    return resumed


def _check_has(hw: str, named: Hardware, config: RunConfig) -> None:
    """Refuse a machine that the place of the run would not have."""
    launch = config.launch
    if isinstance(launch, Elsewhere):
        way = "leave --hw out, and set launch.machine and launch.nodes"
        raise UserError(f"--hw {hw}: launch.type={launch.type} goes to the machines that launch.machine names", way)
    found = planning.hardware_named(None)
    have, want = num_present(found), num_present(named)
    if config.ray.to_join(os.environ) is None and (found.kind != named.kind or have < want):
        raise UserError(
            f"--hw {hw} asks for {want} x {named.kind}, and this machine has {have} x {found.kind}",
            "leave --hw out to plan for this machine, or name a Ray cluster that has them: ray.address=HOST:PORT",
        )


def _say_changes(resumed: resuming.Resumption) -> None:
    """Say what is other than before, and what each step still learns from."""
    if not resumed.changes:
        render.say("the same machine and settings: its plan stays as it is")
        return
    for line in resumed.changes:
        render.say(f"  {line}")
    render.say(f"  as before: {resuming.global_batch(resumed.config)}")
    for line in resumed.plan.notes:
        render.note(line)


def _show_held(rows: tuple[held.Held, ...]) -> None:
    """Print prediction beside measurement, phase by phase."""
    if not rows:
        return
    render.text("")
    render.table(
        ("PHASE", "PREDICTED GIB", "RANGE", "MEASURED GIB", "PREDICTED S", "RANGE", "MEASURED S"),
        [
            (
                row.phase, _short(row.gib), _range(row.low_gib, row.high_gib), _short(row.measured_gib),
                _short(row.seconds), _range(row.low_s, row.high_s), _short(row.measured_s),
            )
            for row in rows
        ],
    )  # fmt: skip


def _short(value: float | None) -> str | None:
    return None if value is None else f"{value:.3g}"


def _range(low: float | None, high: float | None) -> str | None:
    return None if low is None or high is None else f"{low:.3g} to {high:.3g}"


def _find(name: str) -> rundir.Run:
    """Return a run as it stands now, wherever it writes."""
    run = rundir.find(settings.load().runs_root(), name)
    launchers.fetch(run)
    return run


def _age(updated: Any) -> str:
    return "-" if updated is None else f"{render.duration(max(0.0, time.time() - updated))} ago"
