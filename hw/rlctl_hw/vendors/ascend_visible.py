"""Which NPUs a process is shown: `ASCEND_RT_VISIBLE_DEVICES`, which counts what a container was given.

`ASCEND_VISIBLE_DEVICES` speaks to the container runtime and hides nothing from a process that is already running.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from rlctl_hw.visibility import Name, select

RT, CONTAINER = "ASCEND_RT_VISIBLE_DEVICES", "ASCEND_VISIBLE_DEVICES"
NONE = ("", "-1", "NoDevFiles")
RANGE = re.compile(r"(\d{1,4})(?:-(\d{1,4}))?")


@dataclass(frozen=True)
class Visible:
    """Places of the shown NPUs among those that are here, the variables that decided, and what is odd about them."""

    places: tuple[int, ...]
    source: str
    notes: tuple[str, ...] = ()


def select_visible(num_here: int, env: Mapping[str, str]) -> Visible:
    """Apply the runtime's variable to the NPUs whose device files are here, counted from 0."""
    setting = env.get(RT)
    # The runtime reads digits and commas, and nothing behind the first other character.
    read = None if setting is None else (re.match(r"[0-9,]*", setting) or [""])[0]
    selection = select(RT, read, [Name(place) for place in range(num_here)], repeats="end")
    notes = [selection.note] if selection.note else []
    if setting is not None and read != setting and setting not in NONE:
        notes.append(f"{RT}={setting}: the runtime reads only {read!r} of it")
    if list(selection.places) != sorted(selection.places):
        notes.append(f"{RT}={setting}: the runtime wants the numbers in ascending order")
    notes.extend(_about_container(num_here, env))
    settings = [f"{name}={env[name]}" for name in (RT, CONTAINER) if name in env]
    return Visible(selection.places, ", ".join(settings) or "all", tuple(notes))


def _about_container(num_here: int, env: Mapping[str, str]) -> list[str]:
    asked = count_container_list(env.get(CONTAINER, ""))
    if asked is None or asked == num_here:
        return []
    return [
        f"{CONTAINER} asks the container runtime for {asked} NPUs, and {num_here} are here: it has no effect on "
        f"processes; {RT} hides devices from them"
    ]


def count_container_list(setting: str) -> int | None:
    """Count the entries of a list with ranges (`0-3,6`); None for anything else."""
    found = [RANGE.fullmatch(entry.strip()) for entry in setting.split(",")]
    chosen: set[int] = set()
    for entry in found:
        if entry is None:
            return None
        chosen.update(range(int(entry[1]), int(entry[2] or entry[1]) + 1))
    return len(chosen)
