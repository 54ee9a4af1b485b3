"""One AMD GPU as the probes describe it, and which product it is.

The architecture alone never decides: `gfx942` is an MI300X with 304 compute units and an MI308X with 80.
"""

from __future__ import annotations

from dataclasses import dataclass

from rlctl_hw.devices import by_printed_name
from rlctl_hw.types import Link

MEMORY_TOLERANCE = 0.05
"""Share by which reported memory may differ from the product's: drivers keep some, sheets round."""
WHOLE = (None, "SPX", "GCD")
"""Partitions that are what the catalogue has a row for and what the driver counts memory of."""


@dataclass(frozen=True)
class Gpu:
    """One GPU as ROCm counts them: a card, a partition of a card, or one of the two dies of an MI250."""

    index: int
    """Place among the GPUs of the machine, also of those that this process may not use."""
    name: str | None = None
    memory_gib: float | None = None
    architecture: str | None = None
    device_id: int | None = None
    compute_units: int | None = None
    uuid: str | None = None
    pci: str | None = None
    partition: str | None = None
    card_gib: float | None = None
    """Memory on the whole card; a GPU inside a CPU has little of its own and borrows the host's."""
    used_gib: float | None = None
    """Taken by whomever; nothing tells the share of a partition."""


@dataclass(frozen=True)
class Answer:
    """The GPUs that one source knows, and what went wrong on the way."""

    gpus: tuple[Gpu, ...]
    source: str
    errors: tuple[str, ...] = ()
    driver: str | None = None


@dataclass(frozen=True)
class Physical:
    """Every GPU of the machine, those that this process can open, and the ways between them by `Gpu.index`."""

    gpus: tuple[Gpu, ...]
    usable: tuple[Gpu, ...]
    source: str
    errors: tuple[str, ...] = ()
    links: tuple[Link, ...] = ()
    links_source: str = ""
    driver: str | None = None
    missing: tuple[str, ...] = ()
    """Addresses of cards on the bus that the driver does not show."""
    withheld: tuple[str, ...] = ()
    """GPUs that the driver knows and that were not given to this process, as a container's share goes."""


@dataclass(frozen=True)
class Product:
    """What AMD sells under some PCI device ids; numbers are of one whole device as ROCm counts them."""

    name: str
    architecture: str
    compute_units: int
    memory_gib: float
    device_ids: tuple[int, ...]
    die: bool = False
    """Two of these make one package."""


PRODUCTS = (
    Product("AMD Instinct MI50", "gfx906", 60, 32, (0x66A1,)),
    Product("AMD Instinct MI100", "gfx908", 120, 32, (0x738C,)),
    Product("AMD Instinct MI210", "gfx90a", 104, 64, (0x740F,)),
    Product("AMD Instinct MI250", "gfx90a", 104, 64, (0x740C,), die=True),
    Product("AMD Instinct MI250X", "gfx90a", 110, 64, (0x7408, 0x740C), die=True),
    Product("AMD Instinct MI300A", "gfx942", 228, 128, (0x74A0,)),
    Product("AMD Instinct MI300X", "gfx942", 304, 192, (0x74A1, 0x74A9, 0x74B5, 0x74BD)),
    Product("AMD Instinct MI308X", "gfx942", 80, 192, (0x74A2, 0x74A8, 0x74B6, 0x74BC)),
    Product("AMD Instinct MI325X", "gfx942", 304, 256, (0x74A5, 0x74B9)),
    Product("AMD Instinct MI350X", "gfx950", 256, 288, (0x75A0,)),
    Product("AMD Instinct MI355X", "gfx950", 256, 288, (0x75A3,)),
)
"""PCI device ids with the names in AMD's drivers; virtual functions and HF cards are listed with their card."""


def product_of(gpu: Gpu) -> Product | None:
    """Return what the GPU is: by device id, else where architecture, compute units and memory leave one product."""
    if gpu.device_id is not None:
        named = [product for product in PRODUCTS if gpu.device_id in product.device_ids]
        exact = [product for product in named if product.compute_units == gpu.compute_units]
        return (exact or named or [None])[0]
    fitting = [product for product in PRODUCTS if _fits(gpu, product)]
    return fitting[0] if len(fitting) == 1 else None


def name_of(gpu: Gpu) -> str:
    """Return the name a tool printed, else the product's, else what identifies the part."""
    product = product_of(gpu)
    if gpu.name or product:
        return gpu.name or (product.name if product else "")
    number = f" 0x{gpu.device_id:x}" if gpu.device_id is not None else ""
    return f"AMD GPU{number} ({gpu.architecture})" if gpu.architecture else f"AMD GPU{number}"


def catalogue_of(gpu: Gpu) -> str | None:
    """Return the key in `devices.toml`; the device id overrides a printed name."""
    product = product_of(gpu)
    entry = by_printed_name(product.name if product else gpu.name or "")
    return entry.key if entry else None


def uuid_of(unique_id: int) -> str | None:
    """Return the UUID that `ROCR_VISIBLE_DEVICES` accepts; parts without a serial number have none."""
    return f"GPU-{unique_id:016x}" if unique_id else None


def _fits(gpu: Gpu, product: Product) -> bool:
    if (gpu.architecture, gpu.compute_units) != (product.architecture, product.compute_units):
        return False
    return gpu.memory_gib is not None and abs(gpu.memory_gib / product.memory_gib - 1) <= MEMORY_TOLERANCE
