"""Values a key of a run could have instead: every other choice, and of numbers the legal ones around the present."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from rlctl_hw.model_catalogue import known_ids, known_shape

from rlctl import schema
from rlctl.explaining.leaves import Leaf, doc_of, meanings
from rlctl.overrides import Assignment
from rlctl.problems import InvalidConfig
from rlctl.resolve import Resolved, vary

HERE = "alternative"
LOWER = (1 / 2, 3 / 4, 7 / 8, 1 / 3, 1 / 4)
HIGHER = (2, 3, 3 / 2, 5 / 4, 9 / 8, 4)
"""Multiples that are tried in turn until one is legal."""
DIGITS = 3
FROM_ZERO = 0.1
"""What is tried above 0, which no multiple leaves; of whole numbers it is 1."""
MODEL = "model.path"


@dataclass(frozen=True)
class Alternative:
    """A value, what it means, and the run with it, or the problem that it would be."""

    value: Any
    meaning: str
    varied: Resolved | None
    problem: str | None = None


def alternatives(resolved: Resolved, leaf: Leaf, value: Any) -> list[Alternative]:
    """Return what else the key could be; `value` is what holds now, the planner's where the key is unset."""
    found = [varied_by(resolved, leaf, other, meaning) for other, meaning in _named(leaf, value)]
    if _is_number(value):
        found += [one for side in _around(leaf, value) if (one := _first_legal(resolved, leaf, side))]
    if leaf.node.is_nullable and leaf.value is not None:
        found.append(varied_by(resolved, leaf, None, "unset"))
    return found


def probe(resolved: Resolved, leaf: Leaf) -> Alternative | None:
    """Return the run with any other value, for a key of which no alternative can be named; None where none is legal."""
    candidates: tuple[Any, ...] = ("other", 1, 0.5, 1.5, [0.5, 0.5], ["other"], {"other": 1})
    tried = (varied_by(resolved, leaf, value, "") for value in candidates if value != leaf.value)
    return next((one for one in tried if one.varied is not None), None)


def varied_by(resolved: Resolved, leaf: Leaf, value: Any, meaning: str) -> Alternative:
    """Return the run with one value changed, or what would be wrong with it."""
    try:
        return Alternative(value, meaning, vary(resolved, [Assignment(leaf.path, value, HERE)]))
    except InvalidConfig as error:
        finding = error.findings[0]
        what = finding.what if finding.key == leaf.key else f"{finding.key} {finding.what}"
        return Alternative(value, meaning, None, what)


def _named(leaf: Leaf, value: Any) -> Iterator[tuple[Any, str]]:
    """Yield the other values of a key that has a few, each with its meaning."""
    node = leaf.node
    if leaf.variants:
        yield from ((schema.tag(m), doc_of(m)) for m in leaf.variants if schema.tag(m) != value)
    elif node.models:
        yield from (({} if (tag := schema.tag(m)) is None else {"type": tag}, doc_of(m)) for m in node.models)
    elif models := schema.element_models(node):
        yield from (([{"type": schema.tag(m)}], doc_of(m)) for m in models)
    elif node.choices:
        texts = meanings(node)
        for choice in node.choices:
            if node.is_list and choice not in (value or ()):
                yield [choice], texts.get(choice, "")
            elif not node.is_list and choice != value:
                yield choice, texts.get(choice, "")
    elif bool in node.parts:
        yield from ((other, "") for other in (True, False) if other != value)
    elif leaf.key == MODEL:
        yield from _other_sizes(value)


def _other_sizes(model: str) -> Iterator[tuple[str, str]]:
    """Yield the next smaller and the next larger built-in model of the same architecture."""
    present = known_shape(model)
    if present is None:
        return
    sizes = {name: shape.num_params for name in known_ids() if (shape := known_shape(name)) and
             shape.architecture == present.architecture}  # fmt: skip
    smaller = [name for name, size in sizes.items() if size < present.num_params]
    larger = [name for name, size in sizes.items() if size > present.num_params]
    for names, nearest in ((smaller, max), (larger, min)):
        if names:
            name = nearest(names, key=lambda one: sizes[one])
            yield name, f"{sizes[name] / 1e9:.3g} billion parameters"


def _around(leaf: Leaf, value: float) -> Iterator[list[float]]:
    """Yield what to try below a number, above it, and 0, which often turns things off."""
    whole = float not in leaf.node.parts
    if value == 0:
        yield [1 if whole else FROM_ZERO]
        return
    for factors, step in ((LOWER, -1), (HIGHER, 1)):
        numbers = [_rounded(value * factor, whole) for factor in factors]
        numbers += [value + step] if whole else []
        yield [number for number in numbers if (number < value) == (step < 0) and number not in (value, 0)]
    yield [0]


def _rounded(number: float, whole: bool) -> float:
    return int(number) if whole else float(f"{number:.{DIGITS}g}")


def _first_legal(resolved: Resolved, leaf: Leaf, numbers: list[float]) -> Alternative | None:
    tried = (varied_by(resolved, leaf, number, "") for number in numbers)
    return next((one for one in tried if one.varied is not None), None)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
