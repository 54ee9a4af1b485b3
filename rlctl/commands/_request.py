"""What the commands that take a preset and overrides share: reading the arguments, resolving, planning."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rlctl_hw.types import Hardware

from rlctl import catalog, overrides, planning, render, resolve, settings

FREE = {"allow_extra_args": True, "ignore_unknown_options": True}
"""Context settings of a command that takes overrides among its arguments."""

RequestArgument = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="NAME_OR_FILE [KEY=VALUE]...",
        help="A preset or a TOML/JSON file, then settings: a.b=c, --a.b c or --set a.b=c; `null` unsets.",
        autocompletion=catalog.names,
        show_default=False,
    ),
]
FilesOption = Annotated[
    list[Path] | None,
    typer.Option("--config", "-c", help="TOML or JSON file put on top of the preset; may be repeated."),
]
HardwareOption = Annotated[
    str | None, typer.Option("--hw", help="Plan for a machine elsewhere, such as h100-80gb:8, mi300x:8x4 or cpu:2.")
]
PriceOption = Annotated[
    str | None,
    typer.Option("--price", metavar="PRICE[@DATE]", help="Of one device and hour, such as 2.5 or 2.5@2026-11-01."),
]


@dataclass(frozen=True)
class Request:
    """A resolved run and the words that asked for it."""

    name: str | None
    resolved: resolve.Resolved
    settings: settings.Settings


def read(
    words: Sequence[str] | None,
    files: Iterable[Path] | None,
    *,
    options: Iterable[str] = (),
    name_needed: bool = True,
    device: str | None = None,
    quiet: bool = False,
) -> Request:
    """Resolve what the arguments of a command ask for, for the catalogue's device; say what was noted on the way."""
    arguments = overrides.parse_arguments(words or (), options)
    what = "the name of a preset or file"
    name = arguments.one_name(what) if name_needed else arguments.optional_name()
    user = settings.load()
    resolved = resolve.build(
        name,
        files=list(files or ()),
        overrides=arguments.overrides,
        environ=os.environ,
        reserved=settings.reserved_variables(),
        settings=user.assignments(),
        device=device,
    )
    if not quiet:
        for line in resolved.notes:
            render.note(line)
    return Request(name, resolved, user)


def read_for(
    words: Sequence[str] | None, files: Iterable[Path] | None, ctx: typer.Context, hardware: Hardware
) -> Request:
    """Resolve the arguments of a planning command for a machine: a preset may pin values for its devices."""
    device = planning.device_key(hardware)
    return read(words, files, options=options_of(ctx), name_needed=not files, device=device)


def options_of(ctx: typer.Context) -> list[str]:
    """Return the option names of a command, for the nearest spelling of a misspelt one."""
    return [option for parameter in ctx.command.params for option in parameter.opts if option.startswith("-")]
