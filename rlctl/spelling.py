"""The nearest known spelling of a misspelt word."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from rlctl_train.config.errors import UserError


def nearest(word: str, known: Iterable[str]) -> str | None:
    """Return the known spelling that is closest to `word`, or None when none is close."""
    found = difflib.get_close_matches(word[:200], list(known), n=1, cutoff=0.6)
    return found[0] if found else None


def unknown(kind: str, word: str, known: Iterable[str], otherwise: str) -> UserError:
    """Return the error for a name that does not exist: the nearest one, or `otherwise` as the way out."""
    near = nearest(word, known)
    return UserError(f"there is no {kind} {word!r}", f"did you mean {near}?" if near else otherwise)
