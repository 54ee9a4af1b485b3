"""`rlctl plan NAME` says what fits and why; its verbs answer narrower questions about memory, layouts and prices."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rlctl import planning, render
from rlctl.commands import _plan_view, _request, plan_fix, plan_memory, plan_search, plan_solve
from rlctl.commands._group import BareName
from rlctl.commands._request import FREE, FilesOption, HardwareOption, PriceOption, RequestArgument
from rlctl.render import OutputOption
from rlctl_train.config.errors import UserError

app = typer.Typer(
    cls=BareName,
    rich_markup_mode=None,
    subcommand_metavar="NAME [KEY=VALUE]... | COMMAND",
    help="Say what fits on the hardware, and why. A bare NAME plans that preset or file.",
)


app.command(name="memory")(plan_memory.memory)
app.command(name="solve", context_settings=FREE)(plan_solve.solve)
app.command(name="search", context_settings=FREE)(plan_search.search)
app.command(name="compare", context_settings=FREE)(plan_search.compare)


@app.callback()
def main() -> None:
    """Hold the verbs."""


@app.command(name=BareName.bare, hidden=True, context_settings=FREE)
def plan(
    ctx: typer.Context,
    words: RequestArgument = None,
    files: FilesOption = None,
    hw: HardwareOption = None,
    price: PriceOption = None,
    mean_response: Annotated[
        int | None,
        typer.Option("--mean-response", min=1, help="Expected length of a response, in tokens; unset assumes it."),
    ] = None,
    fix: Annotated[bool, typer.Option("--fix", help="Show the smallest change that fits, where it does not.")] = False,
    write: Annotated[
        Path | None, typer.Option("--write", metavar="FILE", help="With --fix: write the change, for `-c FILE`.")
    ] = None,
    output: OutputOption = "text",
) -> None:
    """Say how a preset or file would run, what memory and time it takes, and why. Exit code 3: it does not fit."""
    if write is not None and not fix:
        raise UserError("--write has nothing to write without --fix", "add --fix")
    hardware = planning.hardware_named(hw)
    request = _request.read_for(words, files, ctx, hardware)
    asked = planning.workload_of(request.resolved.config, mean_response_tokens=mean_response)
    if fix:
        plan_fix.fix(request, asked, hardware, write=write, output=output)
        return
    made = planning.plan_for(asked, hardware)
    money = _plan_view.Price(price) if price else None
    content = {"name": request.name, "hardware": hw, "plan": made.to_json()}
    if not render.document(output, **content, price=money.to_json(made) if money else None):
        _plan_view.show(made, money)
