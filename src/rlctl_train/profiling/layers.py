"""Every layer's forward pass as a range, by hooks that are there only while somebody listens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from torch import nn

from rlctl_train.profiling.ranges import mark


@contextmanager
def layer_ranges(layers: Sequence[nn.Module]) -> Iterator[None]:
    """Mark each call of a layer in the body, recomputing included, as the range `layer N`, counted from 0."""
    handles = [
        handle
        for number, layer in enumerate(layers)
        for begin, end in [_hooks(f"layer {number}")]
        for handle in (layer.register_forward_pre_hook(begin), layer.register_forward_hook(end, always_call=True))
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hooks(name: str) -> tuple[Callable[..., None], Callable[..., None]]:
    """Return what opens and what closes the range; both belong to one layer, whose calls do not overlap."""
    opened: list[AbstractContextManager[object]] = []

    def begin(module: nn.Module, arguments: Any) -> None:
        one = mark(name)
        one.__enter__()
        opened.append(one)

    def end(module: nn.Module, arguments: Any, output: Any) -> None:
        if opened:
            opened.pop().__exit__(None, None, None)

    return begin, end
