"""Write the reference pages that follow from code: `python docs/generate.py`, or `--check` to fail where one drifted.

config.md    every key, from the pydantic classes     cli.md    every command, from the Typer app
metrics.md   every metric, from the glossary          doctor.md  every check, from the doctor's table
algorithms.md  every algorithm and policy loss, from their settings and tables
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic_core import PydanticUndefined
from typer.main import get_command

from rlctl import app, schema
from rlctl.doctor import registry as checks
from rlctl_train.config import RunConfig
from rlctl_train.config.base import Config
from rlctl_train.registry import ALGOS, FLOWS, LOSSES
from rlctl_train.telemetry import glossary

DOCS = Path(__file__).parent
NOTE = "<!-- Made by docs/generate.py (`nox -s docs`); edit the code it reads, not this page. -->\n"
HELP_WIDTH = 100


def main(arguments: list[str]) -> int:
    """Write the pages, or with `--check` only compare; return the number of pages that are out of date."""
    stale = [name for name, text in pages().items() if not _is_current(DOCS / name, text)]
    if "--check" in arguments:
        for name in stale:
            print(f"docs/{name} is out of date: run `nox -s docs`", file=sys.stderr)
        return len(stale)
    for name in stale:
        (DOCS / name).write_text(pages()[name], encoding="utf-8")
        print(f"wrote docs/{name}")
    return 0


def pages() -> dict[str, str]:
    """Return every generated page by file name."""
    return {
        "config.md": config_page(), "cli.md": cli_page(), "metrics.md": metrics_page(), "doctor.md": doctor_page(),
        "algorithms.md": algorithms_page(),
    }  # fmt: skip


def config_page() -> str:
    """Return the reference of the configuration: one heading a section, one a variant."""
    head = (
        f"# Configuration\n\n{NOTE}\n"
        "Presets and files are TOML with these sections; on the command line a key is written `section.key=value`.\n"
        "Later ones win: default, your settings, preset, `-c` files, `RLCTL_SECTION__KEY`, command line. To see where\n"
        "a value came from, what rules it and what another one would do: `rlctl config explain KEY NAME`. Unknown\n"
        "keys are refused with the nearest spelling.\n"
        "A section with several variants names its choice in `type`.\n\n"
    )
    # Variants share sections: what reads the same under the same name is written once.
    return head + "\n".join(dict.fromkeys(_sections((), RunConfig, None)))


def cli_page() -> str:
    """Return the help of every command, in the order of `rlctl --help`."""
    blocks = [f"# Command line\n\n{NOTE}"]
    blocks.append(_help("rlctl", get_command(app.app)))
    for name in app.COMMANDS:
        blocks += [_help(path, command) for path, command in _commands(f"rlctl {name}", app.load(name))]
    return "\n".join(blocks)


def metrics_page() -> str:
    """Return the glossary with what a reader of metrics.jsonl must know."""
    head = (
        f"# Metrics\n\n{NOTE}\n"
        "`metrics.jsonl` in the run folder has one JSON object a line: `step`, `phase` (`warm_start`, `train`,\n"
        "`validation`, `checkpoint`), `time` (unix seconds) and the metrics below. Trackers get the same names;\n"
        "a warm start's are prefixed with `warm_start/`. A value that is not finite is left out and named under\n"
        "`non_finite`. `<x>` stands for any word, `{a,b}` for one of the words.\n\n"
    )
    return head + glossary.markdown()


def doctor_page() -> str:
    """Return the table of checks with what a reader of their findings must know."""
    head = (
        f"# Doctor\n\n{NOTE}\n"
        "`rlctl doctor` examines this machine; `rlctl doctor NAME` with a preset or file, and settings as for a\n"
        "launch, also whether that run can start on it: the checks then know the plan. Nothing is written or\n"
        "started.\n\n"
        "```sh\nrlctl doctor\nrlctl doctor qwen2.5-7b-grpo rollout.type=vllm\n"
        "rlctl doctor qwen2.5-7b-grpo --nodes node1,node2   # names and clocks, over ssh\n"
        "rlctl doctor --only driver,torch -o json\n```\n\n"
        "Each check answers `ok`, `warn` (the run survives it, slower or with luck), `fail` (it would stop) or\n"
        "`skip` (nothing to look at), and every `warn` and `fail` names the way out. The exit code is 4 with any\n"
        "`fail`, else 0. `rlctl launch` first runs the checks marked below: it prints warnings, and stops with code 4\n"
        "at failures.\n\n"
        "On machines elsewhere, every node runs them again before training, together with `planned_devices`,\n"
        "`planned_precision`, `planned_versions` and `torch`: [launching.md](launching.md).\n\n"
        "Checks run side by side, each under its limit; one that hangs is told as such (`torch` and `reward` fail\n"
        "then, the others warn). Packages are imported in processes of their own, and vLLM at a launch only by a run\n"
        "that uses it. Values of variables whose names speak of tokens, keys or passwords are never printed.\n\n"
    )
    tail = (
        "\n`tried on` says what a check has met. `real`: the thing itself on a Linux host, with faults in part staged\n"
        "by tests. `CPU host`: the thing itself, but on no accelerator. `synthetic`: only facts made up for\n"
        "tests, for want of the hardware; its rules follow the vendors' documentation and public reports, and nothing\n"
        "of it is measured.\n"
    )
    return head + checks.markdown() + tail


def algorithms_page() -> str:
    """Return one table of algorithms and one of policy losses."""
    head = (
        f"# Algorithms\n\n{NOTE}\n"
        "`algo.type` names the advantage and the dataflow; `algo.loss`, `algo.aggregation`, the KL terms, entropy\n"
        "and `algo.correction` are choices of their own beside it. Shown are defaults; presets named `quickstart-*`\n"
        "run most of them on a tiny model, and [presets.md](presets.md) has those of the papers on published models.\n"
        "Formulas stand in the files named.\n\n"
    )
    algorithms = [
        "| `algo.type` | what | default loss | aggregation | KL | roles | advantage | flow |",
        "|" + "---|" * 8,
    ]
    losses = ["| `algo.loss.type` | what | file |", "|---|---|---|"]
    for model in schema.find(("algo",)).models:  # type: ignore[union-attr]
        algorithms.append("| " + " | ".join(_algorithm(model)) + " |")
    for model in schema.find(("algo", "loss")).models:  # type: ignore[union-attr]
        name = str(schema.tag(model))
        losses.append(f"| `{name}` | {_first_line(model)} | {_file(LOSSES[name])} |")
    return head + "\n".join([*algorithms, "", "## Policy losses", "", *losses, ""])


def _algorithm(model: type[Config]) -> Iterator[str]:
    made: Any = model.model_construct()
    name, fields = str(schema.tag(model)), model.model_fields
    yield f"`{name}`"
    yield _first_line(model)
    yield f"`{made.loss.type}`" if "loss" in fields else "cross-entropy"
    yield f"`{made.aggregation}`" if "aggregation" in fields else "`token-mean`"
    yield ", ".join(word for key, word in (("kl_in_reward", "in reward"), ("kl_loss_coef", "in loss")) if key in fields)
    yield ", ".join(made.roles())
    yield _file(ALGOS[name]) if name in ALGOS else ""
    yield _file(FLOWS[name])


def _first_line(model: type[Config]) -> str:
    return " ".join((model.__doc__ or "").split("\n\n")[0].split())


def _file(target: str) -> str:
    path = target.partition(":")[0].removeprefix("rlctl_train.").replace(".", "/")
    return f"[{path}.py](../src/rlctl_train/{path}.py)"


def _is_current(path: Path, text: str) -> bool:
    return path.is_file() and path.read_text(encoding="utf-8") == text


def _sections(path: schema.Path, model: type[Config], defaults: Config | None) -> Iterator[str]:
    """Yield the text of one config class, then of those below it; `defaults` is an instance with its defaults."""
    nodes = schema.children((model,), path)
    rows = [(node, _default(node, defaults)) for node in nodes.values() if node.path[-1] != "type"]
    yield "\n".join(_section(path, model, rows))
    for node, default in rows:
        for below in node.models:
            yield from _sections(node.path, below, default if isinstance(default, below) else None)


def _section(path: schema.Path, model: type[Config], rows: list[tuple[schema.Node, Any]]) -> Iterator[str]:
    key, variant = ".".join(path), schema.tag(model)
    if path:
        kind = f", `type = {json.dumps(variant)}`" if variant else ""
        yield f"{'#' * min(2 + (len(path) > 1), 3)} `{key}`{kind}\n"
    yield f"{(model.__doc__ or '').strip()}\n"
    if rows:
        yield "| key | type | default | meaning |\n|---|---|---|---|"
        yield from (f"| {' | '.join(_cells(node, default))} |" for node, default in rows)
        yield ""


def _default(node: schema.Node, defaults: Config | None) -> Any:
    """Return the default of a key where its section stands: a section may be given other defaults by its owner."""
    return (
        node.fields[0].get_default(call_default_factory=True) if defaults is None else getattr(defaults, node.path[-1])
    )


def _cells(node: schema.Node, default: Any) -> tuple[str, str, str, str]:
    meaning = " ".join(node.description.split())
    return f"`{node.key}`", _escape(node.type_text()), _escape(_default_text(default)), _escape(meaning)


def _default_text(default: Any) -> str:
    if default is PydanticUndefined:
        return "required"
    if default is None:
        return "unset"
    if isinstance(default, Config):
        variant = schema.tag(type(default))
        return f"`{variant}`" if variant else "see below"
    return f"`{json.dumps(default)}`"


def _escape(text: str) -> str:
    return text.replace("|", "\\|")


def _commands(path: str, command: Any) -> Iterator[tuple[str, Any]]:
    """Yield a command and, depth first, the ones below it, hidden ones left out."""
    if command.hidden:
        return
    yield path, command
    for name, below in getattr(command, "commands", {}).items():
        yield from _commands(f"{path} {name}", below)


def _help(path: str, command: Any) -> str:
    context = command.make_context(path, [], resilient_parsing=True, terminal_width=HELP_WIDTH)
    return f"## {path}\n\n```text\n{command.get_help(context)}\n```\n"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
