"""Launchers: each starts a run's driver somewhere and can end it. A launcher is a module with the command `DOOR` and
the functions `submit(run, cwd, environment)`, `interrupt(run)`, `kill(run)`, `stop(run, timeout_s)`.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

LAUNCHERS = {"local": "rlctl.launchers.local"}


def chosen(flags: Mapping[str, bool]) -> str:
    """Return the launcher whose flag is set; without one, this machine's."""
    return next((name for name, is_set in flags.items() if is_set), "local")


def load(name: str) -> Any:
    """Import the launcher of that name."""
    return importlib.import_module(LAUNCHERS[name])
