"""A key as one run has it: its definition in the variants chosen, its default there, and its value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rlctl import schema
from rlctl.resolve import Resolved
from rlctl_train.config import RunConfig
from rlctl_train.config.base import Choices, Config


@dataclass(frozen=True)
class Leaf:
    """One key of a run. `node` is its definition in the run's variants, or the free table that holds it."""

    key: str
    node: schema.Node
    default: Any
    value: Any

    @property
    def path(self) -> schema.Path:
        """Return the key's parts; below a free table the rest of the key is one part."""
        depth = len(self.node.path)
        parts = tuple(self.key.split(".", depth))
        return parts if self.node.is_free else self.node.path

    @property
    def variants(self) -> schema.Models:
        """Return the variants among which the key chooses; empty for every key but such a `type`."""
        section = _tagged(self.node)
        return () if section is None else section.models

    @property
    def beats_default(self) -> bool:
        """Return whether a default lies below what is set."""
        is_chosen = bool(self.variants) and self.default is None
        return not is_chosen and not any(field.is_required() for field in self.node.fields)


def leaf_of(resolved: Resolved, key: str) -> Leaf | None:
    """Return a key of a run, or None where the run does not have it."""
    if key not in resolved.origins:
        return None
    node, default = _node(resolved.config, tuple(key.split(".")))
    return Leaf(key, node, default, resolved.origins[key].value)


def default_of(node: schema.Node) -> Any:
    """Return the default of a key where no run is given: that of the section as its owner sets it."""
    if (section := _tagged(node)) is not None:
        return schema.default_tag(section)
    *above, name = node.path
    parent = schema.find(tuple(above)) if above else None
    default = schema.default_of(node)
    return _plain(default if parent is None else getattr(schema.default_of(parent), name, default))


def only_with(node: schema.Node) -> str | None:
    """Return the choice of variant a key needs, or None when its section always has it."""
    for end in range(1, len(node.path)):
        section = schema.find(node.path[:end])
        if section is None or len(section.models) < 2:
            continue
        owners = [schema.tag(m) for m in section.models if node.path[end] in m.model_fields]
        if len(owners) < len(section.models):
            return f"{section.key}.type={' or '.join(map(str, owners))}"
    return None


def meanings(node: schema.Node) -> dict[str, str]:
    """Return what each value of an enumeration means; empty for everything else."""
    found = [part.meanings for field in node.fields for part in field.metadata if isinstance(part, Choices)]
    return {value: text for table in found for value, text in table.items()}


def doc_of(model: type[Config]) -> str:
    """Return what a variant of a section is, in a line."""
    return " ".join((model.__doc__ or "").split("\n\n")[0].split())


def _node(config: RunConfig, path: schema.Path) -> tuple[schema.Node, Any]:
    """Return a key's definition in the run's variants and its default there; of a `type` all variants' definition."""
    section: Config = config
    default: Any = None
    node = None
    for depth, name in enumerate(path):
        node = schema.children((type(section),), path[:depth])[name]
        default = getattr(default, name) if isinstance(default, type(section)) else schema.default_of(node)
        inner = getattr(section, name)
        if not isinstance(inner, Config):
            break
        section = inner
    assert node is not None, "a key has at least one part"
    if (chosen := _tagged(node)) is not None:
        return schema.children(chosen.models, chosen.path)["type"], schema.default_tag(chosen)
    return node, None if node.path != path else _plain(default)


def _tagged(node: schema.Node) -> schema.Node | None:
    """Return the section whose variant a key chooses, or None for every other key."""
    *above, name = node.path
    section = schema.find(tuple(above)) if above else None
    return section if name == "type" and section is not None and len(section.models) > 1 else None


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
