"""What the readers of folders share: JSON that is what it should be, steps that a file names, dtypes in words."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rlctl_train.checkpoint.inert_pickle import damaged
from rlctl_train.checkpoint.stored import NamedTensor
from rlctl_train.config.errors import FAILED, UserError


def read_table(path: Path) -> dict[str, Any]:
    """Return what a JSON file says; raises UserError where that is no table."""
    try:
        table = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise damaged(str(path), f"it is no JSON file ({error})") from error
    if not isinstance(table, dict):
        raise damaged(str(path), "it holds something else than a table")
    return table


def missing(path: Path, what: str) -> UserError:
    """Say that a checkpoint lacks a part."""
    return UserError(f"{path}: {what}", "copy the checkpoint again, with all of its files", exit_code=FAILED)


def some(names: Iterable[str], most: int = 5) -> str:
    """Return names for a message: the first few, and how many more there are."""
    ordered = sorted(names)
    more = f" and {len(ordered) - most} more" if len(ordered) > most else ""
    return ", ".join(ordered[:most]) + more


def dtype_words(tensors: Iterable[NamedTensor]) -> str:
    """Return the dtypes of tensors, the commonest first: `bfloat16`, or `bfloat16, float32 (of 2)`."""
    counts = Counter(str(tensor.dtype).removeprefix("torch.") for tensor in tensors).most_common()
    return ", ".join(f"{name} (of {count})" if place else name for place, (name, count) in enumerate(counts))
