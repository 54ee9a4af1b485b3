"""One run configuration out of many places: default < settings < preset < file < RLCTL_* < command line.

What a preset or file says for the device at hand (`[hardware.ID]`) lies right above it. Every value keeps its origin,
every problem is reported in one go. Nothing here reads the machine.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from rlctl import catalog, schema
from rlctl.overrides import Assignment, environment_assignments
from rlctl.problems import NOT_SET, Finding, InvalidConfig, show, translate, unknown_key
from rlctl_train.config import RunConfig, relation_problems
from rlctl_train.config.base import Config

DEFAULT = "default"
MAX_DEPTH = 32
UNSET_WORDS = ("none", "null")


@dataclass(frozen=True)
class Origin:
    """A value and where it came from."""

    value: Any
    source: str


@dataclass(frozen=True)
class Resolved:
    """A valid configuration, the origin of each of its values, and what else was said about them on the way."""

    config: RunConfig
    origins: dict[str, Origin]
    history: dict[str, tuple[Origin, ...]] = field(default_factory=dict)
    """Every value that was given for a key, lowest rank first; the last one holds."""
    notes: tuple[str, ...] = ()
    reasons: dict[str, str] = field(default_factory=dict)
    """Why a document gives settings for a device, by their source."""

    def to_json(self) -> dict[str, Any]:
        """Return the content of `origin.json`."""
        values = {key: {"value": origin.value, "source": origin.source} for key, origin in self.origins.items()}
        return {"schema_version": 1, "values": values, "notes": list(self.notes)}


def build(
    name_or_file: str | None = None,
    *,
    files: Sequence[Path] = (),
    overrides: Iterable[Assignment] = (),
    environ: Mapping[str, str] | None = None,
    reserved: Iterable[str] = (),
    settings: Iterable[Assignment] = (),
    device: str | None = None,
) -> Resolved:
    """Resolve a preset or file with what is put on top; `reserved` names variables that are no settings of a run.

    `device` is the catalogue's key of the accelerators at hand: it chooses among the documents' `[hardware.ID]`.
    """
    documents = [] if name_or_file is None else catalog.chain(catalog.load(name_or_file))
    documents += [part for path in files for part in catalog.chain(catalog.load_file(path))]
    merge = _Merge()
    merge.layer(settings)
    for document in documents:
        merge.layer(_assignments(document))
        for pins in document.pins:
            if pins.device == device:
                source = f"{document.source} [{catalog.HARDWARE}.{device}]"
                merge.layer(_walk_table(pins.tree, (), source))
                merge.notes.append(f"{source}: {pins.reason}")
                merge.reasons[source] = pins.reason
    merge.layer(environment_assignments(environ or {}, reserved))
    merge.layer(overrides)
    return merge.finish()


def vary(resolved: Resolved, changes: Iterable[Assignment]) -> Resolved:
    """Resolve a run once more with changes on top of all that was given for it."""
    given = resolved.config.model_dump(mode="json", exclude_unset=True)
    return reopen(given, {key: origin.source for key, origin in resolved.origins.items()}, changes)


def reopen(values: Mapping[str, Any], sources: Mapping[str, str], changes: Iterable[Assignment] = ()) -> Resolved:
    """Resolve a configuration that was resolved before, as plain values and their sources, with changes on top."""
    merge = _Merge()
    merge.layer(replace(item, source=sources.get(item.key, DEFAULT)) for item in _walk_table(values, (), DEFAULT))
    merge.layer(changes)
    return merge.finish()


def _assignments(document: catalog.Document) -> Iterator[Assignment]:
    return _walk_table(document.tree, (), document.source)


class _Merge:
    """The values so far, from low to high rank."""

    def __init__(self) -> None:
        self.values: dict[schema.Path, Assignment] = {}
        self.history: dict[schema.Path, list[Assignment]] = {}
        self.findings: list[Finding] = []
        self.notes: list[str] = []
        self.reasons: dict[str, str] = {}

    def layer(self, assignments: Iterable[Assignment]) -> None:
        """Put one layer on top: first its choices of variant, then its values in order."""
        expanded = list(self._expand(assignments))
        expanded += self._implied_reward_type(expanded)
        for item in expanded:
            if item.path[-1] == "type":
                self._change_variant(item)
        for item in expanded:
            self._set(item)

    def finish(self) -> Resolved:
        """Validate what came together; raise `InvalidConfig` with every problem."""
        self._refuse_foreign_keys()
        config = self._validate()
        if config is not None:
            self.findings += [
                Finding(p.key, p.value, self._source(p.key), p.what, p.remedy) for p in relation_problems(config)
            ]
        if self.findings or config is None:
            raise InvalidConfig(self.findings)
        origins = {key: Origin(value, self._source(key)) for key, value in flat(config.model_dump(mode="json")).items()}
        history = {
            ".".join(path): tuple(Origin(item.value, item.source) for item in items)
            for path, items in self.history.items()
        }
        return Resolved(config, origins, history, tuple(self.notes), self.reasons)

    def _expand(self, assignments: Iterable[Assignment]) -> Iterator[Assignment]:
        """Split tables into single values, and keep aside what cannot be one."""
        for item in assignments:
            for leaf in _walk(item.value, item.path, item.source):
                reason = _unfit(leaf.value)
                if schema.find(leaf.path) is None:
                    self.findings.append(unknown_key(leaf.key, leaf.value, leaf.source))
                elif reason is not None:
                    self.findings.append(Finding(leaf.key, leaf.value, leaf.source, *reason))
                else:
                    yield leaf

    def _implied_reward_type(self, items: Sequence[Assignment]) -> list[Assignment]:
        paths = {item.path: item for item in items}
        path, kind = ("reward", "path"), ("reward", "type")
        current = self.values.get(kind)
        if path not in paths or kind in paths or (current is not None and current.value == "custom"):
            return []
        return [Assignment(kind, "custom", paths[path].source)]

    def _change_variant(self, item: Assignment) -> None:
        """Drop lower-ranked keys that the newly chosen variant does not have, and say so."""
        section = item.path[:-1]
        node = schema.find(section)
        if node is None or (chosen := schema.variant(node.models, item.value)) is None:
            return
        for path, old in list(self.values.items()):
            inner = path[len(section) :]
            if path[: len(section)] == section and inner and schema.find(inner, (chosen,)) is None:
                del self.values[path]
                self.notes.append(
                    f"{old.key}={show(old.value)} (from {old.source}) is left out: "
                    f"{item.key}={show(item.value)} (from {item.source}) does not have it"
                )

    def _set(self, item: Assignment) -> None:
        for end in range(1, len(item.path)):
            self.values.pop(item.path[:end], None)  # the section was unset, or set as a whole, before
        inside = [p for p in self.values if p[: len(item.path)] == item.path and p != item.path]
        if item.value is None:
            for path in inside:
                del self.values[path]
        if item.value != {} or not inside:
            self.values[item.path] = item
        self.history.setdefault(item.path, []).append(item)

    def _refuse_foreign_keys(self) -> None:
        """Report keys that exist, but only in another variant than the chosen one."""
        for path, item in list(self.values.items()):
            for end in range(1, len(path)):
                node = schema.find(path[:end])
                if node is None or len(node.models) < 2 or (kind := self._variant_of(node)) is None:
                    continue
                chosen = schema.variant(node.models, kind.value)
                if chosen is not None and schema.find(path[end:], (chosen,)) is None:
                    self.findings.append(_foreign(item, node, path[end], kind))
                    del self.values[path]
                    break

    def _variant_of(self, section: schema.Node) -> Origin | None:
        given = self.values.get((*section.path, "type"))
        if given is not None and given.value is not None:
            return Origin(given.value, given.source)
        default = schema.default_tag(section)
        return None if default is None else Origin(default, DEFAULT)

    def _validate(self) -> RunConfig | None:
        try:
            return RunConfig.model_validate_json(json.dumps(self._tree()), strict=True)
        except ValidationError as error:
            for key, value, what, remedy in translate(error):
                source = self._source(key)
                shown = value if isinstance(value, (str, int, float, list)) or value is None else show(value)
                self.findings.append(
                    Finding(key, shown, NOT_SET if what.startswith("is missing") else source, what, remedy)
                )
            return None

    def _tree(self) -> dict[str, Any]:
        """Return the nested table for pydantic: unset keys that cannot be null fall back to their default."""
        tree: dict[str, Any] = {}
        for path, item in self.values.items():
            node = schema.find(path)
            assert node is not None
            if item.value is None and not node.is_nullable and not node.is_free:
                continue
            table = tree
            for end, name in enumerate(path[:-1], start=1):
                table = table.setdefault(name, self._start_of(path[:end]))
            is_section = bool(node.models) and item.value == {}
            table[path[-1]] = self._start_of(path) if is_section else item.value
        return tree

    def _start_of(self, section: schema.Path) -> dict[str, Any]:
        """Return what a section holds before anything in it is set: its variant, and what its owner sets otherwise."""
        node = schema.find(section)
        default = None if node is None else self._default_of(node)
        if not isinstance(default, Config):
            return {}
        kind, chosen = schema.tag(type(default)), self.values.get((*section, "type"))
        if chosen is not None and chosen.value not in (None, kind):
            return {"type": chosen.value}
        own = default.model_dump(mode="json", exclude_defaults=True)
        return own if kind is None else {**own, "type": kind}

    def _default_of(self, node: schema.Node) -> Any:
        """Return the default that a section's owner gives it; the owner is the variant chosen above it."""
        above = schema.find(node.path[:-1])
        kind = None if above is None else self._variant_of(above)
        owner = None if above is None or kind is None else schema.variant(above.models, kind.value)
        return schema.default_of(node if owner is None else schema.of_owner(node, owner))

    def _source(self, key: str) -> str:
        """Return who set a key: itself, something inside it, or the nearest section above it."""
        path = tuple(key.partition("[")[0].split("."))
        if path not in self.values and (inside := [p for p in self.values if p[: len(path)] == path]):
            return self.values[inside[-1]].source
        if path in self.values:
            return self.values[path].source
        above = [self.values[path[:end]] for end in range(len(path) - 1, 0, -1) if path[:end] in self.values]
        return above[0].source if above and above[0].value != {} else DEFAULT


