"""Devices on the PCI bus: they are there even when their driver is not."""

from __future__ import annotations

from collections.abc import Sequence

from rlctl_hw.host import Host

BUS = "/sys/bus/pci/devices"


def find_on_bus(host: Host, vendor: str, classes: Sequence[str]) -> dict[str, str]:
    """Return the device ids by address of a vendor's devices whose class code starts with one of `classes`."""
    found = {}
    for address in host.listdir(BUS):
        if host.read(f"{BUS}/{address}/vendor") != vendor:
            continue
        if (host.read(f"{BUS}/{address}/class") or "").startswith(tuple(classes)):
            found[address] = host.read(f"{BUS}/{address}/device") or ""
    return found
