"""`rlctl preset NAME` shows what a preset becomes on this machine; `ls`, `show`, `cp`, `diff` handle the files."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from rlctl import catalog, evidence, render
from rlctl.commands._group import BareName
from rlctl.render import OutputOption
from rlctl_train.config.errors import UserError

NameArgument = Annotated[str, typer.Argument(metavar="NAME", autocompletion=catalog.names)]


app = typer.Typer(
    cls=BareName,
    rich_markup_mode=None,
    subcommand_metavar="NAME [KEY=VALUE]... | COMMAND",
    help="Show presets. A bare NAME prints the resolved run for this machine.",
)


@app.command(name="ls")
def list_presets(output: OutputOption = "text") -> None:
    """List the presets, with the hardware each is meant for and whether it was measured or only planned."""
    entries = [_entry(catalog.load_preset(name)) for name in catalog.names()]
    if not render.document(output, presets=entries):
        columns = ("name", "title", "hardware", "status")
        render.table(("NAME", "WHAT", "HARDWARE", "STATUS"), [[entry[key] for key in columns] for entry in entries])


@app.command()
def show(name: NameArgument) -> None:
    """Print the text of a preset."""
    render.text(catalog.load_preset(name).path.read_text(encoding="utf-8").rstrip())


@app.command()
def cp(
    name: NameArgument,
    target: Annotated[Path, typer.Argument(metavar="FILE", help="File to write, such as my.toml.")],
    force: Annotated[bool, typer.Option("--force", "-f", help="Overwrite FILE.")] = False,
) -> None:
    """Copy a preset to a file of your own."""
    text = catalog.load_preset(name).path.read_text(encoding="utf-8")
    file = target / f"{name}.toml" if target.is_dir() else target
    if file.exists() and not force:
        raise UserError(f"{file} exists", "choose another name, or overwrite it with --force")
    if not file.parent.is_dir():
        raise UserError(f"there is no folder {file.parent}", "make it first")
    file.write_text(text, encoding="utf-8")
    relative = str(file) if catalog.is_file(str(file)) else f"./{file}"
    render.say(f"wrote {file}; start it with `rlctl launch {relative}`")


@app.command()
def diff(
    first: NameArgument,
    second: NameArgument,
    output: OutputOption = "text",
) -> None:
    """Compare two presets (or files) value by value."""
    from rlctl import compare, resolve

    sides = [resolve.build(name) for name in (first, second)]
    rows = compare.differences(*({key: o.value for key, o in side.origins.items()} for side in sides))
    if not render.document(output, first=first, second=second, differences=compare.to_json(rows)):
        render.table(("KEY", first, second), rows)


@app.command(
    name=BareName.bare, hidden=True, context_settings={"allow_extra_args": True, "ignore_unknown_options": True}
)
def resolve_preset(
    ctx: typer.Context,
    words: Annotated[list[str], typer.Argument(metavar="NAME [KEY=VALUE]...", autocompletion=catalog.names)],
    files: Annotated[
        list[Path] | None, typer.Option("--config", "-c", help="TOML or JSON file put on top; may be repeated.")
    ] = None,
    show_all: Annotated[bool, typer.Option("--all", "-a", help="Show values that are defaults too.")] = False,
    hw: Annotated[
        str | None, typer.Option("--hw", help="Show it for a machine elsewhere, such as h100-80gb:8 or cpu:2.")
    ] = None,
    output: OutputOption = "text",
) -> None:
    """Print what a preset becomes on this machine: every value with its origin, and the plan."""
    from rlctl import planning
    from rlctl.commands import _request, _show

    hardware = planning.hardware_named(hw)
    device = planning.device_key(hardware)
    request = _request.read(words, files, options=_request.options_of(ctx), device=device)
    if request.name is not None:
        _say_status(catalog.load(request.name))
    _show.request(request, hardware, output=output, show_all=show_all)


def _say_status(document: catalog.Document) -> None:
    grounds = document.header.get("evidence")
    render.say(f"{document.name}: {evidence.status(document.verified)}{f'; {grounds}' if grounds else ''}")


def _entry(document: catalog.Document) -> dict[str, Any]:
    header = {key: document.header.get(key) for key in catalog.HEADER_KEYS}
    records = [asdict(record) for record in document.verified]
    return {"name": document.name, **header, "status": evidence.status(document.verified), "verified": records}
