"""Network ports that collectives can use: InfiniBand and RoCE from sysfs, else Ethernet, and the GPUs beside them.

Ports are found by what they say of themselves, never by name: clouds and udev call them `mlx5_ib0`, `ibp23s0` or
`rdmap0s6`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import PurePosixPath

from rlctl_hw.host import Host
from rlctl_hw.types import Device, Fact, Nic

GBIT_PER_GBYTE = 8.0
MBIT_PER_GBYTE = 8000.0
COMMON_ROOT = ("/", "sys", "devices")
RDMA, ETHERNET = "/sys/class/infiniband", "/sys/class/net"


def read_nics(host: Host) -> tuple[tuple[Nic, ...], dict[str, Fact]]:
    """Return the ports for collectives, RDMA ones where there are any, and what was seen of both kinds."""
    active, idle = _rdma(host)
    wired = _ethernet(host)
    facts = {
        "nics.rdma": Fact([nic.name for nic in active], RDMA, f"not active: {', '.join(idle)}" if idle else None),
        "nics.ethernet": Fact([nic.name for nic in wired], ETHERNET),
    }
    return tuple(active) or tuple(wired), facts


def nearest_devices(host: Host, nics: Iterable[Nic], devices: Sequence[Device]) -> Fact | None:
    """Return for each RDMA port the places of the devices that share most of its way to the CPU, as sysfs has it."""
    ways = {place: way for place, device in enumerate(devices) if (way := _bus_way(host, device.pci))}
    near = {}
    for nic in nics:
        port = host.resolve(f"{RDMA}/{nic.name.partition(':')[0]}/device")
        if port is None or not ways:
            continue
        shared = {place: _shared(PurePosixPath(port).parts, way) for place, way in ways.items()}
        if (deepest := max(shared.values())) > len(COMMON_ROOT):
            near[nic.name] = [place for place, depth in shared.items() if depth == deepest]
    return Fact(near, "PCI paths in /sys/devices") if near else None


def parse_rate(text: str) -> float | None:
    """Read an InfiniBand rate (`400 Gb/sec (4X NDR)`), in 1e9 bytes per second."""
    found = re.match(r"(\d{1,6}(?:\.\d{1,3})?) Gb/sec", text)
    return float(found.group(1)) / GBIT_PER_GBYTE if found else None


def parse_speed(text: str) -> float | None:
    """Read an Ethernet speed in Mb/s; -1 and nothing mean unknown. Returns 1e9 bytes per second."""
    return int(text) / MBIT_PER_GBYTE if re.fullmatch(r"[0-9]{1,9}", text) and int(text) else None


def is_active(state: str) -> bool:
    """Read a port's state (`4: ACTIVE`); `3: ARMED`, `2: INIT` and `1: DOWN` carry nothing."""
    return state.partition(":")[2].strip() == "ACTIVE"


def _rdma(host: Host) -> tuple[list[Nic], list[str]]:
    active, idle = [], []
    for port in host.glob(f"{RDMA}/*/ports/*"):
        parts = PurePosixPath(port).parts
        name = parts[-3] if parts[-1] == "1" else f"{parts[-3]}:{parts[-1]}"
        if is_active(host.read(f"{port}/state") or ""):
            rate = parse_rate(host.read(f"{port}/rate") or "")
            active.append(Nic(name, rate, host.read(f"{port}/link_layer") or None))
        else:
            idle.append(name)
    return active, idle


def _ethernet(host: Host) -> list[Nic]:
    found = []
    for name in host.listdir(ETHERNET):
        at = f"{ETHERNET}/{name}"
        # Bridges, tunnels and loopback have no device below them; what serves RDMA is counted there.
        if not host.exists(f"{at}/device") or host.exists(f"{at}/device/infiniband"):
            continue
        if host.read(f"{at}/operstate") == "up":
            found.append(Nic(name, parse_speed(host.read(f"{at}/speed") or ""), "Ethernet"))
    return found


def _bus_way(host: Host, pci: str | None) -> tuple[str, ...] | None:
    way = host.resolve(f"/sys/bus/pci/devices/{pci}") if pci else None
    return PurePosixPath(way).parts if way else None


def _shared(first: Sequence[str], second: Sequence[str]) -> int:
    return next(
        (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )
