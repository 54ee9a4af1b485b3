"""`rlctl reward score` grades a file of responses outside any run; `test` tries a reward; `ls` lists them."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from rlctl import render
from rlctl.commands._workshop import reward_config, train_extra
from rlctl.render import OutputOption
from rlctl_train.config.errors import DOES_NOT_FIT, OK, UserError
from rlctl_train.config.reward import (
    ArithmeticReward,
    CustomReward,
    GraderConfig,
    Gsm8kReward,
    MathReward,
    RewardConfig,
    SumReward,
)

if TYPE_CHECKING:
    from rlctl_train.rewards.pool import Grade, GradedSample

SECTIONS = (ArithmeticReward, Gsm8kReward, MathReward, CustomReward, SumReward)
NUM_SHOWN = 5

app = typer.Typer(rich_markup_mode=None, no_args_is_help=True, help="Score responses outside a run.")

RewardOption = Annotated[
    str, typer.Option("--reward", metavar="NAME", help="arithmetic, gsm8k, math, or FILE.py:FUNCTION.")
]
MethodOption = Annotated[
    Literal["strict", "flexible"] | None,
    typer.Option(help="gsm8k: the number after ####, or the last one; default strict."),
]
TimeLimitOption = Annotated[float, typer.Option(min=0.001, help="Longest time for one response, in seconds.")]
WorkersOption = Annotated[int, typer.Option(min=1, help="Grader processes.")]


@app.command()
def score(
    reward: RewardOption,
    data: Annotated[Path, typer.Option(metavar="FILE", help='JSON lines with "response" and "ground_truth".')],
    method: MethodOption = None,
    time_limit: TimeLimitOption = 10.0,
    workers: WorkersOption = 1,
    output: OutputOption = "text",
) -> None:
    """Grade every line of a file, in order. With -o json: one result a line.

    Further keys of a line reach the reward function of a FILE.py by name.
    """
    config = reward_config(reward, method)
    samples = _read_samples(data)
    grades = _grade(config, samples, GraderConfig(num_workers=workers, time_limit_s=time_limit))
    if output == "json":
        for grade in grades:
            render.text(json.dumps({"schema_version": render.SCHEMA_VERSION, **_result(grade)}, ensure_ascii=False))
    elif not render.document(output, results=[_result(grade) for grade in grades]):
        rows = [(grade.score, grade.reason, _one_line(s.response)) for grade, s in zip(grades, samples, strict=True)]
        render.table(("SCORE", "REASON", "RESPONSE ENDS WITH"), rows)
    mean = sum(grade.score for grade in grades) / len(grades)
    errors = sum(grade.error is not None for grade in grades)
    render.say(f"mean score {mean:.4g} over {len(grades)} responses; {errors} could not be graded")


@app.command()
def test(
    reward: RewardOption,
    data: Annotated[Path, typer.Option(metavar="FILE", help="Parquet with a right answer in 'response'.")],
    method: MethodOption = None,
    num_rows: Annotated[int, typer.Option(min=2, help="Rows to try, from the first.")] = 200,
    time_limit: TimeLimitOption = 10.0,
    workers: WorkersOption = 1,
    output: OutputOption = "text",
) -> None:
    """Try a reward: right answers must score, answers of other rows must not. Exit code 3 when they do otherwise."""
    with train_extra():
        from rlctl_train.rewards.pool import GraderPool
        from rlctl_train.rewards.trial import try_reward

    gold = _read_gold(data, num_rows)
    with GraderPool(reward_config(reward, method), GraderConfig(num_workers=workers, time_limit_s=time_limit)) as pool:
        trial = try_reward(pool, gold)
    content = {
        "passed": trial.passed,
        "rows": len(gold),
        "gold": trial.gold,
        "other": trial.other,
        "empty": trial.empty,
    }
    if not render.document(output, **content):
        rows = [
            ("each row's own response", trial.gold, "1"),
            ("another row's response", trial.other, "near 0"),
            ("the empty response", trial.empty, "0"),
        ]
        render.table(("GRADED", "ACCURACY", "SHOULD BE"), rows)
    wrong = [(row, grade) for row, grade in enumerate(trial.gold_grades) if grade.accuracy < 1]
    for row, grade in wrong[:NUM_SHOWN]:
        render.note(f"row {row}, a right answer, got {grade.score:g}: {grade.reason}")
    raise typer.Exit(OK if trial.passed else DOES_NOT_FIT)


@app.command(name="ls")
def list_rewards(output: OutputOption = "text") -> None:
    """List the rewards and their settings."""
    entries = [_entry(section) for section in SECTIONS]
    if not render.document(output, rewards=entries):
        rows = [(e["name"], ", ".join(f"{k}={v}" for k, v in e["settings"].items()), e["what"]) for e in entries]
        render.table(("NAME", "SETTINGS", "WHAT"), rows)


def _read_samples(path: Path) -> list[GradedSample]:
    from rlctl_train.data.jsonl import read_jsonl
    from rlctl_train.rewards.base import GradedSample

    lines = read_jsonl(path, "response", "ground_truth")
    wrong = [str(line.number) for line in lines if not isinstance(line.value["response"], str)]
    if wrong:
        raise UserError(f"{path}: 'response' is not text in line {', '.join(wrong[:NUM_SHOWN])}", "mend these lines")
    samples = []
    for line in lines:
        extra = dict(line.value)
        response, truth = extra.pop("response"), extra.pop("ground_truth")
        samples.append(GradedSample(response, truth, str(extra.pop("data_source", "")), extra))
    return samples


def _read_gold(path: Path, num_rows: int) -> list[GradedSample]:
    with train_extra():
        from rlctl_train.data.rows import RowError, RowFile
    from rlctl_train.rewards.base import GradedSample

    file = RowFile(path)
    file.require("response")
    gold: list[GradedSample] = []
    for _, r in file.records():
        if len(gold) < num_rows and not isinstance(r, RowError) and r["response"]:
            gold.append(GradedSample(r["response"], r["ground_truth"], r["data_source"], r["extra_info"]))
    if len(gold) < 2:
        raise UserError(
            f"{path} has fewer than two rows with a response", "give a file with right answers in 'response'"
        )
    return gold


def _grade(config: RewardConfig, samples: list[GradedSample], grader: GraderConfig) -> list[Grade]:
    from rlctl_train.rewards.pool import GraderPool

    with GraderPool(config, grader) as pool:
        return pool.score(samples)


def _result(grade: Grade) -> dict[str, Any]:
    result = asdict(grade)
    return {key: result[key] for key in ("score", "reason", "parts", "error")}


def _one_line(response: str) -> str:
    return " ".join(response[-60:].split())


def _entry(section: type[ArithmeticReward | Gsm8kReward | MathReward | CustomReward | SumReward]) -> dict[str, Any]:
    settings = {
        name: None if field.is_required() else field.get_default(call_default_factory=True)
        for name, field in section.model_fields.items()
        if name != "type"
    }
    doc = (section.__doc__ or "").strip().splitlines()[0]
    return {"name": section.model_fields["type"].default, "what": doc, "settings": settings}
