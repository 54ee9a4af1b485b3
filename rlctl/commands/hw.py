"""`rlctl hw`: what this machine has, each fact with where it came from; recorded here, surveyed elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rlctl_hw.host import Host
from rlctl_hw.probe import survey
from rlctl_hw.record import recording, replay, save
from rlctl_hw.types import Device, Fact, Hardware

from rlctl import render
from rlctl.render import OutputOption
from rlctl_train.config.errors import UserError

app = typer.Typer(rich_markup_mode=None)


@app.command()
def hw(
    deep: Annotated[
        bool, typer.Option("--deep", help="Also ask torch, in a process of its own: takes seconds.")
    ] = False,
    record: Annotated[
        Path | None, typer.Option(help="Keep what the survey saw in this new folder, secrets removed.")
    ] = None,
    replayed: Annotated[
        Path | None, typer.Option("--replay", help="Survey the machine of such a folder instead of this one.")
    ] = None,
    output: OutputOption = "text",
) -> None:
    """Survey this machine: devices, links, network ports, host limits, each fact with its source."""
    found = _survey(deep=deep, record=record, replayed=replayed)
    if render.document(output, hardware=asdict(found)):
        return
    _show(found)


def _survey(*, deep: bool, record: Path | None, replayed: Path | None) -> Hardware:
    host = Host() if replayed is None else _replayed(replayed)
    if record is None:
        return survey(host, deep=deep)
    keeping = recording(host)
    found = survey(keeping, deep=deep)
    try:
        save(keeping, record)
    except (ValueError, OSError) as error:
        raise UserError(f"--record: {error}", "name a folder that does not exist yet") from error
    render.say(f"recorded in {record}; read it before you pass it on: rlctl hw --replay {record}")
    return found


def _replayed(folder: Path) -> Host:
    try:
        return replay(folder)
    except ValueError as error:
        raise UserError(f"--replay: {error}", "name a folder that rlctl hw --record has written") from error


def _show(found: Hardware) -> None:
    render.table(
        ("DEVICE", "KIND", "NAME", "MEMORY GIB", "ARCH", "CATALOGUE", "PART", "BUS"),
        [(d.index, d.kind, d.name, round(d.memory_gib, 2), d.catalogue, d.partition, d.pci) for d in found.devices],
    )
    if len(found.devices) > 1:
        render.text("")
        render.table(("ISLAND", "DEVICES", "INSIDE", "TO OTHERS"), _islands(found))
    if found.nics:
        near = found.facts.get("nics.near", Fact({}, "")).value or {}
        render.text("")
        render.table(
            ("PORT", "LAYER", "GB/S", "NEAREST DEVICES"),
            [
                (nic.name, nic.link_layer, nic.rate_gb_per_s, _numbers(found, near.get(nic.name, ())))
                for nic in found.nics
            ],
        )
    render.text("")
    host = f"{found.cpu_cores} cores, {found.host_memory_gib:.1f} GiB memory, {found.shm_gib:.1f} GiB /dev/shm"
    render.table(("HOST",), [(host,)])
    render.text("")
    render.table(("FACT", "VALUE", "SOURCE"), [(key, fact.value, _source(fact)) for key, fact in found.facts.items()])


def _architecture(device: Device) -> str | None:
    return device.architecture or device.compute_capability


def _islands(found: Hardware) -> list[Sequence[Any]]:
    """Return a row for each island: its devices, the links inside it, the ways that lead out of it."""
    if not found.islands:
        return [
            ("unknown", _numbers(found, range(len(found.devices))), _kinds(link.kind for link in found.links), None)
        ]
    rows = []
    for number, group in enumerate(found.islands):
        ends = [(link, (link.first in group) + (link.second in group)) for link in found.links]
        inside, outside = ({link.kind for link, inner in ends if inner == wanted} for wanted in (2, 1))
        rows.append((number, _numbers(found, group), _kinds(inside), _kinds(outside)))
    return rows


def _numbers(found: Hardware, places: Any) -> str:
    known = [found.devices[place].index for place in places if place in range(len(found.devices))]
    return ", ".join(map(str, known)) or "-"


def _kinds(kinds: Any) -> str:
    return ", ".join(sorted(set(kinds))) or "-"


def _source(fact: Fact) -> str:
    return fact.source if fact.error is None else f"{fact.source}: {fact.error}"
