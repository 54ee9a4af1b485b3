"""How fast the hardware is: what a device computes and reads, and what links, buses and disks carry, per second."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from rlctl_hw.devices import BANDWIDTH_SHARE, CatalogueEntry, by_key, by_printed_name
from rlctl_hw.types import Corrections, Hardware, Origin

GB = 1e9
LINK_SHARE = 0.8
"""Of a link's nominal rate, that collectives over large tensors reach (NVLink, xGMI and InfiniBand: 0.75 to 0.9)."""
NIC_GB_PER_S = 50.0
"""Of one device between nodes, where no port is known: one 400 Gb/s port a device, as training clusters have."""


@dataclass(frozen=True)
class Speeds:
    """Rates that large operations reach, in operations or bytes per second and device."""

    matmul_flops: float
    bandwidth: float
    island_link: float
    """Between all devices of an island at one time."""
    pair_link: float
    """Between two devices of an island."""
    node_link: float
    """Between nodes, of one device's share of the ports."""
    host_bus: float
    """Between a device and its host's memory."""
    origin: Origin


def catalogue_entry(hardware: Hardware) -> CatalogueEntry | None:
    """Return the catalogue's row of the slowest of the devices; None where one of them is not in it."""
    entries = [_entry(device.catalogue, device.name) for device in hardware.devices]
    known = [entry for entry in entries if entry is not None]
    if not known or len(known) < len(entries):
        return None
    return min(known, key=lambda entry: (entry.bf16_tflops or 0.0, entry.bandwidth_gb_per_s))


def speeds_of(hardware: Hardware, corrections: Corrections) -> Speeds | None:
    """Return the rates of this machine; None for a device without a known bfloat16 peak."""
    entry = catalogue_entry(hardware)
    if entry is None or entry.bf16_tflops is None:
        return None
    share, origin = entry.reachable_share
    if corrections.matmul_share is not None:
        share, origin = corrections.matmul_share, "measured"
    bandwidth_share = BANDWIDTH_SHARE if corrections.bandwidth_share is None else corrections.bandwidth_share
    link = entry.link_gb_per_s * GB * LINK_SHARE
    return Speeds(
        matmul_flops=entry.bf16_tflops * 1e12 * share,
        bandwidth=entry.bandwidth_gb_per_s * GB * bandwidth_share,
        island_link=link,
        pair_link=link if entry.pair_gb_per_s is None else entry.pair_gb_per_s * GB * LINK_SHARE,
        node_link=_node_link(hardware) * GB * LINK_SHARE,
        host_bus=entry.host_gb_per_s * GB * LINK_SHARE,
        origin=origin,
    )


def num_nodes_of(num_devices: int, hardware: Hardware) -> int:
    """Return the nodes that so many devices fill."""
    return ceil(num_devices / len(hardware.devices))


def _entry(key: str | None, name: str) -> CatalogueEntry | None:
    return by_key(key) if key is not None else by_printed_name(name)


def _node_link(hardware: Hardware) -> float:
    rates = [nic.rate_gb_per_s for nic in hardware.nics if nic.rate_gb_per_s is not None]
    return sum(rates) / len(hardware.devices) if rates else NIC_GB_PER_S
