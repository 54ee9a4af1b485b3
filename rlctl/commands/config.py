"""`rlctl config check|schema|explain`: is it valid, what is there, what does a key mean and who set it."""

from __future__ import annotations

import json
from typing import Any

import typer

from rlctl import catalog, render, schema
from rlctl.commands._group import HelpfulGroup
from rlctl.commands._request import FREE, FilesOption, Request, RequestArgument, options_of, read
from rlctl.problems import nearest_key
from rlctl.render import Output, OutputOption
from rlctl.resolve import DEFAULT, Origin
from rlctl.spelling import unknown
from rlctl_train.config import RunConfig

app = typer.Typer(
    cls=HelpfulGroup, rich_markup_mode=None, help="Check a configuration, explain its keys, print its schema."
)


@app.command(context_settings=FREE)
def check(
    ctx: typer.Context, words: RequestArgument = None, files: FilesOption = None, output: OutputOption = "text"
) -> None:
    """Validate a preset or file with overrides; every problem is shown at once (exit code 2)."""
    request = read(words, files, options=options_of(ctx), name_needed=not files)
    changed = {key: origin for key, origin in request.resolved.origins.items() if origin.source != DEFAULT}
    if not render.document(output, valid=True, notes=list(request.resolved.notes), values=_plain(changed)):
        render.say(f"valid: {len(changed)} of {len(request.resolved.origins)} values differ from the defaults")


@app.command(name="schema")
def print_schema() -> None:
    """Print the JSON Schema of a configuration, for editors and programs."""
    render.text(json.dumps(RunConfig.model_json_schema(), indent=2))


@app.command(context_settings=FREE)
def explain(
    ctx: typer.Context, words: RequestArgument = None, files: FilesOption = None, output: OutputOption = "text"
) -> None:
    """Explain KEY: meaning, type, default, and with NAME_OR_FILE its value, origin and lower-ranked values.

    Without a key, list every key with its meaning.
    """
    given = list(words or ())
    is_key = bool(given) and not given[0].startswith("-") and "=" not in given[0] and not catalog.is_file(given[0])
    if is_key and given[0] in catalog.names():
        is_key = False
    key = given.pop(0).replace("-", "_") if is_key else None
    wants_value = bool(given or files)
    request = read(given, files, options=options_of(ctx), name_needed=not files) if wants_value else None
    node = None if key is None else schema.find(tuple(key.split(".")))
    if key is not None and node is None:
        near = nearest_key(key)
        raise unknown("setting", key, [near] if near else [], "`rlctl config explain` lists every key")
    if node is None or node.models:
        _list_section(node, request, output)
    else:
        _explain_leaf(node, request, output)


def _list_section(node: schema.Node | None, request: Request | None, output: Output) -> None:
    leaves = list(schema.leaves() if node is None else schema.leaves(node.models, node.path))
    entries = [_entry(leaf, request) for leaf in leaves]
    if render.document(output, keys=entries):
        return
    if node is not None:
        render.text(f"{node.key}: {node.description}")
    columns = ["key", "type", "default", *(["value", "from"] if request else []), "meaning"]
    names = ["key", "type", "default", *(["value", "source"] if request else []), "meaning"]
    render.table(columns, [[entry.get(name) for name in names] for entry in entries])


def _explain_leaf(node: schema.Node, request: Request | None, output: Output) -> None:
    entry = _entry(node, request)
    history = () if request is None else request.resolved.history.get(node.key, ())
    entry["ranks"] = [{"value": origin.value, "source": origin.source} for origin in history]
    if render.document(output, **entry):
        return
    render.text(f"{node.key}: {entry['meaning']}")
    rows = [("type", entry["type"]), ("default", entry["default"])]
    if entry.get("only_with"):
        rows.insert(0, ("only with", entry["only_with"]))
    if request is not None:
        rows.append(("value", f"{render.cell(entry['value'])} (from {entry['source']})"))
        rows += [("instead of", f"{render.cell(o.value)} (from {o.source})") for o in reversed(history[:-1])]
    render.table(("", ""), rows)


def _entry(node: schema.Node, request: Request | None) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "key": node.key,
        "type": node.type_text(),
        "default": _default(node),
        "meaning": node.description or _kind(node),
        "only_with": _only_with(node),
    }
    if request is not None:
        origin = request.resolved.origins.get(node.key, Origin(None, "not part of this run"))
        entry |= {"value": origin.value, "source": origin.source}
    return entry


def _default(node: schema.Node) -> Any:
    *above, name = node.path
    parent = schema.find(tuple(above)) if above else None
    if name == "type" and parent is not None and len(parent.models) > 1:
        return schema.default_tag(parent)
    default = schema.default_of(node)
    if parent is not None:
        default = getattr(schema.default_of(parent), name, default)
    return list(default) if isinstance(default, tuple) else default


def _kind(node: schema.Node) -> str:
    return "Which variant of the section." if node.path[-1] == "type" else ""


def _only_with(node: schema.Node) -> str | None:
    """Return the choice of variant a key needs, or None when its section always has it."""
    for end in range(1, len(node.path)):
        section = schema.find(node.path[:end])
        if section is None or len(section.models) < 2:
            continue
        owners = [schema.tag(m) for m in section.models if node.path[end] in m.model_fields]
        if len(owners) < len(section.models):
            return f"{section.key}.type={' or '.join(map(str, owners))}"
    return None


def _plain(origins: dict[str, Origin]) -> dict[str, Any]:
    return {key: {"value": origin.value, "source": origin.source} for key, origin in origins.items()}
