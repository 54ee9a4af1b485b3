"""Two flat tables side by side: the keys in which they differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

ABSENT = "(absent)"
Difference = tuple[str, Any, Any]


def differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[Difference]:
    """Return (key, first value, second value) where they differ, in the first table's order."""
    keys = dict.fromkeys([*first, *second])
    pairs = ((key, first.get(key, ABSENT), second.get(key, ABSENT)) for key in keys)
    return [(key, a, b) for key, a, b in pairs if a != b]


def to_json(rows: Sequence[Difference]) -> list[dict[str, Any]]:
    """Return the differences as records."""
    return [{"key": key, "first": a, "second": b} for key, a, b in rows]
