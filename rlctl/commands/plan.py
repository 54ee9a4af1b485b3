"""`rlctl plan NAME` says what fits and why; its verbs answer narrower questions about memory, layouts and prices."""

from __future__ import annotations

from typing import Annotated

import typer

from rlctl import planning, render
from rlctl.commands import _request, _show, plan_memory
from rlctl.commands._group import BareName
from rlctl.commands._request import FREE, FilesOption, RequestArgument
from rlctl.render import OutputOption

app = typer.Typer(
    cls=BareName,
    rich_markup_mode=None,
    subcommand_metavar="NAME [KEY=VALUE]... | COMMAND",
    help="Say what fits on the hardware, and why. A bare NAME plans that preset or file.",
)


app.command(name="memory")(plan_memory.memory)


@app.callback()
def main() -> None:
    """Hold the verbs."""


@app.command(name=BareName.bare, hidden=True, context_settings=FREE)
def plan(
    ctx: typer.Context,
    words: RequestArgument = None,
    files: FilesOption = None,
    hw: Annotated[
        str | None, typer.Option("--hw", help="Plan for a machine elsewhere, such as h100-80gb:8 or cpu:2.")
    ] = None,
    output: OutputOption = "text",
) -> None:
    """Say how a preset or file would run, what memory it takes, and why. Exit code 3: it does not fit."""
    hardware = planning.hardware_named(hw)
    options, device = _request.options_of(ctx), planning.device_key(hardware)
    request = _request.read(words, files, options=options, name_needed=not files, device=device)
    made = planning.plan_here(request.resolved.config, hardware)
    if not render.document(output, name=request.name, hardware=hw, plan=made.to_json()):
        _show.plan(made, with_memory=True)
