"""Typed configuration of a run: frozen pydantic models, no torch.

The names are imported on first use, so that `errors` and `layout` cost no pydantic import.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlctl_train.config.relations import Problem, relation_problems
    from rlctl_train.config.run import RunConfig

__all__ = ["Problem", "RunConfig", "relation_problems"]

_HOMES = {
    "Problem": "rlctl_train.config.relations",
    "relation_problems": "rlctl_train.config.relations",
    "RunConfig": "rlctl_train.config.run",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
