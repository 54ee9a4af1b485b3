"""AMD's kernel driver as sysfs shows it (KFD topology): needs no tool and no library.

Every GPU, or partition of one, is a node with SIMD units; links name the nodes that they join. A container may not
read the nodes of GPUs that it was not given.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from rlctl_hw.host import Host

NODES = "/sys/class/kfd/kfd/topology/nodes"
XGMI = 11
"""`type` of a link (HSA_IOLINK_TYPE_XGMI); 2 is PCIe."""
FRAMEBUFFER_HEAPS = (1, 2)
"""`heap_type` of memory on the device (public and private frame buffer); 0 is the host's."""
SIMDS_PER_CU = 4


@dataclass(frozen=True)
class Node:
    """One GPU node."""

    number: int
    architecture: str | None
    device_id: int
    compute_units: int
    num_xcc: int
    """Compute dies that the node spans; 0 where the driver does not say."""
    unique_id: int
    """Serial number of the card; partitions of one card share it. 0 where there is none."""
    hive_id: int
    """The group of cards that xGMI joins; 0 for none."""
    render_minor: int
    domain: int
    location: int
    """Bus, device and function: 8, 5 and 3 bits. The partitions of a card count up in the function."""
    memory_bytes: int | None = None


@dataclass(frozen=True)
class IoLink:
    """A link from one node to another."""

    first: int
    second: int
    type: int


@dataclass(frozen=True)
class Topology:
    """The GPU nodes of a machine in the order in which ROCm counts them."""

    nodes: tuple[Node, ...] = ()
    links: tuple[IoLink, ...] = ()
    hidden: tuple[int, ...] = ()
    """Numbers of nodes that this process may not read."""


def read(host: Host) -> Topology:
    """Read every node; an empty topology where the driver is not loaded."""
    nodes: list[Node] = []
    links: list[IoLink] = []
    hidden: list[int] = []
    for number in sorted(int(name) for name in host.listdir(NODES) if name.isascii() and name.isdigit()):
        text = host.read(f"{NODES}/{number}/properties")
        node = parse_node(number, text or "")
        if not text:
            hidden.append(number)
        elif node is not None:
            nodes.append(replace(node, memory_bytes=_memory(host, node)))
            links.extend(_links(host, number))
    return Topology(tuple(nodes), tuple(links), tuple(hidden))


def parse_properties(text: str) -> dict[str, int]:
    """Read `name number` lines; anything else is passed over."""
    numbers = {}
    for line in text.splitlines():
        match line.split():
            case [name, number] if number.isascii() and number.isdigit() and len(number) <= 20:
                numbers[name] = int(number)
    return numbers


def parse_node(number: int, text: str) -> Node | None:
    """Read the properties of a node; None for a CPU."""
    values = parse_properties(text)
    simds = values.get("simd_count", 0)
    if simds == 0:
        return None
    return Node(
        number=number,
        architecture=gfx_name(values.get("gfx_target_version", 0)),
        device_id=values.get("device_id", 0),
        compute_units=simds // (values.get("simd_per_cu", 0) or SIMDS_PER_CU),
        num_xcc=values.get("num_xcc", 0),
        unique_id=values.get("unique_id", 0),
        hive_id=values.get("hive_id", 0),
        render_minor=values.get("drm_render_minor", 0),
        domain=values.get("domain", 0),
        location=values.get("location_id", 0),
    )


def parse_link(text: str) -> IoLink | None:
    """Read the properties of a link; None where it does not say what it joins."""
    values = parse_properties(text)
    if not {"type", "node_from", "node_to"} <= values.keys():
        return None
    return IoLink(values["node_from"], values["node_to"], values["type"])


def parse_memory(text: str) -> int:
    """Read the properties of a memory bank, in bytes; 0 for memory of the host."""
    values = parse_properties(text)
    return values.get("size_in_bytes", 0) if values.get("heap_type") in FRAMEBUFFER_HEAPS else 0


def gfx_name(version: int) -> str | None:
    """Name a target version: 90402 is gfx942 and 90010 gfx90a (the last digit is hexadecimal)."""
    if version <= 0:
        return None
    return f"gfx{version // 10000}{version // 100 % 100:x}{version % 100:x}"


def pci_address(domain: int, location: int) -> str:
    """Spell a location as the bus does: 0000:c6:00.0."""
    return f"{domain:04x}:{location >> 8 & 0xFF:02x}:{location >> 3 & 0x1F:02x}.{location & 7}"


def _memory(host: Host, node: Node) -> int | None:
    banks = f"{NODES}/{node.number}/mem_banks"
    sizes = [parse_memory(host.read(f"{banks}/{bank}/properties") or "") for bank in host.listdir(banks)]
    return sum(sizes) or None


def _links(host: Host, number: int) -> Iterator[IoLink]:
    folder = f"{NODES}/{number}/io_links"
    for name in host.listdir(folder):
        link = parse_link(host.read(f"{folder}/{name}/properties") or "")
        if link is not None:
            yield link
