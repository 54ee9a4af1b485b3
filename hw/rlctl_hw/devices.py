"""The device catalogue: what is known of each accelerator by name, read from `devices.toml`."""

from __future__ import annotations

import difflib
import tomllib
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Literal

from rlctl_hw.types import Origin

MATMUL_SHARE = {"cuda": 0.75, "rocm": 0.5, "ascend": 0.7}
"""Of peak, for parts that nobody measured: below the lowest measured share of the vendor's newest generations (NVIDIA
0.73 to 0.87, AMD 0.51 to 0.68); one Ascend 910B was seen at 0.8."""
BANDWIDTH_SHARE = 0.8
"""Of the sheet's memory bandwidth, that streaming kernels reach."""


@dataclass(frozen=True)
class CatalogueEntry:
    """One row of `devices.toml`; units are in its header."""

    key: str
    kind: Literal["cuda", "rocm", "ascend"]
    names: tuple[str, ...]
    aliases: tuple[str, ...]
    memory_gib: float
    bandwidth_gb_per_s: float
    confidence: Literal["H", "M"]
    link: Literal["NVLink", "xGMI", "HCCS", "PCIe"]
    link_gb_per_s: float
    devices_per_node: int
    host_gb_per_s: float
    architecture: str
    memory_mib: int | None = None
    bf16_tflops: float | None = None
    fp8_tflops: float | None = None
    matmul_share: float | None = None
    matmul_origin: Literal["measured", "interpolated"] | None = None
    pair_gb_per_s: float | None = None
    peer_access: bool = True
    node_span: int = 1
    compute_capability: str | None = None

    @property
    def reachable_share(self) -> tuple[float, Origin]:
        """Return the share of the bfloat16 peak that large matrix products reach, and where it is from."""
        if self.matmul_share is None:
            return MATMUL_SHARE[self.kind], "assumed"
        return self.matmul_share, self.matmul_origin or "assumed"


@cache
def catalogue() -> tuple[CatalogueEntry, ...]:
    """Return every row, in file order."""
    rows = tomllib.loads((files("rlctl_hw") / "devices.toml").read_text(encoding="utf-8"))["device"]
    lists = ("names", "aliases")
    return tuple(CatalogueEntry(**{**row, **{key: tuple(row[key]) for key in lists}}) for row in rows)


def by_key(key: str) -> CatalogueEntry:
    """Return the row a person means; an unknown name raises ValueError that lists the nearest ones."""
    wanted = key.strip().lower()
    known = {name: entry for entry in catalogue() for name in (entry.key, *entry.aliases)}
    if wanted in known:
        return known[wanted]
    near = difflib.get_close_matches(wanted, known, n=5, cutoff=0.5)
    nearest = list(dict.fromkeys(known[name].key for name in near)) or [entry.key for entry in catalogue()]
    raise ValueError(f"{key!r} is not a known device; nearest: {', '.join([*nearest, 'cpu'])}")


def by_printed_name(name: str) -> CatalogueEntry | None:
    """Return the row of a name as a vendor's tool prints it (old drivers leave out `NVIDIA `), or None."""
    wanted = _plain(name)
    return next((entry for entry in catalogue() if wanted in map(_plain, entry.names)), None)


def _plain(name: str) -> str:
    return " ".join(name.lower().removeprefix("nvidia ").split())
