"""JSON as AMD's tools print it: with warnings before it, text after it, and commas before closing brackets."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

TRAILING_COMMA = re.compile(r",(?=\s*[\]}])")
STARTS = re.compile(r"^\s*[\[{]", re.MULTILINE)
MAX_STARTS = 16
"""Lines tried as the beginning; the tools print a handful of warnings at most."""


def parse_document(text: str) -> Any:
    """Return the first object or array of a text, or None."""
    for attempt in (text, TRAILING_COMMA.sub("", text)):
        for start in [found.end() - 1 for found in STARTS.finditer(attempt)][:MAX_STARTS]:
            try:
                return json.JSONDecoder().raw_decode(attempt, start)[0]
            # Brackets of a message that is no document, or brackets without end.
            except (ValueError, RecursionError):
                continue
    return None


def records(document: Any) -> Iterator[dict[str, Any]]:
    """Yield the objects of a list, or the object itself."""
    for item in document if isinstance(document, list) else [document]:
        if isinstance(item, dict):
            yield item


def words(value: Any) -> str | None:
    """Return a value's text; None for what is absent and for the ways of saying so."""
    text = str(value).strip() if isinstance(value, str | int | float) else ""
    return None if text.lower() in ("", "n/a", "none", "unknown", "nan") else text


def lowered(value: Any) -> str | None:
    """Return a value's text as the kernel spells addresses."""
    text = words(value)
    return text and text.lower()


def number(value: Any) -> int | None:
    """Return a whole number, also from `0x74a1` or `"304"`; None for anything else."""
    text = words(value)
    if text is None or len(text) > 40 or isinstance(value, bool):
        return None
    try:
        return int(text, 16) if text.lower().startswith("0x") else int(float(text))
    except (ValueError, OverflowError):
        return None