def flat(tree: Mapping[str, Any], prefix: schema.Path = ()) -> dict[str, Any]:
    """Return the single values of a configuration tree by dotted key; unset sections are one value, None."""
    found: dict[str, Any] = {}
    for name, value in tree.items():
        path = (*prefix, name)
        if isinstance(value, dict) and (value or not _is_free(path)):
            found |= flat(value, path)
        else:
            found[".".join(path)] = value
    return found


def _is_free(path: schema.Path) -> bool:
    node = schema.find(path)
    return node is not None and node.is_free


def _walk(value: Any, path: schema.Path, source: str) -> Iterator[Assignment]:
    node = schema.find(path)
    if isinstance(value, str) and value.lower() in UNSET_WORDS and (node is None or value not in node.choices):
        value = None
    holds_keys = node is None or node.models or node.is_free
    if value == {} and node is not None and node.models and node.is_nullable:
        yield Assignment(path, value, source)  # a section that may be unset is set by its heading alone
    elif isinstance(value, dict) and holds_keys and len(path) < MAX_DEPTH and (value or (node and node.models)):
        yield from _walk_table(value, path, source)
    else:
        yield Assignment(path, value, source)


def _walk_table(table: Mapping[str, Any], path: schema.Path, source: str) -> Iterator[Assignment]:
    for name, value in table.items():
        key = name if path and _is_free(path) else name.replace("-", "_")
        yield from _walk(value, (*path, key), source)


