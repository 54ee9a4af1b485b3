"""Ascend: the device files, what `npu-smi` says of each chip, and what a process may use of it.

A device is what `/dev/davinciN` is: a chip, or one of the two dies of an A3 package. N is its physical number.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rlctl_hw.devices import by_printed_name
from rlctl_hw.host import Found, Host
from rlctl_hw.types import Device, Fact, Link
from rlctl_hw.vendors import npu_smi
from rlctl_hw.vendors.ascend_software import MANAGER, read_versions
from rlctl_hw.vendors.ascend_visible import select_visible
from rlctl_hw.vendors.npu_smi import Board, Chip, Mapped, Table
from rlctl_hw.vendors.pci import find_npus
from rlctl_hw.vendors.wiring import wire

MIB_PER_GIB = 1024
DAVINCI = re.compile(r"/dev/davinci(\d{1,4})")
BARE_A3 = "Ascend910"
"""What `npu-smi info` calls every die of an A3; the board tells which one it is."""
FIRST_GENERATION = "910A"
WORKING = ("OK", "Warning", "NA", "-")
"""Health of a chip that computes; Alarm and Critical chips do not, UNKNOWN ones did not start."""
CONTAINER_HINT = f"give the container --device={MANAGER} --device=/dev/devmm_svm --device=/dev/hisi_hdc"
DCMI_HINT = f"the driver wants a reboot after its installation, or this user may not open {MANAGER}"


@dataclass(frozen=True)
class Npu:
    """One chip with its physical number and the name of its SoC."""

    index: int
    chip: Chip
    soc: str | None
    die: str | None = None
    """Which die of a package with two."""


def probe(host: Host) -> Found:
    """Return the chips a process may use; the physical ones are in the facts."""
    present = _present(host)
    table = npu_smi.read(host)
    npus = _npus(host, table.chips, present)
    here = [npu for npu in npus if npu.index in present]
    visible = select_visible(len(here), host.env)
    devices, notes = _devices(here[place] for place in visible.places)
    wiring = wire(devices, _links(host, npus) if len(devices) > 1 else (), " ".join(npu_smi.TOPOLOGY))
    facts = read_versions(host) | {
        "ascend.npu_smi": Fact(table.version, "npu-smi info", None if table.version else "; ".join(table.errors)),
        "ascend.physical": Fact(
            [f"{npu.index}: {npu.chip.name}" for npu in npus],
            "npu-smi info" if npus else "/dev/davinci*",
            "; ".join(_trouble(host, table, npus, present)) or None,
        ),
        "ascend.visible": Fact(
            [f"{device.index}: {device.name}" for device in devices],
            visible.source,
            "; ".join([*visible.notes, *notes]) or None,
        ),
    }
    if npus:
        facts["ascend.used_gib"] = _used(table, npus)
    if lost := [f"/dev/davinci{number}" for number in present if number not in {npu.index for npu in npus}]:
        facts["ascend.missing"] = Fact(lost, "/dev/davinci*", "device files of NPUs that npu-smi does not show")
    if withheld := [f"/dev/davinci{npu.index}" for npu in npus if npu.index not in present]:
        facts["ascend.withheld"] = Fact(withheld, "npu-smi info: there are no device files for these")
    return Found(devices, facts | wiring.facts, wiring.links, wiring.islands)


def resolve_soc(chip: Chip, board: Board) -> str | None:
    """Name the SoC: {Chip Type}{Chip Name} on A2, {Chip Name}_{NPU Name} on A3; None where nothing tells.

    A bare 910B with DDR of its own and 32 GiB of HBM is the first 910, not an A2.
    """
    if board.npu_name and board.chip_name:
        return f"{board.chip_name}_{board.npu_name}"
    name = (board.chip_name or chip.name).replace(" ", "").removeprefix("Ascend")
    if name in ("910", "910B") and chip.ddr_mib and chip.hbm_mib and chip.hbm_mib <= 32 * MIB_PER_GIB:
        name = FIRST_GENERATION
    return f"Ascend{name}" if name not in ("", "NA", "-", "910", "910B") else None


def _present(host: Host) -> list[int]:
    found = [DAVINCI.fullmatch(path) for path in host.glob("/dev/davinci[0-9]*")]
    return sorted(int(match.group(1)) for match in found if match)


def _npus(host: Host, chips: Sequence[Chip], present: Sequence[int]) -> list[Npu]:
    numbers = _physical_numbers(host, chips, present)
    socs: dict[tuple[str, int | None], str | None] = {}
    npus = []
    for number, chip in zip(numbers, chips, strict=True):
        # A server's chips of one name and size are alike: one is asked for all.
        alike = (chip.name, chip.memory_mib)
        if alike not in socs:
            socs[alike] = resolve_soc(chip, npu_smi.read_board(host, chip))
        npus.append(Npu(number, chip, socs[alike], f"die {chip.chip_id}" if chip.name == BARE_A3 else None))
    return sorted(npus, key=lambda npu: npu.index)


def _physical_numbers(host: Host, chips: Sequence[Chip], present: Sequence[int]) -> list[int]:
    """Return N of `/dev/davinciN` of each chip: from the table, else in order of the files, else from the map."""
    printed = [chip.device_id for chip in chips if chip.device_id is not None]
    complete = len(printed) == len(chips)
    if complete and set(present) <= set(printed):
        return printed
    # Inside a container the table may count from 0 what the files call by its number.
    if len(present) == len(chips):
        return list(present)
    if complete:
        return printed
    mapped = npu_smi.read_mapping(host)
    return [_mapped_number(chip, mapped, place) for place, chip in enumerate(chips)]


def _mapped_number(chip: Chip, mapped: Iterable[Mapped], place: int) -> int:
    row = next((row for row in mapped if (row.npu_id, row.chip_id) == (chip.npu_id, chip.chip_id)), None)
    numbers = (row.physical_id, row.logic_id) if row else ()
    return next((number for number in numbers if number is not None), place)


def _devices(npus: Iterable[Npu]) -> tuple[tuple[Device, ...], list[str]]:
    devices, notes = [], []
    for npu in npus:
        if npu.chip.health not in WORKING:
            notes.append(f"NPU {npu.index} is left out: its health is {npu.chip.health}")
        elif npu.chip.memory_mib is None:
            notes.append(f"NPU {npu.index} ({npu.chip.name}) does not tell its memory")
        else:
            devices.append(_device(npu, npu.chip.memory_mib / MIB_PER_GIB))
    return tuple(devices), notes


def _device(npu: Npu, memory_gib: float) -> Device:
    names = (npu.soc, npu.soc.removeprefix("Ascend")) if npu.soc else ()
    entries = [entry for entry in map(by_printed_name, names) if entry]
    return Device(
        kind="ascend",
        index=npu.index,
        name=npu.chip.name,
        memory_gib=memory_gib,
        catalogue=entries[0].key if entries else None,
        architecture=npu.soc,
        partition=npu.die,
        pci=npu.chip.bus_id,
    )


def _links(host: Host, npus: Sequence[Npu]) -> list[Link]:
    kinds = npu_smi.read_topology(host)
    numbers = {number for pair in kinds for number in pair}
    indices = {npu.index: npu.index for npu in npus}
    cards = {npu.chip.npu_id: npu.index for npu in npus}
    # Rows are called by physical number, or by card on a server with a chip a card.
    names = indices if numbers <= indices.keys() or len(cards) < len(npus) else cards
    return [
        Link(names[first], names[second], kind)
        for (first, second), kind in kinds.items()
        if first in names and second in names
    ]


def _used(table: Table, npus: Sequence[Npu]) -> Fact:
    """Return what is taken; the driver's own share varies, so only processes that are listed count as use."""
    used = {str(npu.index): round(npu.chip.used_mib / MIB_PER_GIB, 2) for npu in npus if npu.chip.used_mib is not None}
    taken: dict[int, int] = {}
    for process in table.processes:
        for npu in npus:
            if (npu.chip.npu_id, npu.chip.chip_id) == (process.npu_id, process.chip_id):
                taken[npu.index] = taken.get(npu.index, 0) + process.memory_mib
    busy = [f"NPU {index}: {mib / MIB_PER_GIB:.1f} GiB" for index, mib in sorted(taken.items())]
    return Fact(used, "npu-smi info", f"already in use: {', '.join(busy)}" if busy else None)


def _trouble(host: Host, table: Table, npus: Sequence[Npu], present: Sequence[int]) -> list[str]:
    broken = [f"{npu.index} ({npu.chip.health})" for npu in npus if npu.chip.health not in WORKING]
    warned = [str(npu.index) for npu in npus if npu.chip.health == "Warning"]
    told = list(table.errors)
    if any("-8005" in error for error in told):
        told.append(DCMI_HINT)
    if broken:
        told.append(f"in error: NPU {', '.join(broken)}")
    if warned:
        told.append(f"with a warning: NPU {', '.join(warned)}")
    if present and not host.exists(MANAGER):
        told.append(f"{MANAGER} is not here: {CONTAINER_HINT}")
    on_bus = [] if present else find_npus(host)
    if on_bus:
        told.insert(0, f"{len(on_bus)} Ascend NPUs are on the bus, but the driver shows none")
    return told
