"""`npu-smi`: parsers from its text to facts, and the ones that ask it.

`npu-smi info` prints two lines a chip under two header lines; columns come and go (Phy-ID or Device beside Chip, no HBM
on a 310, wider cells since 26.0, no chip numbers on a 950), and are found by name. `-` and `NA` are no answer.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from rlctl_hw.host import CommandResult, Host, first_line
from rlctl_hw.vendors.tools import ASCEND_FOLDERS, run_tool

INFO = ("npu-smi", "info")
MAPPING = ("npu-smi", "info", "-m")
TOPOLOGY = ("npu-smi", "info", "-t", "topo")
TROUBLE = re.compile(r"dcmi|DrvMng|failed|error|denied|not found|permission", re.IGNORECASE)
VERSION = re.compile(r"npu-smi\s+(\d\S*)")
COLUMN = re.compile(r"NPU ID|NPU Util\(%\)|Process id in container|Process \w+(?:\(MB\))?|\S+")
"""A column's name: one word, but for these."""
RATIO = re.compile(r"\s*/\s*")
PEER = re.compile(r"(?:NPU|Phy-ID)(\d{1,4})")
KIND = re.compile(r"[A-Z][A-Z_]{1,9}")


@dataclass(frozen=True)
class Chip:
    """One chip of the table; sizes in MiB."""

    npu_id: int
    """The card (slot), as printed; not always counted from 0."""
    chip_id: int
    name: str
    health: str
    bus_id: str | None = None
    device_id: int | None = None
    """Number N of `/dev/davinciN`, where the table tells it."""
    ddr_mib: int | None = None
    hbm_mib: int | None = None
    """None where there is no such column."""
    used_mib: int | None = None
    """Taken of what models are kept in, by whomever and by the driver itself."""

    @property
    def memory_mib(self) -> int | None:
        """Return what models are kept in: HBM where the chip has it, else its DDR."""
        return self.hbm_mib or self.ddr_mib


@dataclass(frozen=True)
class Process:
    """One process that has memory on a chip."""

    npu_id: int
    chip_id: int
    name: str
    memory_mib: int


@dataclass(frozen=True)
class Table:
    """The chips of `npu-smi info`, who uses them, and the messages around the tables."""

    chips: tuple[Chip, ...] = ()
    version: str | None = None
    errors: tuple[str, ...] = ()
    processes: tuple[Process, ...] = ()


@dataclass(frozen=True)
class Mapped:
    """One row of `npu-smi info -m`; the controller of a card (Mcu) has no numbers."""

    npu_id: int
    chip_id: int
    name: str
    logic_id: int | None = None
    physical_id: int | None = None


@dataclass(frozen=True)
class Board:
    """What `npu-smi info -t board` says of one chip."""

    chip_type: str | None = None
    chip_name: str | None = None
    npu_name: str | None = None


def read(host: Host) -> Table:
    """Ask for the table; a message in its place becomes the error."""
    result = run_tool(host, INFO, ASCEND_FOLDERS)
    table = parse_info(result.stdout)
    if table.chips or table.errors:
        return table
    return Table((), table.version, (_complaint(result),))


def read_board(host: Host, chip: Chip) -> Board:
    """Ask what a chip is."""
    argv = ["npu-smi", "info", "-t", "board", "-i", str(chip.npu_id)]
    of_chip = parse_board(run_tool(host, [*argv, "-c", str(chip.chip_id)], ASCEND_FOLDERS).stdout)
    # A 950 answers for the card only.
    return of_chip if of_chip.chip_name else parse_board(run_tool(host, argv, ASCEND_FOLDERS).stdout)


def read_mapping(host: Host) -> tuple[Mapped, ...]:
    """Ask for the numbers of the chips."""
    return parse_mapping(run_tool(host, MAPPING, ASCEND_FOLDERS).stdout)


def read_topology(host: Host) -> dict[tuple[int, int], str]:
    """Ask for the ways between the chips."""
    return parse_topology(run_tool(host, TOPOLOGY, ASCEND_FOLDERS).stdout)


def parse_info(text: str) -> Table:
    """Read `npu-smi info`: pairs of rows under both headers, up to the table of processes."""
    chips: list[Chip] = []
    upper: list[list[str]] = []
    lower: list[list[str]] = []
    pending: list[str] | None = None
    for line in text.splitlines():
        cells = _cells(line)
        columns = [COLUMN.findall(cell) for cell in cells]
        names = {name for cell in columns for name in cell}
        if {"Name", "Health"} <= names:
            upper, lower, pending = columns, [], None
        elif "Bus-Id" in names and len(cells) == len(upper):
            lower = columns
        elif "Process id" in names:
            break
        elif not lower or len(cells) != len(upper):
            # Rules part the chips: a row without its partner is dropped there.
            pending = None
        elif pending is None or (cells[0] and not lower[0]):
            pending = cells
        else:
            chip = _chip(_named(upper, pending) | _named(lower, cells), numbered="Chip" in lower[0])
            chips, pending = [*chips, *([chip] if chip else [])], None
    version = VERSION.search(text)
    errors = () if chips else tuple(line.strip() for line in text.splitlines() if TROUBLE.search(line))[:2]
    return Table(tuple(chips), version.group(1) if version else None, errors, parse_processes(text))