def _unfit(value: Any) -> tuple[str, str] | None:
    """Return what is wrong with a value no setting can have, whatever its type, and the way out."""
    todo = [(value, 0)]
    while todo:
        item, depth = todo.pop()
        if depth > MAX_DEPTH:
            return "is nested too deeply", "no setting needs that"
        if isinstance(item, dict):
            todo += [(part, depth + 1) for pair in item.items() for part in pair]
        elif isinstance(item, list):
            todo += [(part, depth + 1) for part in item]
        elif isinstance(item, int) and abs(item) >= 2**63:
            return "is larger than any setting can be", "give a smaller number"
        elif isinstance(item, str) and not _is_unicode(item):
            return "is not valid text", "write it in UTF-8"
        elif item is not None and not isinstance(item, (str, int, float)):
            return "is a date or time, and no setting takes one", "put it in quotes if it is text"
    return None


def _is_unicode(text: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _foreign(item: Assignment, section: schema.Node, name: str, kind: Origin) -> Finding:
    owners = [schema.tag(model) for model in section.models if name in model.model_fields]
    what = (
        f"belongs to {section.key}.type={' or '.join(map(str, owners))}, but that is {kind.value} (from {kind.source})"
    )
    return Finding(item.key, item.value, item.source, what, f"set {section.key}.type={owners[0]}, or leave the key out")
