"""Built-in shapes of published models, by hub id or short name, read from `models.toml`."""

from __future__ import annotations

import difflib
import tomllib
from functools import cache
from importlib.resources import files
from typing import Any

from rlctl_hw.model_shape import shape_from_config
from rlctl_hw.types import ModelShape


@cache
def known_models() -> dict[str, dict[str, Any]]:
    """Return the table of `models.toml`: short name to hub ids and sizes."""
    return tomllib.loads((files("rlctl_hw") / "models.toml").read_text(encoding="utf-8"))


def known_ids() -> tuple[str, ...]:
    """Return the hub ids whose shape is built in."""
    return tuple(hub_id for row in known_models().values() for hub_id in row["ids"])


def known_shape(hub_id: str) -> ModelShape | None:
    """Return the shape of a model the presets use, so that planning for it needs no network."""
    return next((_shape(name) for name, row in known_models().items() if hub_id in row["ids"]), None)


def named_shape(name: str) -> ModelShape:
    """Return the shape a person means by hub id or short name; an unknown one raises ValueError with the nearest."""
    wanted = name.strip().lower()
    names = {known: known for known in known_models()}
    names |= {hub_id.lower(): known for known, row in known_models().items() for hub_id in row["ids"]}
    if wanted in names:
        return _shape(names[wanted])
    near = dict.fromkeys(names[match] for match in difflib.get_close_matches(wanted, names, n=5, cutoff=0.5))
    raise ValueError(f"{name!r} is not a built-in model; nearest: {', '.join(near or known_models())}")


@cache
def _shape(name: str) -> ModelShape:
    return shape_from_config(known_models()[name])
