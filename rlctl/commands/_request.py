"""What the commands that take a preset and overrides share: reading the arguments, resolving, planning."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from rlctl import catalog, overrides, render, resolve, settings

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
    for line in resolved.notes:
        render.note(line)
    return Request(name, resolved, user)


def options_of(ctx: typer.Context) -> list[str]:
    """Return the option names of a command, for the nearest spelling of a misspelt one."""
    return [option for parameter in ctx.command.params for option in parameter.opts if option.startswith("-")]
