"""Visibility variables: which of the physical devices a process is shown, and in which order.

`CUDA_VISIBLE_DEVICES`, `ROCR_VISIBLE_DEVICES`, `HIP_VISIBLE_DEVICES` and `ASCEND_RT_VISIBLE_DEVICES` are lists of
indices or UUIDs with the same rule: the list ends at the first entry that names nothing (so the empty string, `-1`
and `NoDevFiles` show no device). They differ in what an entry named twice does.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

UUID = re.compile(r"(GPU|MIG)-.*", re.DOTALL)


@dataclass(frozen=True)
class Name:
    """What an entry may call a device; `index` is None for what only a UUID can name, such as a MIG slice."""

    index: int | None
    uuid: str | None = None


@dataclass(frozen=True)
class Selection:
    """Places of the chosen devices in the order that the process counts them, and what is odd about the list."""

    places: tuple[int, ...]
    note: str | None = None


def select(
    variable: str, setting: str | None, names: Sequence[Name], *, repeats: Literal["none", "end", "skip"] = "none"
) -> Selection:
    """Apply a visibility list to devices; unset shows every device that has an index.

    A UUID may be shortened as long as it stays the beginning of a single one (`GPU-8a`). An entry named twice leaves
    no device at all (CUDA), ends the list (ROCr, Ascend) or counts once (HIP).
    """
    if setting is None:
        return Selection(tuple(place for place, name in enumerate(names) if name.index is not None))
    chosen: list[int] = []
    for entry in (part.strip() for part in setting.split(",")):
        place = _place(entry, names)
        if place is None:
            return Selection(tuple(chosen), _about_the_end(variable, entry))
        if place in chosen and repeats == "skip":
            continue
        if place in chosen and repeats == "end":
            return Selection(tuple(chosen), f"{variable}={setting} names a device twice: the list ends there")
        if place in chosen:
            return Selection((), f"{variable}={setting} names a device twice: none is shown then")
        chosen.append(place)
    return Selection(tuple(chosen))


def _place(entry: str, names: Sequence[Name]) -> int | None:
    if UUID.fullmatch(entry):
        places = [place for place, name in enumerate(names) if name.uuid and name.uuid.startswith(entry)]
        return places[0] if len(places) == 1 else None
    if not (entry.isascii() and entry.isdigit()):
        return None
    index = entry.lstrip("0") or "0"
    return next((place for place, name in enumerate(names) if str(name.index) == index), None)


def _about_the_end(variable: str, entry: str) -> str | None:
    # These are the ways to ask for no device; anything else was meant to name one.
    if entry in ("", "-1", "NoDevFiles"):
        return None
    return f"{variable}: no single device is called {entry}, and the list ends there"
