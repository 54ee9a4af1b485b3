"""Turn known datasets, and anybody's JSON lines, into prompt files in the common columns. No torch."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlctl_train.config.errors import UserError
from rlctl_train.data.jsonl import Line, listed, read_jsonl
from rlctl_train.data.prepare import Prepared, Skipped, common_row, user_message, write_splits
from rlctl_train.data.prepare_sources import hub_splits, local_splits
from rlctl_train.data.rows import RowError, as_messages
from rlctl_train.rewards.boxed import last_boxed

GSM8K_SOURCE, GSM8K_SUBSET = "openai/gsm8k", "main"
GSM8K_INSTRUCTION = 'Think step by step and finish with the final number after "####".'
MATH_SOURCE, MATH_SUBSET = "DigitalLearningGmbH/MATH-lighteval", "default"
MATH_INSTRUCTION = r"Think step by step and put the final answer in \boxed{}."
CALCULATOR_NOTE = re.compile(r"<<[^<>]*>>")
"""GSM8K solutions carry calculator calls such as `<<48/2=24>>`, which are no part of the wanted text."""

ToRow = Callable[[Line, str, int], dict[str, Any]]
"""(source line, split, index) -> common row; raises `RowError` for a line to leave out."""


def prepare_gsm8k(out_dir: Path, source: Path | None, *, force: bool) -> Prepared:
    """Write GSM8K: the ground truth is the number after `####`, the demonstration the worked solution."""
    keys = ("question", "answer")
    splits = hub_splits(GSM8K_SOURCE, GSM8K_SUBSET) if source is None else local_splits(source, keys)
    return _write(splits, _gsm8k_row, out_dir, force=force)


def prepare_math(out_dir: Path, source: Path | None, *, force: bool) -> Prepared:
    r"""Write MATH (Hendrycks et al. 2021, arXiv:2103.03874): the ground truth is the solution's last `\boxed`."""
    keys = ("problem", "solution")
    splits = hub_splits(MATH_SOURCE, MATH_SUBSET) if source is None else local_splits(source, keys)
    return _write(splits, _math_row, out_dir, force=force)


@dataclass(frozen=True)
class JsonlKeys:
    """Where a JSON object holds what a row needs; keys set to None are not there."""

    prompt: str = "prompt"
    answer: str | None = "answer"
    response: str | None = None
    extra: tuple[str, ...] = ()
    """Keys copied into `extra_info`, where a reward function of one's own finds them."""

    def required(self) -> list[str]:
        """Return the keys every line must have."""
        return [key for key in (self.prompt, self.answer, self.response, *self.extra) if key is not None]


def prepare_jsonl(
    out_dir: Path, source: Path, keys: JsonlKeys, *, data_source: str, num_val: int, seed: int, force: bool
) -> Prepared:
    """Write any JSON lines; `num_val` rows, with all rows of the same prompts, are held out at random."""
    if keys.answer is None and keys.response is None:
        raise UserError("rows would have neither an answer nor a response", "give --answer-key or --response-key")
    lines = read_jsonl(source, *keys.required())
    splits = _hold_out(lines, keys.prompt, num_val, seed)

    def to_row(line: Line, split: str, index: int) -> dict[str, Any]:
        return _jsonl_row(line, split, index, keys, data_source)

    return _write(splits, to_row, out_dir, force=force)


def _write(splits: Mapping[str, Sequence[Line]], to_row: ToRow, out_dir: Path, *, force: bool) -> Prepared:
    rows: dict[str, list[dict[str, Any]]] = {}
    skipped: list[Skipped] = []
    for split, lines in splits.items():
        rows[split] = []
        for line in lines:
            try:
                rows[split].append(to_row(line, split, len(rows[split])))
            except RowError as error:
                skipped.append(Skipped(split, line.number, str(error)))
        if not rows[split]:
            reasons = listed([f"row {s.row}: {s.why}" for s in skipped if s.split == split])
            raise UserError(
                f"no row of the {split} split can be used: {reasons}", "check the source and the key options"
            )
    return Prepared(write_splits(out_dir, rows, force=force), tuple(skipped))


def _gsm8k_row(line: Line, split: str, index: int) -> dict[str, Any]:
    question, answer = _text(line, "question"), _text(line, "answer")
    solution, mark, number = answer.rpartition("####")
    if not mark or not number.strip():
        raise RowError("'answer' has no number after ####")
    return common_row(
        source=GSM8K_SOURCE,
        prompt=user_message(f"{question} {GSM8K_INSTRUCTION}"),
        ability="math",
        truth=number.strip().replace(",", ""),
        extra={"split": split, "index": index, "question": question, "answer": answer},
        response=f"{CALCULATOR_NOTE.sub('', solution)}#### {number.strip()}",
    )


def _math_row(line: Line, split: str, index: int) -> dict[str, Any]:
    problem, solution = _text(line, "problem"), _text(line, "solution")
    answer = last_boxed(solution)
    if not answer:
        raise RowError(r"'solution' has no \boxed answer")
    about = {key: str(line.value.get(key, "")) for key in ("level", "type")}
    return common_row(
        source=MATH_SOURCE,
        prompt=user_message(f"{problem} {MATH_INSTRUCTION}"),
        ability="math",
        truth=answer,
        extra={"split": split, "index": index, **about},
        response=solution,
    )


def _jsonl_row(line: Line, split: str, index: int, keys: JsonlKeys, data_source: str) -> dict[str, Any]:
    prompt = line.value[keys.prompt]
    response = None if keys.response is None else _text(line, keys.response)
    return common_row(
        source=data_source,
        prompt=as_messages(prompt, keys.prompt),
        ability="",
        truth=None if keys.answer is None else _truth(line.value[keys.answer], keys.answer),
        extra={"split": split, "index": index, **{key: line.value[key] for key in keys.extra}},
        response=response,
    )


def _truth(value: Any, key: str) -> str:
    """Return a ground truth as text: text as it is, anything else as JSON."""
    if value is None or value == "":
        raise RowError(f"{key!r} is empty")
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _text(line: Line, key: str) -> str:
    value = line.value[key]
    if not isinstance(value, str) or not value.strip():
        raise RowError(f"{key!r} is {'empty' if value in (None, '') or isinstance(value, str) else 'not text'}")
    return value


def _hold_out(lines: Sequence[Line], prompt_key: str, num_val: int, seed: int) -> dict[str, list[Line]]:
    if num_val == 0:
        return {"train": list(lines)}
    by_prompt: dict[str, list[Line]] = {}
    for line in lines:
        by_prompt.setdefault(json.dumps(line.value[prompt_key], sort_keys=True), []).append(line)
    prompts = sorted(by_prompt)
    random.Random(seed).shuffle(prompts)
    held: set[int] = set()
    for prompt in prompts:
        if len(held) >= num_val:
            break
        held |= {line.number for line in by_prompt[prompt]}
    train = [line for line in lines if line.number not in held]
    if not train:
        raise UserError(f"--num-val {num_val} leaves no row for training of {len(lines)}", "hold out fewer rows")
    return {"train": train, "val": [line for line in lines if line.number in held]}
