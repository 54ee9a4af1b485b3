"""Devices on the PCI bus: they are there even when their driver is not."""

from __future__ import annotations

from rlctl_hw.host import Host

BUS = "/sys/bus/pci/devices"
AMD, HUAWEI = "0x1002", "0x19e5"
DISPLAYS, ACCELERATORS = "0x03", "0x12"
"""How class codes of display controllers and of processing accelerators begin."""


def find_gpus(host: Host) -> list[str]:
    """Return the addresses of AMD's GPUs; Instinct cards are accelerators, others display controllers."""
    return _find(host, AMD, (DISPLAYS, ACCELERATORS))


def find_npus(host: Host) -> list[str]:
    """Return the addresses of Ascend's NPUs."""
    return _find(host, HUAWEI, (ACCELERATORS,))


def _find(host: Host, vendor: str, classes: tuple[str, ...]) -> list[str]:
    return [
        address
        for address in host.listdir(BUS)
        if host.read(f"{BUS}/{address}/vendor") == vendor
        and (host.read(f"{BUS}/{address}/class") or "").startswith(classes)
    ]
