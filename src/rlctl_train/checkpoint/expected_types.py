"""What is known of a model's tensors without any weights: names, shapes, ties."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Block:
    """A tensor of a file as a block of a tensor of the model, contiguous in C order."""

    name: str
    first: int
    """Element of the model's tensor it begins with."""
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Expected:
    """Names and shapes of a model's tensors."""

    shapes: Mapping[str, tuple[int, ...]]
    """Of every tensor that a file may hold, tied ones included, in the model's order."""
    tied: Mapping[str, str] = field(default_factory=dict)
    """Name that may be left out -> name that stands for it."""
    inner: Mapping[str, tuple[Block, ...]] = field(default_factory=dict)
    """Names that the model has in memory and files have not -> what they are in files."""
    vocabulary: tuple[str, ...] = ()
    """Names of input and output embeddings, whose rows are tokens."""
    base: str | None = None
    """Class of the model without its head."""
    ignored: tuple[str, ...] = ()
    """Patterns of names that old files hold and loading passes over."""

    def is_ignored(self, name: str) -> bool:
        """Say whether loading passes over a tensor of that name."""
        return any(re.search(pattern, name) for pattern in self.ignored)
