"""How fast the hardware is: what a device computes and reads, and what links, buses and disks carry, per second."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import ceil

from rlctl_hw.devices import BANDWIDTH_SHARE, CatalogueEntry, by_key, by_printed_name
from rlctl_hw.types import Dtype, Hardware, Origin

GB = 1e9
LINK_SHARE = 0.8
"""Of a link's nominal rate, that collectives over large tensors reach (NVLink, xGMI and InfiniBand: 0.75 to 0.9)."""
NIC_GB_PER_S = 50.0
"""Of one device between nodes, where no port is known: one 400 Gb/s port a device, as training clusters have."""

UNKNOWN_LINK_GB_PER_S = 12.0
"""Of a device that is not in the catalogue: a PCIe 3 slot of 16 lanes, the least that training machines have."""


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


def peak_tflops(hardware: Hardware, dtype: Dtype) -> float | None:
    """Return the dense peak of one device by its sheet, 1e12 operations per second; None where the catalogue has none
    in this precision."""
    entry = catalogue_entry(hardware)
    return None if entry is None or dtype != "bfloat16" else entry.bf16_tflops


def speeds_of(hardware: Hardware) -> Speeds | None:
    """Return the rates of this machine; None for a device that was not measured and has no known bfloat16 peak."""
    entry, measured = catalogue_entry(hardware), hardware.corrections
    if entry is None or entry.bf16_tflops is None:
        return _measured_alone(hardware)
    share, origin = entry.reachable_share
    flops, bandwidth = entry.bf16_tflops * 1e12 * share, entry.bandwidth_gb_per_s * GB * BANDWIDTH_SHARE
    if measured.matmul_tflops is not None:
        flops, origin = measured.matmul_tflops * 1e12, "measured"
    if measured.bandwidth_gb_per_s is not None:
        bandwidth = measured.bandwidth_gb_per_s * GB
    link = entry.link_gb_per_s * GB * LINK_SHARE
    return Speeds(
        matmul_flops=flops,
        bandwidth=bandwidth,
        island_link=link,
        pair_link=link if entry.pair_gb_per_s is None else entry.pair_gb_per_s * GB * LINK_SHARE,
        node_link=_node_link(hardware) * GB * LINK_SHARE,
        host_bus=entry.host_gb_per_s * GB * LINK_SHARE,
        origin=origin,
    )


def _measured_alone(hardware: Hardware) -> Speeds | None:
    """Return rates for a device that only a measurement knows; processes on a CPU send through its memory."""
    measured = hardware.corrections
    if measured.matmul_tflops is None or measured.bandwidth_gb_per_s is None:
        return None
    bandwidth = measured.bandwidth_gb_per_s * GB
    link = bandwidth if hardware.kind == "cpu" else UNKNOWN_LINK_GB_PER_S * GB
    node = _node_link(hardware) * GB * LINK_SHARE
    return Speeds(measured.matmul_tflops * 1e12, bandwidth, link, link, node, link, "measured")


def num_nodes_of(num_devices: int, hardware: Hardware) -> int:
    """Return the nodes that so many devices fill."""
    return ceil(num_devices / len(hardware.devices))


@lru_cache(maxsize=256)
def _entry(key: str | None, name: str) -> CatalogueEntry | None:
    return by_key(key) if key is not None else by_printed_name(name)


def _node_link(hardware: Hardware) -> float:
    rates = [nic.rate_gb_per_s for nic in hardware.nics if nic.rate_gb_per_s is not None]
    return sum(rates) / len(hardware.devices) if rates else NIC_GB_PER_S
