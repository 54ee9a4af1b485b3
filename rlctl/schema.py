"""The keys of a configuration, read off its pydantic classes: what exists, what it means, which variant has it.

A *section* is a config class, or a union of them told apart by `type`; a *free table* takes any keys
(`rollout.engine_args`); everything else is a single value.
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from rlctl_train.config import RunConfig
from rlctl_train.config.base import Config

Path = tuple[str, ...]
Models = tuple[type[Config], ...]


@dataclass(frozen=True)
class Node:
    """One key. `owners` are the classes that have it, `fields` their definitions, in the same order."""

    path: Path
    owners: Models
    fields: tuple[FieldInfo, ...]

    @property
    def key(self) -> str:
        """Return the key as a user writes it."""
        return ".".join(self.path)

    @property
    def parts(self) -> tuple[Any, ...]:
        """Return the alternatives of the annotation, over all owners, `None` included."""
        return tuple(dict.fromkeys(part for field in self.fields for part in _alternatives(field.annotation)))

    @property
    def models(self) -> Models:
        """Return the config classes a section may be; empty for a single value."""
        return tuple(part for part in self.parts if isinstance(part, type) and issubclass(part, Config))

    @property
    def is_free(self) -> bool:
        """Return whether the key is a table that takes any keys."""
        return any(get_origin(part) is dict for part in self.parts)

    @property
    def is_nullable(self) -> bool:
        """Return whether the key may be unset."""
        return type(None) in self.parts

    @property
    def is_list(self) -> bool:
        """Return whether the value is a list."""
        return any(get_origin(part) is tuple for part in self.parts)

    @property
    def is_text(self) -> bool:
        """Return whether only text is allowed, so that `123` on the command line is text too."""
        values = [part for part in self.parts if part is not type(None)]
        return all(part is str or _is_text_literal(part) for part in values)

    @property
    def choices(self) -> tuple[Any, ...]:
        """Return the allowed values of an enumeration, or of the elements of a list of one; empty otherwise."""
        parts = [part for part in self.parts if part is not type(None)]
        elements = [e for part in parts for e in (get_args(part) if get_origin(part) is tuple else (part,))]
        return tuple(v for part in elements if get_origin(part) is Literal for v in get_args(part))

    @property
    def description(self) -> str:
        """Return the meaning of the key, with its unit."""
        return " ".join((self.fields[0].description or "").split())

    def type_text(self) -> str:
        """Return the type in plain words."""
        if self.models:
            return "section"
        parts = [part for part in self.parts if part is not type(None)]
        words = [_words(part) for part in parts if get_origin(part) is not Literal]
        words += [_one_of(self.choices)] if len(words) < len(parts) else []
        return " or ".join(dict.fromkeys(words)) + (" (may be unset)" if self.is_nullable else "")


def children(models: Models, prefix: Path = ()) -> dict[str, Node]:
    """Return the keys of a section, merged over its variants, in the order of definition."""
    owners: dict[str, list[tuple[type[Config], FieldInfo]]] = {}
    for model in models:
        for name, field in model.model_fields.items():
            owners.setdefault(name, []).append((model, field))
    return {
        name: Node((*prefix, name), tuple(m for m, _ in found), tuple(f for _, f in found))
        for name, found in owners.items()
    }


@cache
def find(path: Path, root: Models = (RunConfig,)) -> Node | None:
    """Return the node at `path`, or None; below a free table every key is the table's own node."""
    models, node = root, None
    for depth, name in enumerate(path):
        if node is not None and node.is_free:
            return node
        node = children(models, path[:depth]).get(name)
        if node is None:
            return None
        models = node.models
    return node


def leaves(models: Models = (RunConfig,), prefix: Path = ()) -> Iterator[Node]:
    """Yield every single value of the schema, all variants included, in reading order."""
    for node in children(models, prefix).values():
        if node.models:
            yield from leaves(node.models, node.path)
        else:
            yield node


@cache
def all_keys() -> tuple[str, ...]:
    """Return every key of the schema, sections included."""
    found: dict[str, None] = {}
    for leaf in leaves():
        for end in range(1, len(leaf.path) + 1):
            found[".".join(leaf.path[:end])] = None
    return tuple(found)


def tag(model: type[Config]) -> str | None:
    """Return the `type` that selects a variant, or None for a section without variants."""
    field = model.model_fields.get("type")
    return None if field is None else field.default


def variant(models: Models, name: Any) -> type[Config] | None:
    """Return the variant whose `type` is `name`."""
    return next((model for model in models if tag(model) == name), None)


def default_tag(node: Node) -> str | None:
    """Return the `type` a section has when nobody sets it."""
    default = default_of(node)
    return tag(type(default)) if isinstance(default, Config) else None


def default_of(node: Node) -> Any:
    """Return the value a key has when nobody sets it; None where it must be set."""
    field = node.fields[0]
    return None if field.is_required() else field.get_default(call_default_factory=True)


def of_owner(node: Node, owner: type[Config]) -> Node:
    """Return the node as one of its owners has it; the node itself where that class is none of them."""
    fields = tuple(field for model, field in zip(node.owners, node.fields, strict=True) if model is owner)
    return Node(node.path, (owner,), fields) if fields else node


def element_models(node: Node) -> Models:
    """Return the config classes of a list's elements; empty for a list of plain values."""
    inner = [e for part in node.parts if get_origin(part) is tuple for e in get_args(part)]
    parts = [part for e in inner for part in _alternatives(e)]
    return tuple(part for part in parts if isinstance(part, type) and issubclass(part, Config))


def _alternatives(annotation: Any) -> Iterator[Any]:
    origin = get_origin(annotation)
    if origin is Annotated:
        yield from _alternatives(get_args(annotation)[0])
    elif origin in (Union, types.UnionType):
        for part in get_args(annotation):
            yield from _alternatives(part)
    else:
        yield annotation


def _is_text_literal(part: Any) -> bool:
    return get_origin(part) is Literal and all(isinstance(value, str) for value in get_args(part))


def _one_of(values: tuple[Any, ...]) -> str:
    return "one of " + ", ".join(str(value) for value in values)


_PLAIN = {int: "whole number", float: "number", str: "text", bool: "true or false", Any: "any value"}


def _words(part: Any) -> str:
    origin = get_origin(part)
    if origin is Literal:
        return _one_of(get_args(part))
    if origin is tuple:
        inner = [e for e in get_args(part) if e is not Ellipsis]
        tags = [tag(p) for e in inner for p in _alternatives(e) if isinstance(p, type) and issubclass(p, Config)]
        if tags:
            return f"list of tables with type={'|'.join(map(str, tags))}"
        element = " or ".join(dict.fromkeys(_words(p) for e in inner for p in _alternatives(e)))
        return f"list of {len(inner)}: {element}" if Ellipsis not in get_args(part) else f"list of {element}"
    if origin is dict:
        return "table"
    return _PLAIN[part]
