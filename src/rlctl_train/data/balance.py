"""Spread sequences evenly: over ranks, and over micro-batches under a token budget."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence


def balance(workloads: Sequence[float], num_parts: int, equal_size: bool) -> list[list[int]]:
    """Split indices into `num_parts` parts whose summed workloads are close; parts may be empty.

    The largest differencing method (Karmarkar and Karp 1982): join the two partial solutions that are most
    uneven, the heaviest part of one with the lightest of the other, until one is left. With `equal_size` no two
    parts differ by more than one index in length. Indices in a part are in ascending order.
    """
    if num_parts == 1:
        return [list(range(len(workloads)))]
    heap = [_entry(order, start) for order, start in enumerate(_starts(workloads, num_parts, equal_size))]
    heapq.heapify(heap)
    for order in range(len(heap), 2 * len(heap) - 1):
        one, other = heapq.heappop(heap)[2], heapq.heappop(heap)[2]
        joined = [(a + b, x + y) for (a, x), (b, y) in zip(one, reversed(other), strict=True)]
        heapq.heappush(heap, _entry(order, joined))
    parts = heap[0][2] if heap else [(0.0, [])] * num_parts
    return [sorted(indices) for _, indices in parts]


def micro_batches(
    lengths: Sequence[int],
    budget_tokens: int,
    min_parts: int = 1,
    workloads: Sequence[float] | None = None,
) -> list[list[int]]:
    """Cut rows into as few micro-batches as fit `budget_tokens` each, evenly loaded.

    At least `min_parts` are returned, some of them empty if rows are fewer. A row longer than the budget travels
    alone. `workloads` (default: the lengths) are what is evened out; the budget is always in tokens.
    """
    num_parts = max(min_parts, math.ceil(sum(lengths) / budget_tokens), 1)
    while True:
        parts = balance(lengths if workloads is None else workloads, num_parts, equal_size=False)
        if all(len(part) <= 1 or sum(lengths[i] for i in part) <= budget_tokens for part in parts):
            return parts
        num_parts += 1


def workload(length: int, num_params: int, attention_width: int) -> float:
    """Return the floating-point operations of one causal forward pass over `length` tokens.

    `num_params` take part in matrix products; `attention_width` is layers x heads x head size. Scores and their
    product with the values cost 4 x width operations per pair of tokens, of which causality needs half.
    """
    return 2.0 * num_params * length + 2.0 * attention_width * length**2


_Part = tuple[float, list[int]]


def _starts(workloads: Sequence[float], num_parts: int, equal_size: bool) -> list[list[_Part]]:
    """Return one partial solution per index, or, for parts of equal size, one per `num_parts` indices."""
    if not equal_size:
        return [[(float(load), [i])] + [(0.0, [])] * (num_parts - 1) for i, load in enumerate(workloads)]
    descending = sorted(range(len(workloads)), key=lambda i: -workloads[i])
    rows = [descending[i : i + num_parts] for i in range(0, len(descending), num_parts)]
    return [[(float(workloads[i]), [i]) for i in row] + [(0.0, [])] * (num_parts - len(row)) for row in rows]


def _entry(order: int, parts: list[_Part]) -> tuple[float, int, list[_Part]]:
    """Return a heap entry: most uneven first, then oldest; parts from heavy to light."""
    parts = sorted(parts, key=lambda part: -part[0])
    return parts[-1][0] - parts[0][0], order, parts
