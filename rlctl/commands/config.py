"""`rlctl config check|schema|explain`: is it valid, what is there, what does a key mean and who set it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from rlctl import catalog, planning, render, schema
from rlctl.commands import _request
from rlctl.commands._group import HelpfulGroup
from rlctl.commands._request import FREE, FilesOption, RequestArgument, options_of, read
from rlctl.explaining import answer, leaves, rules
from rlctl.explaining.effects import Planned, planned
from rlctl.problems import nearest_key
from rlctl.render import Output, OutputOption
from rlctl.resolve import DEFAULT, Origin
from rlctl.spelling import unknown
from rlctl_train.config import RunConfig
from rlctl_train.config.errors import UserError

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
    ctx: typer.Context,
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY] [NAME_OR_FILE [KEY=VALUE]...]",
            help="A key, a preset or file, or a key in a preset or file, with overrides.",
            autocompletion=catalog.names,
            show_default=False,
        ),
    ] = None,
    files: FilesOption = None,
    hw: Annotated[
        str | None, typer.Option("--hw", help="Explain it for a machine elsewhere, such as h100-80gb:8 or cpu:2.")
    ] = None,
    output: OutputOption = "text",
) -> None:
    """Explain KEY: meaning, type, rules; with NAME_OR_FILE also who set it, what else it could be, what would follow.

    NAME_OR_FILE alone lists every key of the run with its value and origin; nothing lists every key there is.
    """
    given = list(words or ())
    key = given.pop(0).replace("-", "_") if given and _is_key(given[0]) else None
    node = None if key is None else _node(key)
    if not (given or files):
        if hw is not None:
            raise UserError("--hw explains a run for that machine, and no run is named", "name a preset or file")
        _list_schema(node, output) if node is None or node.models else _explain_key(node, output)
        return
    run = _run(ctx, given, files, hw)
    if key is None or node is None or (node.models and key not in run.resolved.origins):
        _list_run(run, node, hw, output)
    else:
        _explain_leaf(run, key, node, hw, output)


def _is_key(word: str) -> bool:
    return not (word.startswith("-") or "=" in word or catalog.is_file(word) or word in catalog.names())


def _node(key: str) -> schema.Node:
    node = schema.find(tuple(key.split(".")))
    if node is None:
        near = nearest_key(key)
        raise unknown("setting", key, [near] if near else catalog.names(), "`rlctl config explain` lists every key")
    return node


def _run(ctx: typer.Context, words: list[str], files: list[Path] | None, hw: str | None) -> Planned:
    """Resolve and plan the run that is asked about, on this machine or on the one named."""
    hardware = planning.hardware_named(hw)
    device = planning.device_key(hardware)
    request = _request.read(words, files, options=options_of(ctx), name_needed=not files, device=device)
    return planned(request.resolved, hardware)


def _list_schema(node: schema.Node | None, output: Output) -> None:
    """List every key there is, or every key of a section."""
    found = list(schema.leaves() if node is None else schema.leaves(node.models, node.path))
    entries = [_entry(leaf) for leaf in found]
    if render.document(output, keys=entries):
        return
    if node is not None:
        render.text(f"{node.key}: {node.description}")
    names = ["key", "type", "default", "meaning"]
    render.table(names, [[entry[name] for name in names] for entry in entries])


def _explain_key(node: schema.Node, output: Output) -> None:
    """Explain a key apart from any run."""
    entry, texts = _entry(node), leaves.meanings(node)
    entry |= {"rule": rules.relation_words(node.key), "choices": texts}
    if render.document(output, **entry):
        return
    render.text(f"{node.key}: {entry['meaning']}")
    rows = [("only with", entry["only_with"])] if entry["only_with"] else []
    rows += [("type", entry["type"]), ("default", render.cell(entry["default"]))]
    rows += [("rule", rule) for rule in entry["rule"]]
    rows += [(choice, text) for choice, text in texts.items()]
    render.table(("", ""), rows)


def _list_run(run: Planned, node: schema.Node | None, hw: str | None, output: Output) -> None:
    """List the keys of a run, or those of one of its sections, with value and origin."""
    keys = [key for key in run.resolved.origins if node is None or key.startswith(f"{node.key}.")]
    lines = [answer.key_line(run, key) for key in keys]
    if not render.document(output, hardware=hw, refusal=run.refusal, keys=lines):
        table = [(n["key"], n["value"], n["source"], n["reason"] or n["meaning"]) for n in lines]
        render.table(("key", "value", "from", "why, or what it means"), table)
    _note_refusal(run)


def _explain_leaf(run: Planned, key: str, node: schema.Node, hw: str | None, output: Output) -> None:
    """Explain one key of a run: origin, rule, alternatives, consequence."""
    found = answer.explanation(run, key)
    if found is None:
        _explain_absent(run, node, output)
        return
    line = answer.key_line(run, key)
    ranks = [{"value": o.value, "source": o.source} for o in run.resolved.history.get(key, ())]
    if render.document(output, **line, ranks=ranks, hardware=hw, **found.to_json()):
        return
    render.text(f"{key}: {line['meaning']}")
    rows = [("value", f"{render.cell(line['value'])} (from {line['source']})")]
    rows += [("instead of", f"{render.cell(o.value)} (from {o.source})") for o in found.setter.beat]
    rows += [("rule", rule) for rule in found.rules]
    render.table(("", ""), rows)
    if found.others:
        render.text("")
        shown = [
            ("null" if other.value is None else render.cell(other.value), other.meaning, does.text)
            for other, does in found.others
        ]
        render.table(("alternative", "what it is", "what follows"), shown)
    render.text(f"\n{found.consequence}")
    _note_refusal(run)


def _explain_absent(run: Planned, node: schema.Node, output: Output) -> None:
    """Explain a key that the run does not have."""
    why = answer.absent(run, node)
    entry = _entry(node) | {"value": None, "source": why, "rule": rules.relation_words(node.key)}
    if not render.document(output, **entry, ranks=[], alternatives=[], consequence=why):
        render.text(f"{node.key}: {entry['meaning']}")
        rows = [("value", why), ("type", entry["type"]), ("default", render.cell(entry["default"]))]
        render.table(("", ""), rows + [("rule", rule) for rule in entry["rule"]])


def _note_refusal(run: Planned) -> None:
    if run.plan is None:
        render.note(f"the planner fills nothing in: {run.refusal}; --hw plans for another machine")


def _entry(node: schema.Node) -> dict[str, Any]:
    return {
        "key": node.key,
        "type": rules.type_words(node),
        "default": leaves.default_of(node),
        "meaning": answer.meaning(node),
        "only_with": leaves.only_with(node),
    }


def _plain(origins: dict[str, Origin]) -> dict[str, Any]:
    return {key: {"value": origin.value, "source": origin.source} for key, origin in origins.items()}
