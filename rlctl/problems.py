"""Problems of a configuration in the user's words: pydantic's findings translated, all of them at once."""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from rlctl import schema
from rlctl.spelling import nearest
from rlctl_train.config import RunConfig
from rlctl_train.config.errors import UserError


@dataclass(frozen=True)
class Finding:
    """One problem: the key as the user writes it, its value, where that came from, what is wrong, the way out."""

    key: str
    value: Any
    source: str
    what: str
    remedy: str

    @property
    def line(self) -> str:
        """Return the problem as one line."""
        value = "" if self.source == NOT_SET else f"={show(self.value)} (from {self.source})"
        return f"{self.key}{value} {self.what}"


NOT_SET = "not set"


class InvalidConfig(UserError):
    """A configuration with at least one problem."""

    def __init__(self, findings: Sequence[Finding]) -> None:
        super().__init__("; ".join(finding.line for finding in findings), findings[0].remedy)
        self.findings = tuple(findings)

    def __reduce__(self) -> tuple[object, ...]:
        return InvalidConfig, (self.findings,)


def show(value: Any) -> str:
    """Return a value as a user would write it, shortened."""
    if isinstance(value, str):
        text = value if value.isprintable() and value == value.strip() and value else json.dumps(value)
    else:
        text = json.dumps(value, default=str)
    return text if len(text) <= 80 else text[:77] + "..."


def nearest_key(key: str) -> str | None:
    """Return the key of the schema a misspelt one stands for: a close spelling, or the same last name elsewhere."""
    keys = schema.all_keys()
    section, _, name = key.rpartition(".")
    siblings = {k.rpartition(".")[2]: k for k in keys if k.rpartition(".")[0] == section}
    if (near := nearest(name, siblings)) is not None:
        return siblings[near]
    same_name = [k for k in keys if k.rpartition(".")[2] == name]
    found = difflib.get_close_matches(key[:200], same_name, n=1, cutoff=0.0)
    return found[0] if found else nearest(key, keys)


def unknown_key(key: str, value: Any, source: str) -> Finding:
    """Return the problem of a key that does not exist, with the nearest spelling."""
    near = nearest_key(key)
    remedy = f"did you mean {near}?" if near else "`rlctl config explain` lists every key"
    return Finding(key, value, source, "is not a setting", remedy)


def translate(error: ValidationError) -> list[tuple[str, Any, str, str]]:
    """Return (key, value, what, remedy) for each finding of pydantic on a RunConfig, union tags left out."""
    return [_translate(detail) for detail in error.errors(include_url=False) if not _is_echo(detail)]


def _is_echo(detail: ErrorDetails) -> bool:
    """Return whether a list is called too short only because its entries have problems of their own."""
    return detail["type"] == "too_short" and len(detail["input"]) >= detail.get("ctx", {}).get("min_length", 0)


def _translate(detail: ErrorDetails) -> tuple[str, Any, str, str]:
    key, node, models = _locate(detail["loc"])
    kind, value = detail["type"], detail["input"]
    if kind in ("union_tag_not_found", "union_tag_invalid"):
        return _wrong_variant(key, value, models)
    if kind == "missing" and isinstance(detail["loc"][-1], int) and node is not None:
        return key.rpartition("[")[0], value, "has too few entries", f"give a {node.type_text()}"
    if kind == "missing":
        meaning = f" ({node.description.rstrip('.')})" if node and node.description else ""
        return key, None, f"is missing{meaning}", _how_to_set(key, node)
    if kind == "extra_forbidden":
        name = str(detail["loc"][-1])
        known = [f for model in models for f in model.model_fields]
        near = nearest(name, known)
        remedy = f"did you mean {near}?" if near else f"known here: {', '.join(known)}"
        return f"{key}.{name}", value, "is not a setting", remedy
    if kind == "literal_error" and node is not None:
        return key, value, "is not one of the choices", _choose(value, node.choices)
    what, remedy = _limits(kind, detail.get("ctx", {}), node)
    return key, value, what, remedy


def _locate(loc: Sequence[int | str]) -> tuple[str, schema.Node | None, schema.Models]:
    """Walk pydantic's location down the schema; return the user's key, its node, and the classes at that place."""
    models, node, key = (RunConfig,), None, ""
    skip_tag = False
    for item in loc:
        if skip_tag and (chosen := schema.variant(models, item)) is not None:
            models, skip_tag = (chosen,), False
            continue
        if isinstance(item, int):
            key += f"[{item}]"
            models = schema.element_models(node) if node is not None else ()
        else:
            found = schema.children(models).get(item)
            if found is None and models:
                break  # an unknown key below a list; the caller names it
            node = found or node
            models = found.models if found else ()
            key += f".{item}" if key else item
        skip_tag = len(models) > 1
    return key, node, models


def _wrong_variant(key: str, value: Any, models: schema.Models) -> tuple[str, Any, str, str]:
    tags = [schema.tag(model) for model in models]
    given = value.get("type") if isinstance(value, dict) else None
    what = "is missing" if given is None else "is not one of the choices"
    return f"{key}.type", given, what, _choose(given, tags)


def _choose(value: Any, choices: Sequence[Any]) -> str:
    known = [str(choice) for choice in choices]
    near = nearest(str(value), known)
    listing = f"choose one of {', '.join(known)}"
    return f"did you mean {near}? ({listing})" if near else listing


def _how_to_set(key: str, node: schema.Node | None) -> str:
    if node is None:
        return "add it"
    if not node.models:
        return f"set {key}=VALUE ({node.type_text()})"
    tags = [tag for tag in map(schema.tag, node.models) if tag]
    return f"set {key}.type to one of {', '.join(tags)}" if tags else f"add the section {key}"


_EXPECTED = {
    "int_type": "a whole number",
    "int_parsing_size": "a smaller whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "text",
    "tuple_type": "a list",
    "dict_type": "a table",
    "model_type": "a table",
}


def _limits(kind: str, ctx: dict[str, Any], node: schema.Node | None) -> tuple[str, str]:
    unset = ", or unset it with null" if node is not None and node.is_nullable else ""
    if kind in _EXPECTED:
        return f"is not {_EXPECTED[kind]}", f"give {_EXPECTED[kind]}{unset}"
    bounds = {
        "greater_than": ("above", "gt"),
        "greater_than_equal": ("at least", "ge"),
        "less_than": ("below", "lt"),
        "less_than_equal": ("at most", "le"),
    }
    if kind in bounds:
        word, name = bounds[kind]
        limit = f"{word} {ctx[name]:g}"
        return f"must be {limit}", f"give a value {limit}{unset}"
    if kind in ("too_short", "too_long"):
        count = ctx.get("min_length", ctx.get("max_length"))
        return "has the wrong number of entries", f"give {'at least' if kind == 'too_short' else 'at most'} {count}"
    if kind == "value_error":
        what, _, remedy = str(ctx["error"]).partition("; ")
        return what, remedy
    return "cannot be read", f"give {node.type_text()}" if node is not None else "see `rlctl config schema`"
