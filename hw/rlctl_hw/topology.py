"""How the devices of a node are wired: the table of `nvidia-smi topo -m`, and the islands that links make."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from rlctl_hw.types import Link

ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
GPU = re.compile(r"GPU(\d{1,4})")
COLUMN = re.compile(r"CPU Affinity|NUMA Affinity|GPU NUMA ID|\S+")
"""A column of a table whose tabs were lost on the way."""
NOT_PEERS = ("CPU Affinity", "NUMA Affinity", "GPU NUMA ID")
LEGEND = re.compile(r"\s*(?P<label>NIC\d+): (?P<name>\S+)\s*")
FAST = re.compile(r"NV\d+|XGMI|HCCS(_SW)?|UB|SIO", re.IGNORECASE)
"""Links that tensor parallelism may use; everything else crosses PCIe."""
PCIE = ("PIX", "PXB", "PHB", "NODE", "SYS")
"""Ways over PCIe, the shortest first."""


@dataclass(frozen=True)
class Topology:
    """One table: links between GPUs by index (`first` below `second`), and of GPUs to network ports by name."""

    links: tuple[Link, ...] = ()
    nics: dict[str, dict[int, str]] = field(default_factory=dict)
    """Port name to GPU index to the kind of way between them."""


def parse_topo(text: str) -> Topology:
    """Read `nvidia-smi topo -m` by column names.

    The header may be coloured and may have lost its first tab; GPU columns come first, then ports, then affinities.
    Text that is no such table gives an empty topology.
    """
    lines = [ANSI.sub("", line).rstrip("\r\n") for line in text.splitlines()]
    header_at = next((i for i, line in enumerate(lines) if _is_header(line)), None)
    if header_at is None:
        return Topology()
    peers = [column for column in _header_cells(lines[header_at]) if column not in NOT_PEERS]
    legend = {match["label"]: match["name"] for line in lines if (match := LEGEND.fullmatch(line))}
    links: dict[tuple[int, int], str] = {}
    nics: dict[str, dict[int, str]] = {}
    for row, cells in map(_row_cells, lines[header_at + 1 :]):
        if (gpu := _gpu(row)) is None:
            continue
        # Affinities follow, so a row's first cells are its peers whatever is empty behind them.
        for peer, kind in zip(peers, cells, strict=False):
            other = _gpu(peer)
            if not (FAST.fullmatch(kind) or kind in PCIE):
                continue
            if other is None:
                nics.setdefault(legend.get(peer, peer), {})[gpu] = kind
            elif other != gpu:
                links[min(gpu, other), max(gpu, other)] = kind
    return Topology(tuple(Link(*pair, kind) for pair, kind in sorted(links.items())), nics)


def islands(num_devices: int, links: Iterable[Link]) -> tuple[tuple[int, ...], ...]:
    """Return the groups of devices that NVLink, xGMI or HCCS joins; a device without such a link is a group alone."""
    group = list(range(num_devices))
    for link in links:
        if FAST.fullmatch(link.kind) and link.first < num_devices and link.second < num_devices:
            old, new = group[link.second], group[link.first]
            group = [new if member == old else member for member in group]
    found: dict[int, list[int]] = {}
    for place, member in enumerate(group):
        found.setdefault(member, []).append(place)
    return tuple(sorted(tuple(members) for members in found.values()))


def among(indices: Iterable[int], links: Iterable[Link]) -> tuple[Link, ...]:
    """Return the links between devices with these indices, renamed to their places in that list."""
    place = {index: at for at, index in enumerate(indices)}
    found = []
    for link in links:
        if link.first in place and link.second in place:
            ends = sorted((place[link.first], place[link.second]))
            found.append(Link(ends[0], ends[1], link.kind))
    return tuple(sorted(found, key=lambda link: (link.first, link.second)))


def is_complete(num_devices: int, links: Iterable[Link]) -> bool:
    """Say whether every pair of devices has its link."""
    return len({(link.first, link.second) for link in links}) == num_devices * (num_devices - 1) // 2


def _is_header(line: str) -> bool:
    cells = _header_cells(line)
    # A row starts with a GPU too, and goes on with what is no column name.
    return bool(cells) and bool(GPU.fullmatch(cells[0])) and (len(cells) == 1 or _names_columns(cells[1]))


def _names_columns(cell: str) -> bool:
    return bool(GPU.fullmatch(cell)) or cell in NOT_PEERS or bool(re.fullmatch(r"NIC\d+|mlx\S+", cell))


def _header_cells(line: str) -> list[str]:
    cells = line.split("\t") if "\t" in line else COLUMN.findall(line)
    return [cell.strip() for cell in cells if cell.strip()]


def _row_cells(line: str) -> tuple[str, list[str]]:
    cells = [cell.strip() for cell in line.split("\t")] if "\t" in line else line.split()
    return (cells[0], cells[1:]) if cells else ("", [])


def _gpu(label: str) -> int | None:
    match = GPU.fullmatch(label)
    return int(match.group(1)) if match else None
