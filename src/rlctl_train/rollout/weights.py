"""Weights of a Hugging Face model, replaced in place by name."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlctl_train.checksum import checksum


class WeightError(ValueError):
    """Weights that do not belong to this model; the message names them."""


class WeightStore:
    """The parameters and persistent buffers of one model, under all their names.

    Tied tensors have several names; any of them updates the tensor.
    """

    def __init__(self, model: PreTrainedModel, dtype: torch.dtype) -> None:
        self._held: dict[str, Tensor] = model.state_dict(keep_vars=True)
        self._required = {id(p) for p in model.parameters()}
        self._dtype = dtype
        self._received: set[str] = set()

    def start(self) -> None:
        """Forget what an earlier, unfinished update brought."""
        self._received.clear()

    @torch.no_grad()
    def take(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Write tensors in place; an unknown name or a wrong shape raises WeightError before it is written."""
        for name, tensor in tensors:
            held = self._held.get(name)
            if held is None:
                near = difflib.get_close_matches(name, self._held, n=1)
                raise WeightError(f"the model has no weight {name!r}" + (f"; nearest: {near[0]!r}" if near else ""))
            if held.shape != tensor.shape:
                raise WeightError(f"{name!r} has shape {tuple(tensor.shape)}, the model needs {tuple(held.shape)}")
            held.copy_(tensor)
            self._received.add(name)

    def finish(self) -> str:
        """Return the checksum of what the model now holds under the received names; all weights must have come."""
        got = {id(self._held[name]) for name in self._received}
        missing = [n for n, t in self._held.items() if id(t) in self._required and id(t) not in got]
        if missing:
            raise WeightError(f"{len(missing)} weights did not come: {some(missing)}")
        held = checksum(((name, self._held[name]) for name in self._received), self._dtype)
        self._received.clear()
        return held


def some(names: Collection[str], most: int = 5) -> str:
    """Return the first few names, sorted."""
    return ", ".join(sorted(names)[:most]) + (", ..." if len(names) > most else "")