def parse_processes(text: str) -> tuple[Process, ...]:
    """Read the second table of `npu-smi info`; in a container it holds the container's own processes only."""
    header: list[list[str]] = []
    found = []
    for cells in map(_cells, text.splitlines()):
        if "Process id" in cells:
            header = [COLUMN.findall(cell) for cell in cells]
        elif header and len(cells) == len(header):
            row = _named(header, cells)
            npu_id, memory_mib = _number(row.get("NPU", row.get("NPU ID"))), _number(row.get("Process memory(MB)"))
            if npu_id is not None and memory_mib is not None:
                found.append(Process(npu_id, _number(row.get("Chip")) or 0, row.get("Process name", ""), memory_mib))
    return tuple(found)


def parse_mapping(text: str) -> tuple[Mapped, ...]:
    """Read `npu-smi info -m` by its column names, which are two words each; the last one takes the rest of a row."""
    columns: list[str] = []
    rows: list[Mapped] = []
    for line in text.splitlines():
        found = re.findall(r"(?:NPU|Slot|Chip) ?(?:Logic ID|Phy-ID|ID|Name)", line)
        if "NPU ID" in found:
            columns = found
        elif columns:
            row = dict(zip(columns, line.split(maxsplit=len(columns) - 1), strict=False))
            npu_id, chip_id = _number(row.get("NPU ID")), _number(row.get("Chip ID"))
            if npu_id is not None and chip_id is not None:
                logic_id, physical_id = _number(row.get("Chip Logic ID")), _number(row.get("Chip Phy-ID"))
                rows.append(Mapped(npu_id, chip_id, row.get("Chip Name", "").strip(), logic_id, physical_id))
    return tuple(row for row in rows if row.name != "Mcu")


def parse_board(text: str) -> Board:
    """Read `name : value` lines."""
    fields = {}
    for line in text.splitlines():
        key, colon, value = line.partition(":")
        if colon and value.strip() not in ("", "NA", "-"):
            fields.setdefault(key.strip(), value.strip())
    return Board(fields.get("Chip Type"), fields.get("Chip Name"), fields.get("NPU Name"))


def parse_topology(text: str) -> dict[tuple[int, int], str]:
    """Read `npu-smi info -t topo`: kind of way by pairs of numbers, of cards (NPU0) or of chips (Phy-ID0).

    Columns for network ports and CPU affinities, and the legend below, are passed over.
    """
    kinds: dict[tuple[int, int], str] = {}
    columns: list[int | None] = []
    for line in text.splitlines():
        cells = line.split()
        peers = [PEER.fullmatch(cell) for cell in cells]
        if (len(peers) > 1 and peers[0] and peers[1]) or (len(peers) == 1 and peers[0]):
            columns = [int(peer.group(1)) if peer else None for peer in peers]
        elif cells and peers[0] and columns:
            first = int(peers[0].group(1))
            for other, kind in zip(columns, cells[1:], strict=False):
                if other is not None and other != first and KIND.fullmatch(kind) and kind != "NA":
                    kinds[min(first, other), max(first, other)] = kind
    return kinds


def _cells(line: str) -> list[str]:
    """Return the cells between bars; lines that are none have no cell."""
    stripped = line.strip()
    return [cell.strip() for cell in stripped.strip("|").split("|")] if stripped.startswith("|") else []


def _named(header: list[list[str]], cells: list[str]) -> dict[str, str]:
    """Name the words of each cell; words beyond the last column belong to it."""
    row = {}
    for columns, cell in zip(header, cells, strict=False):
        words = RATIO.sub("/", cell).split(maxsplit=max(0, len(columns) - 1)) if columns else []
        row |= dict(zip(columns, (word.strip() for word in words), strict=False))
    return row


def _chip(row: dict[str, str], *, numbered: bool) -> Chip | None:
    """Return the chip of two rows; a 950 is a card with one chip, which has no number."""
    npu_id = _number(row.get("NPU", row.get("NPU ID")))
    chip_id = _number(row.get("Chip")) if numbered else 0
    if npu_id is None or chip_id is None or "Name" not in row:
        return None
    bus_id = row.get("Bus-Id", "").lower()
    device_id = _number(row.get("Phy-ID"))
    ddr, hbm = _usage(row.get("Memory-Usage(MB)")), _usage(row.get("HBM-Usage(MB)"))
    return Chip(
        npu_id=npu_id,
        chip_id=chip_id,
        name=row["Name"],
        health=row.get("Health", "NA"),
        bus_id=bus_id if re.fullmatch(r"[0-9a-f]{4}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]", bus_id) else None,
        device_id=_number(row.get("Device")) if device_id is None else device_id,
        ddr_mib=ddr[1],
        hbm_mib=hbm[1],
        used_mib=hbm[0] if hbm[1] else ddr[0],
    )


def _usage(cell: str | None) -> tuple[int | None, int | None]:
    """Read `3318/65536`: taken and total."""
    used, _, total = (cell or "").partition("/")
    return _number(used), _number(total)


def _number(cell: str | None) -> int | None:
    return int(cell) if cell and cell.isascii() and cell.isdigit() and len(cell) < 16 else None


def _complaint(result: CommandResult) -> str:
    return result.error or f"npu-smi: {first_line(result.stdout) or 'said nothing'}"
