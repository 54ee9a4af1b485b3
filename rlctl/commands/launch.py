"""`rlctl launch`: resolve, plan, check, write the run folder, start the driver, follow it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Annotated

import typer
from rlctl_hw.types import Plan

from rlctl import catalog, launchers, planning, render, rundir
from rlctl.commands import _request, _show, _watch, doctor
from rlctl.commands._request import FREE, FilesOption, RequestArgument
from rlctl.render import OutputOption
from rlctl_train.config.errors import PREFLIGHT, UserError

app = typer.Typer(rich_markup_mode=None)


@app.command(context_settings=FREE)
def launch(
    ctx: typer.Context,
    words: RequestArgument = None,
    files: FilesOption = None,
    name: Annotated[str | None, typer.Option("--name", help="Name of the run; unset: preset and time.")] = None,
    detach: Annotated[bool, typer.Option("--detach", "-d", help="Return once it runs.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would run, check it, write and start nothing.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Start without a question.")] = False,
    local: Annotated[bool, typer.Option("--local", help="Run on this machine, which is the default.")] = False,
    output: OutputOption = "text",
) -> None:
    """Start a run from a preset or a file, and follow it to its end.

    Example: rlctl launch quickstart trainer.num_steps=20 --name first
    """
    hardware = planning.hardware_named(None)
    options, device = _request.options_of(ctx), planning.device_key(hardware)
    request = _request.read(words, files, options=options, name_needed=not files, device=device)
    config, root = request.resolved.config, request.settings.runs_root()
    launcher = launchers.load(launchers.chosen({"local": local}))
    planning.check_can_train(config)
    plan = planning.plan_here(config, hardware)
    run_name = name or rundir.auto_name(_base(request.name, files))
    rundir.check_name(root, run_name)
    if not doctor.before_launch(config, plan, hardware, request.settings):
        raise typer.Exit(PREFLIGHT)
    if dry_run:
        if not render.document(
            output,
            name=run_name,
            folder=str(root / run_name),
            config=config.model_dump(mode="json"),
            plan=plan.to_json(),
        ):
            _show.plan(plan)
            render.say(f"would run {' '.join(launcher.DOOR)} {root / run_name}")
        return
    _say_plan(plan)
    if (plan.notes or request.resolved.notes) and not yes and not render.ask("Start it?"):
        raise typer.Exit(0)
    origin = request.resolved.to_json() | {"asked_for": request.name}
    run = rundir.create(root, run_name, config=config.model_dump(mode="json"), plan=plan.to_json(), origin=origin)
    try:
        process = launcher.submit(run, cwd=Path.cwd(), environment=_watch.environment(os.environ, request.settings))
    except UserError:
        shutil.rmtree(run.files.root)
        raise
    raise typer.Exit(_watch.hand_over(run, process, launcher, detach=detach))


def _base(name: str | None, files: list[Path] | None) -> str:
    if name is not None:
        return Path(name).stem if catalog.is_file(name) else name
    return Path(files[-1]).stem if files else "run"


def _say_plan(plan: Plan) -> None:
    """Say in one line what runs where; `rlctl plan` has the reasons."""
    render.say(
        f"{plan.trainer_devices} trainer and {plan.rollout_devices} rollout {plan.device} device(s), "
        f"{plan.compute_dtype}, {plan.max_tokens_per_micro_batch} tokens per micro-batch"
    )
    for line in plan.notes:
        render.note(line)
