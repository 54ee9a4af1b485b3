"""The device catalogue: what is known of each accelerator by name, read from `devices.toml`."""

from __future__ import annotations

import difflib
import tomllib
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Literal


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
    bf16_tflops: float | None = None
    compute_capability: str | None = None


@cache
def catalogue() -> tuple[CatalogueEntry, ...]:
    """Return every row, in file order."""
    rows = tomllib.loads((files("rlctl_hw") / "devices.toml").read_text(encoding="utf-8"))["device"]
    return tuple(
        CatalogueEntry(**{**row, "names": tuple(row["names"]), "aliases": tuple(row["aliases"])}) for row in rows
    )


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
