"""Launchers: each starts a run's driver somewhere and can say how it goes. A module of functions
`submit(run, cwd, environment)`, `interrupt(run)`, `kill(run)`, `stop(run, timeout_s)`."""

from __future__ import annotations

import importlib
from typing import Any

LAUNCHERS = {"local": "rlctl.launchers.local"}


def load(name: str) -> Any:
    """Import the launcher of that name."""
    return importlib.import_module(LAUNCHERS[name])
