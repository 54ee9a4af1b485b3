"""`rlctl data prep` writes prompt files; `rlctl data check` looks one over before a run does."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rlctl import render
from rlctl.commands._workshop import reward_config, train_extra
from rlctl.render import Output, OutputOption
from rlctl_train.config.errors import OK, PREFLIGHT, USAGE, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rlctl_train.data.check import Lengths, Report
    from rlctl_train.data.prepare import Prepared

ROWS_SHOWN = 5
BAR_WIDTH = 40

app = typer.Typer(rich_markup_mode=None, no_args_is_help=True, help="Prepare and check training data.")
prep = typer.Typer(rich_markup_mode=None, no_args_is_help=True, help="Write prompt files (parquet).")
app.add_typer(prep, name="prep")

OutOption = Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder for the parquet files.")]
SourceOption = Annotated[
    Path | None, typer.Option("--source", metavar="PATH", help="Local folder or file; without it the hub is asked.")
]
ForceOption = Annotated[bool, typer.Option("--force", "-f", help="Overwrite files that exist.")]


@prep.command()
def gsm8k(
    out: OutOption, source: SourceOption = None, force: ForceOption = False, output: OutputOption = "text"
) -> None:
    """GSM8K: grade-school word problems (question and answer; from train.jsonl and test.jsonl)."""
    with train_extra():
        from rlctl_train.data.prepare_sets import prepare_gsm8k
    _show_prepared(prepare_gsm8k(out, source, force=force), output)


@prep.command()
def math(
    out: OutOption, source: SourceOption = None, force: ForceOption = False, output: OutputOption = "text"
) -> None:
    r"""MATH: competition problems (problem and solution; the answer is the last \boxed)."""
    with train_extra():
        from rlctl_train.data.prepare_sets import prepare_math
    _show_prepared(prepare_math(out, source, force=force), output)


@prep.command()
def arithmetic(
    out: OutOption,
    operators: Annotated[str, typer.Option(help="Operators that occur, such as +-*.")] = "+",
    min_operand: Annotated[int, typer.Option(min=0, help="Smallest operand.")] = 0,
    max_operand: Annotated[int, typer.Option(min=1, help="Largest operand.")] = 99,
    num_train: Annotated[int, typer.Option(min=1, help="Training problems.")] = 2048,
    num_val: Annotated[int, typer.Option(min=0, help="Held-out problems.")] = 256,
    careless_demonstrations: Annotated[
        float, typer.Option(min=0, max=1, help="Share of training problems whose `response` forgets to carry.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed that draws the problems.")] = 0,
    force: ForceOption = False,
    output: OutputOption = "text",
) -> None:
    """Sums such as 23+45=, made on the spot; held-out problems never occur in training."""
    from rlctl_train.config.data import ArithmeticData

    with train_extra():
        from rlctl_train.data.arithmetic import OPERATORS, write_arithmetic
    if not operators or set(operators) - set(OPERATORS):
        raise UserError(
            f"--operators {operators!r} is not made of {' '.join(OPERATORS)}", "write for example --operators +-"
        )
    wanted = {
        "operators": tuple(operators),
        "min_operand": min_operand,
        "max_operand": max_operand,
        "num_train": num_train,
        "num_val": num_val,
        "careless_demonstrations": careless_demonstrations,
    }
    config = ArithmeticData.model_validate(wanted)
    _show_prepared(write_arithmetic(config, out, seed, force=force), output)


@prep.command()
def jsonl(
    source: Annotated[Path, typer.Option("--source", metavar="FILE", help="File with one JSON object a line.")],
    out: OutOption,
    prompt_key: Annotated[str, typer.Option(help="Key of the prompt: text, or a list of messages.")] = "prompt",
    answer_key: Annotated[str, typer.Option(help="Key of the right answer; '' when there is none.")] = "answer",
    response_key: Annotated[str | None, typer.Option(help="Key of a model response to learn from.")] = None,
    extra_key: Annotated[
        list[str] | None, typer.Option(help="Further key to keep for the reward function; may be repeated.")
    ] = None,
    data_source: Annotated[str | None, typer.Option(help="Name of the data in metrics; default the file's.")] = None,
    num_val: Annotated[int, typer.Option(min=0, help="Rows to hold out as val.parquet.")] = 0,
    seed: Annotated[int, typer.Option(help="Seed that draws the held-out rows.")] = 0,
    force: ForceOption = False,
    output: OutputOption = "text",
) -> None:
    """JSON lines of your own: name the keys that hold prompt, answer and response."""
    with train_extra():
        from rlctl_train.data.prepare_sets import JsonlKeys, prepare_jsonl
    keys = JsonlKeys(prompt_key, answer_key or None, response_key or None, tuple(extra_key or ()))
    name = data_source or source.stem
    _show_prepared(prepare_jsonl(out, source, keys, data_source=name, num_val=num_val, seed=seed, force=force), output)


@app.command()
def check(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Parquet file, or folder of parquet files.")],
    model: Annotated[
        str | None, typer.Option(help="Folder or hub id whose tokenizer and chat template give lengths.")
    ] = None,
    max_prompt_tokens: Annotated[
        int | None, typer.Option(min=1, help="Longest prompt allowed (needs --model).")
    ] = None,
    reward: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Reward that must be able to read every answer; or FILE.py:FUNCTION."),
    ] = None,
    val: Annotated[Path | None, typer.Option(metavar="FILE", help="Held-out file that must share no prompt.")] = None,
    output: OutputOption = "text",
) -> None:
    """Report bad rows, lengths, duplicates and unknown rewards. Exit code 0 when clean, 2 when not."""
    if max_prompt_tokens is not None and model is None:
        raise UserError("--max-prompt-tokens counts tokens of a model", "name it with --model PATH")
    with train_extra():
        from rlctl_train.data.check import check_file
    report = check_file(
        file,
        tokenizer=None if model is None else _tokenizer(model),
        max_prompt_tokens=max_prompt_tokens,
        reward=None if reward is None else reward_config(reward),
        held_out=val,
    )
    _show_report(report, output)
    raise typer.Exit(USAGE if report.findings else OK)


def _tokenizer(model: str) -> PreTrainedTokenizerBase:
    with train_extra():
        from transformers import AutoTokenizer
    try:
        return AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise UserError(
            f"--model {model} has no tokenizer that loads: {error}",
            "name a folder with tokenizer.json and tokenizer_config.json, or a hub id",
            exit_code=PREFLIGHT,
        ) from error


def _show_prepared(done: Prepared, output: Output) -> None:
    files = [{"path": str(f.path), "rows": f.num_rows, "columns": list(f.columns)} for f in done.files]
    if not render.document(output, files=files, skipped=[asdict(skipped) for skipped in done.skipped]):
        render.table(("FILE", "ROWS", "COLUMNS"), [(f["path"], f["rows"], ", ".join(f["columns"])) for f in files])
    by_why: dict[tuple[str, str], list[int]] = {}
    for skipped in done.skipped:
        by_why.setdefault((skipped.split, skipped.why), []).append(skipped.row)
    for (split, why), rows in by_why.items():
        render.note(f"{split}: left out {_rows(rows)}: {why}")


def _show_report(report: Report, output: Output) -> None:
    content = {**asdict(report), "path": str(report.path), "clean": not report.findings}
    if render.document(output, **json.loads(json.dumps(content))):
        return
    render.heading(f"{report.path}: {report.num_rows} rows")
    render.table(("DATA SOURCE", "ROWS"), report.sources.items())
    for name, lengths in (("prompt", report.prompt_tokens), ("response", report.response_tokens)):
        if lengths is not None:
            _show_lengths(name, lengths)
    if report.findings:
        rows = [
            (finding.kind, len(finding.rows), f"{_rows(finding.rows)}: {finding.what}") for finding in report.findings
        ]
        render.text("")
        render.table(("PROBLEM", "ROWS", "WHERE AND WHAT"), rows)
    render.say("problems found" if report.findings else "clean")


def _show_lengths(name: str, lengths: Lengths) -> None:
    facts = f"min {lengths.min}, mean {lengths.mean:.1f}, p95 {lengths.p95}, max {lengths.max}"
    render.heading(f"\n{name} tokens: {facts}")
    most = max(count for _, _, count in lengths.histogram)
    bars = [
        (str(low) if low == high else f"{low}-{high}", count, "#" * -(-BAR_WIDTH * count // most))
        for low, high, count in lengths.histogram
    ]
    render.table(("TOKENS", "ROWS", ""), bars)


def _rows(rows: Sequence[int]) -> str:
    shown = ", ".join(map(str, rows[:ROWS_SHOWN]))
    more = len(rows) - ROWS_SHOWN
    return f"row{'s' if len(rows) > 1 else ''} {shown}" + (f" and {more} more" if more > 0 else "")
