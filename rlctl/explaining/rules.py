"""What a value must satisfy, in words: its type and bounds, and the relations it has to other keys."""

from __future__ import annotations

from typing import Any

from rlctl import schema
from rlctl_train.config.relations import relations_of


def type_words(node: schema.Node) -> str:
    """Return the type of a key with its bounds, such as `whole number, at least 1 (may be unset)`."""
    if node.models:
        return "section (may be unset)" if node.is_nullable else "section"
    words, found = node.type_text(), list(dict.fromkeys(_limits(node)))
    if not found:
        return words
    limits = found[0] if len(found) == 1 else f"{' or '.join(found)} by variant"
    unset = " (may be unset)" if node.is_nullable else ""
    return f"{words.removesuffix(unset)}, {limits}{unset}"


def relation_words(key: str) -> list[str]:
    """Return the rules between this key and others."""
    return [relation.rule for relation in relations_of(key)]


def _limits(node: schema.Node) -> list[str]:
    """Return the bounds of a value, or of a list's entries, over all classes that have the key."""
    found = []
    for owner in node.owners:
        shape = owner.model_json_schema()["properties"][node.path[-1]]
        found += [words for part in (shape, *shape.get("anyOf", ())) if (words := _bounds(part))]
    return found


def _bounds(shape: dict[str, Any]) -> str:
    """Return the bounds that one part of a JSON Schema states."""
    if shape.get("prefixItems"):
        return f"each {_bounds(shape['prefixItems'][0])}"
    words = []
    if "exclusiveMinimum" in shape:
        least = shape["exclusiveMinimum"]
        words.append(f"at least {least + 1}" if shape.get("type") == "integer" else f"above {least:g}")
    if "minimum" in shape:
        words.append(f"at least {shape['minimum']:g}")
    if "exclusiveMaximum" in shape:
        words.append(f"below {shape['exclusiveMaximum']:g}")
    if "maximum" in shape:
        words.append(f"at most {shape['maximum']:g}")
    if "minItems" in shape:
        words.append(f"at least {shape['minItems']} of them")
    return " and ".join(words)
