"""`rlctl calibrate`: measure a few short steps on this machine and correct the planner's constants by them."""

from __future__ import annotations

import os
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rlctl_hw.probe import survey
from rlctl_hw.types import Corrections, Hardware

from rlctl import calibration, held, launchers, machine, planning, render, rundir
from rlctl.commands import _request, _watch, env
from rlctl.commands._request import FREE, FilesOption, Request, RequestArgument
from rlctl.follow import Tail, metric_rows
from rlctl.launchers.base import Order
from rlctl.render import OutputOption
from rlctl_train.config import RunConfig
from rlctl_train.config.errors import FAILED, UserError

app = typer.Typer(rich_markup_mode=None)

DEFAULT = "quickstart"
LOG_LINES = 5


@app.command(context_settings=FREE)
def calibrate(
    ctx: typer.Context,
    words: RequestArgument = None,
    files: FilesOption = None,
    steps: Annotated[int, typer.Option("--steps", min=2, help="Steps of the short run.")] = 5,
    forget: Annotated[bool, typer.Option("--forget", help="Remove what was measured on this machine.")] = False,
    output: OutputOption = "text",
) -> None:
    """Measure this machine by a short run (of `quickstart`, or the run named) and correct its plans by it.

    The numbers are kept per machine in the settings folder; plans show them as `measured`.
    """
    hardware = survey()
    if forget:
        file = machine.file_of(hardware)
        file.unlink(missing_ok=True)
        render.say(f"plans for this machine use the catalogue's and assumed constants again ({file} is gone)")
        return
    device = planning.device_key(hardware)
    given = words or ([] if files else [DEFAULT])
    options = _request.options_of(ctx)
    request = _request.read(given, files, options=options, name_needed=not files, device=device)
    planning.check_can_train(request.resolved.config)
    corrections, rows = _measure(request, hardware, steps)
    file = machine.keep(hardware, corrections, _evidence(request, hardware, steps, rows))
    if render.document(output, file=str(file), corrections=asdict(corrections), phases=held.to_json(rows)):
        return
    _show(corrections)
    render.say(f"\nkept in {file}; `rlctl plan` uses it on this machine, `rlctl calibrate --forget` removes it")


def _measure(request: Request, hardware: Hardware, steps: int) -> tuple[Corrections, tuple[held.Held, ...]]:
    config = calibration.shortened(request.resolved.config, steps)
    threads = planning.plan_here(config, hardware).threads_per_worker
    render.say("measuring matrix products and memory")
    rates = calibration.measured_rates(hardware.kind, threads, os.environ)
    known = replace(hardware, corrections=rates)
    plan = planning.plan_here(config, known)
    render.say(f"running {steps} steps")
    with tempfile.TemporaryDirectory(prefix="rlctl-calibrate-") as folder:
        run = rundir.create(
            Path(folder), "short", config=config.model_dump(mode="json"), plan=plan.to_json(), origin={}
        )
        rows = held.against(plan, _lines(run, config, request))
    return calibration.corrected(rates, plan, rows), rows


def _lines(run: rundir.Run, config: RunConfig, request: Request) -> list[Any]:
    """Run it, and return its metric rows."""
    launcher = launchers.load("local")
    environment = _watch.environment(os.environ, request.settings)
    rundir.start(run, Order(run.files.root, config, run.plan(), Path.cwd(), environment))
    try:
        while (standing := launcher.status(run)).state != "ended":
            time.sleep(launcher.poll_s)
    except KeyboardInterrupt:
        launcher.kill(run)
        raise
    if code := standing.exit_code:
        for line in Tail(run.files.driver_log).lines()[-LOG_LINES:]:
            render.say(f"  {line}")
        error = run.status().error or {"what": f"the driver ended with code {code}", "remedy": "see the lines above"}
        raise UserError(f"the short run failed: {error['what']}", error["remedy"], exit_code=FAILED)
    return list(metric_rows(run))


def _evidence(request: Request, hardware: Hardware, steps: int, rows: tuple[held.Held, ...]) -> dict[str, Any]:
    return {
        "run": request.name,
        "num_steps": steps,
        "device": hardware.devices[0].name,
        "num_devices": len(hardware.devices),
        "versions": env.versions(),
        "phases": held.to_json(rows),
    }


def _show(corrections: Corrections) -> None:
    rows: list[tuple[str, Any, str]] = [
        ("matrix products", corrections.matmul_tflops, "TFLOP/s a device"),
        ("memory", corrections.bandwidth_gb_per_s, "GB/s a device"),
        ("process overhead", corrections.overhead_factor, "of what is assumed"),
        *((f"time of {phase}", factor, "of the roofline") for phase, factor in corrections.time_factors.items()),
    ]
    render.table(
        ("MEASURED", "VALUE", "UNIT"),
        [(what, None if value is None else f"{value:.4g}", unit) for what, value, unit in rows],
    )
