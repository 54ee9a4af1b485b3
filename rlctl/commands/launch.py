"""`rlctl launch`: resolve, plan, check, write the run folder, start the driver, follow it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rlctl_hw.types import Hardware, Plan

from rlctl import catalog, launchers, planning, render, rundir
from rlctl.commands import _request, _show, _watch, doctor
from rlctl.commands._request import FREE, FilesOption, RequestArgument
from rlctl.launchers.base import Launcher, Order
from rlctl.render import OutputOption
from rlctl_train.config.errors import PREFLIGHT, UserError
from rlctl_train.config.launch import LaunchConfig
from rlctl_train.config.launch_base import Elsewhere

app = typer.Typer(rich_markup_mode=None)


@app.command(context_settings=FREE)
def launch(
    ctx: typer.Context,
    words: RequestArgument = None,
    files: FilesOption = None,
    name: Annotated[str | None, typer.Option("--name", help="Name of the run; unset: preset and time.")] = None,
    detach: Annotated[bool, typer.Option("--detach", "-d", help="Return once it is started.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show exactly what would be started, write and start nothing.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Start without a question.")] = False,
    local: Annotated[bool, typer.Option("--local", help="On this machine, which is the default.")] = False,
    ray: Annotated[
        str | None, typer.Option("--ray", metavar="ADDRESS", help="On a Ray cluster, by job submission.")
    ] = None,
    slurm: Annotated[bool, typer.Option("--slurm", help="As a Slurm job.")] = False,
    cloud: Annotated[bool, typer.Option("--cloud", help="In a cloud or on Kubernetes, through SkyPilot.")] = False,
    gpus: Annotated[
        str | None, typer.Option("--gpus", metavar="NAME:COUNT", help="Accelerators of one machine, such as H100:8.")
    ] = None,
    nodes: Annotated[int | None, typer.Option("--nodes", min=1, help="How many such machines.")] = None,
    spot: Annotated[bool, typer.Option("--spot", help="Machines that may be taken back, at a lower price.")] = False,
    output: OutputOption = "text",
) -> None:
    """Start a run from a preset or a file, and follow it to its end.

    Example: rlctl launch quickstart trainer.num_steps=20 --name first
    """
    flags = list(_settings(local=local, ray=ray, slurm=slurm, cloud=cloud, gpus=gpus, nodes=nodes, spot=spot))
    options = _request.options_of(ctx)
    # Which machine it is follows from the settings, and what a preset pins from the machine.
    asked = _request.read([*(words or ()), *flags], files, options=options, name_needed=not files, quiet=True)
    hardware = planning.machine_of(asked.resolved.config.launch)
    device = planning.device_key(hardware)
    _say_machine(asked.resolved.config.launch, hardware)
    request = _request.read([*(words or ()), *flags], files, options=options, name_needed=not files, device=device)
    config, root = request.resolved.config, request.settings.runs_root()
    launcher = launchers.load(config.launch.type)
    planning.check_can_train(config)
    plan = planning.plan_here(config, hardware)
    run_name = name or rundir.auto_name(_base(request.name, files))
    rundir.check_name(root, run_name)
    environment = _watch.environment(os.environ, request.settings)
    order = Order(root / run_name, config, plan, Path.cwd(), environment)
    if not isinstance(config.launch, Elsewhere) and not doctor.before_launch(config, plan, hardware, request.settings):
        raise typer.Exit(PREFLIGHT)
    launcher.check(order)
    if dry_run:
        _show_order(order, launcher, output)
        return
    _say_plan(plan)
    doubts = bool(plan.notes or request.resolved.notes) and config.launch.type != "cloud"
    sure = yes or not doubts or render.ask("Start it?", costs=False)
    if not sure or not _watch.may_cost(order, launcher, yes=yes):
        raise typer.Exit(0)
    origin = request.resolved.to_json() | {"asked_for": request.name}
    run = rundir.create(root, run_name, config=config.model_dump(mode="json"), plan=plan.to_json(), origin=origin)
    try:
        rundir.start(run, order)
    except UserError:
        shutil.rmtree(run.files.root)
        raise
    raise typer.Exit(_watch.hand_over(run, launcher, detach=detach))


def _settings(**flags: Any) -> Iterator[str]:
    """Return what the flags set, as settings of `launch`; refuse two places."""
    places = [name for name in ("local", "ray", "slurm", "cloud") if flags[name]]
    if len(places) > 1:
        raise UserError(f"--{places[0]} and --{places[1]} name two places", "give one of them")
    if places:
        yield f"launch.type={places[0]}"
    if flags["ray"]:
        yield f"launch.address={flags['ray']}"
    if flags["gpus"]:
        yield f"launch.machine={flags['gpus']}"
    if flags["nodes"]:
        yield f"launch.nodes={flags['nodes']}"
    if flags["spot"]:
        yield "launch.spot=true"


def _say_machine(config: LaunchConfig, hardware: Hardware) -> None:
    """Say which machine was found where nobody named one and it is not this one."""
    if isinstance(config, Elsewhere) and config.machine is None:
        count = hardware.cpu_cores if hardware.kind == "cpu" else len(hardware.devices)
        found = f"{planning.device_key(hardware) or hardware.kind}:{count}"
        render.note(f"launch.machine is unset: planned for what is there, {found}")


def _show_order(order: Order, launcher: Launcher, output: render.Output) -> None:
    parts = launcher.preview(order)
    config, plan = order.config.model_dump(mode="json"), order.plan.to_json()
    if render.document(output, name=order.name, folder=str(order.root), config=config, plan=plan, submits=parts):
        return
    _show.plan(order.plan)
    for title, text in parts.items():
        render.say(f"\nwould submit, {title}:")
        render.text(text)


def _base(name: str | None, files: list[Path] | None) -> str:
    if name is not None:
        return Path(name).stem if catalog.is_file(name) else name
    return Path(files[-1]).stem if files else "run"


def _say_plan(plan: Plan) -> None:
    """Say in one line what runs where; `rlctl plan` has the reasons."""
    where = "" if plan.num_nodes == 1 else f" on {plan.num_nodes} nodes"
    render.say(
        f"{plan.trainer_devices} trainer and {plan.rollout_devices} rollout {plan.device} device(s){where}, "
        f"{plan.compute_dtype}, {plan.max_tokens_per_micro_batch} tokens per micro-batch"
    )
    for line in plan.notes:
        render.note(line)
