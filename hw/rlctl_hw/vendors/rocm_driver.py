"""AMD GPUs as the kernel driver shows them: which card each node belongs to, its share of it, and who may open it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import combinations

from rlctl_hw.host import Host
from rlctl_hw.types import Link
from rlctl_hw.vendors import amd_smi, kfd
from rlctl_hw.vendors.amd_gpu import WHOLE, Answer, Gpu, Physical, product_of, uuid_of
from rlctl_hw.vendors.pci import find_gpus

GIB = 2**30
KFD = "/dev/kfd"
MODES = {1: "SPX", 2: "DPX", 3: "TPX", 4: "QPX"}
"""Compute partitions by their number on a card, where one spans several dies; one a die is CPX."""


def read_driver(host: Host) -> Physical | None:
    """Return every GPU that the driver shows and those that this process can open; None without the driver."""
    topology = kfd.read(host)
    numbers = sorted([*topology.hidden, *(node.number for node in topology.nodes)])
    if not numbers:
        return None
    order = {number: index for index, number in enumerate(numbers)}
    gpus = [_gpu(host, node, order[node.number], topology.nodes) for node in topology.nodes]
    if any(product_of(gpu) is None for gpu in gpus):
        gpus = _with_printed_names(gpus, amd_smi.read(host))
    usable, absent, errors = _openable(host, list(zip(gpus, topology.nodes, strict=True)))
    shown = {gpu.pci for gpu in gpus}
    # Of the nodes that are not readable the addresses are unknown too.
    missing = [] if topology.hidden else [address for address in find_gpus(host) if address not in shown]
    withheld = sorted([*(order[number] for number in topology.hidden), *absent])
    return Physical(
        gpus=tuple(gpus),
        usable=usable,
        source=kfd.NODES,
        errors=errors,
        links=_driver_links(topology, order),
        links_source=f"{kfd.NODES}/*/io_links",
        missing=tuple(missing),
        withheld=tuple(f"GPU {index}" for index in withheld),
    )


def _gpu(host: Host, node: kfd.Node, index: int, nodes: Sequence[kfd.Node]) -> Gpu:
    card = [other for other in nodes if node.unique_id and other.unique_id == node.unique_id] or [node]
    # Partitions count up in the function of their address; on the bus there is the card alone.
    location = min(other.location for other in card)
    gpu = Gpu(
        index=index,
        architecture=node.architecture,
        device_id=node.device_id,
        compute_units=node.compute_units,
        uuid=uuid_of(node.unique_id),
        pci=kfd.pci_address(node.domain, location),
    )
    partition = _partition(host, gpu, node, card)
    return replace(
        gpu,
        memory_gib=_memory_gib(host, node, card),
        partition=partition,
        card_gib=_card_gib(host, card, "mem_info_vram_total"),
        used_gib=_card_gib(host, card, "mem_info_vram_used") if partition in WHOLE else None,
    )


def _memory_gib(host: Host, node: kfd.Node, card: Sequence[kfd.Node]) -> float | None:
    if node.memory_bytes:
        return node.memory_bytes / GIB
    whole = _card_gib(host, card, "mem_info_vram_total")
    return whole / len(card) if whole else None


def _card_gib(host: Host, card: Sequence[kfd.Node], file: str) -> float | None:
    size = host.read(f"{_drm(card[0])}/{file}") or ""
    return int(size) / GIB if size.isascii() and size.isdigit() and len(size) < 20 else None


def _partition(host: Host, gpu: Gpu, node: kfd.Node, card: Sequence[kfd.Node]) -> str | None:
    product = product_of(gpu)
    if product and product.die:
        return "GCD"
    printed = host.read(f"{_drm(card[0])}/current_compute_partition")
    if printed:
        return printed
    # A container may see fewer partitions than the card has; its compute units tell.
    share = round(product.compute_units / node.compute_units) if product and node.compute_units else 1
    parts = max(share, len(card))
    if node.num_xcc <= 1:
        return "CPX" if parts > 1 else None
    return MODES.get(parts)


def _drm(node: kfd.Node) -> str:
    return f"/sys/class/drm/renderD{node.render_minor}/device"


def _with_printed_names(gpus: Iterable[Gpu], answer: Answer) -> list[Gpu]:
    """Name GPUs that no table knows as `amd-smi` does, by their address."""
    names = {(gpu.pci or "").lower(): gpu.name for gpu in answer.gpus}
    return [gpu if product_of(gpu) else replace(gpu, name=names.get(gpu.pci or "")) for gpu in gpus]


def _openable(
    host: Host, gpus: Sequence[tuple[Gpu, kfd.Node]]
) -> tuple[tuple[Gpu, ...], tuple[int, ...], tuple[str, ...]]:
    """Return the GPUs whose device files this process can open (the runtime leaves out the others), the indices of
    those without one, and what is wrong with the rest."""
    if not host.exists(KFD):
        return (), (), (f"{KFD} is not here: give the container --device={KFD} --device=/dev/dri",)
    if not _may_open(host, KFD):
        return (), (), (f"{KFD} may not be opened: add the user to the groups render and video",)
    usable, absent, errors = [], [], []
    for gpu, node in gpus:
        file = f"/dev/dri/renderD{node.render_minor}"
        if not host.exists(file):
            absent.append(gpu.index)
        elif not _may_open(host, file):
            errors.append(f"GPU {gpu.index} cannot be used: {file} may not be opened; add the user to the group render")
        else:
            usable.append(gpu)
    if gpus and len(absent) == len(gpus):
        errors.append("no GPU has its /dev/dri/renderD file here: give the container --device=/dev/dri")
    return tuple(usable), tuple(absent), tuple(errors)


def _may_open(host: Host, file: str) -> bool:
    return bool(host.answer(f"access{file}", lambda: os.access(host.at(file), os.R_OK | os.W_OK)))


def _driver_links(topology: kfd.Topology, order: dict[int, int]) -> tuple[Link, ...]:
    types = {frozenset((link.first, link.second)): link.type for link in topology.links}
    found = []
    for first, second in combinations(topology.nodes, 2):
        link = types.get(frozenset((first.number, second.number)))
        # Where a link is not readable, a common hive says the same.
        same_hive = first.hive_id != 0 and first.hive_id == second.hive_id
        joined = same_hive if link is None else link == kfd.XGMI
        found.append(Link(order[first.number], order[second.number], "XGMI" if joined else "PCIE"))
    return tuple(found)
