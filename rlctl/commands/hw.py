"""`rlctl hw`: what this machine has, each fact with where it came from."""

from __future__ import annotations

from dataclasses import asdict

import typer
from rlctl_hw.probe import survey

from rlctl import render
from rlctl.render import OutputOption

app = typer.Typer(rich_markup_mode=None)


@app.command()
def hw(output: OutputOption = "text") -> None:
    """Survey this machine."""
    found = survey()
    if render.document(output, hardware=asdict(found)):
        return
    render.table(
        ("DEVICE", "KIND", "NAME", "MEMORY GIB"), [(d.index, d.kind, d.name, d.memory_gib) for d in found.devices]
    )
    render.text("")
    rows = [
        (key, fact.value, fact.source if fact.error is None else f"{fact.source}: {fact.error}")
        for key, fact in found.facts.items()
    ]
    render.table(("FACT", "VALUE", "SOURCE"), rows)
