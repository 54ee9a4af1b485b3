"""Look a prompt file over before a run does: bad rows, lengths, duplicates, answers no reward can read. No torch."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlctl_train.config.reward import GraderConfig, RewardConfig
from rlctl_train.data.rows import CHUNK_ROWS, RowError, RowFile
from rlctl_train.data.template import render, require_chat_template, token_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

KNOWN_SOURCES = {
    "arithmetic": "arithmetic",
    "openai/gsm8k": "gsm8k",
    "DigitalLearningGmbH/MATH-lighteval": "math",
    "lighteval/MATH": "math",
    "HuggingFaceH4/MATH-500": "math",
}
"""Data sources and the built-in reward that fits each."""
NUM_BINS = 10

Records = dict[int, dict[str, Any]]


@dataclass(frozen=True)
class Finding:
    """One kind of problem: what it is, and the rows that have it (numbered from 0)."""

    kind: str
    what: str
    rows: tuple[int, ...]


@dataclass(frozen=True)
class Lengths:
    """How long texts are, in tokens; `histogram` counts texts in bins (from, to inclusive, count)."""

    min: int
    mean: float
    p95: int
    max: int
    histogram: tuple[tuple[int, int, int], ...]


@dataclass(frozen=True)
class Report:
    """What a check found; a file without findings is clean."""

    path: Path
    num_rows: int
    sources: dict[str, int]
    findings: tuple[Finding, ...]
    prompt_tokens: Lengths | None = None
    response_tokens: Lengths | None = None


def check_file(
    path: Path,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_prompt_tokens: int | None = None,
    reward: RewardConfig | None = None,
    held_out: Path | None = None,
) -> Report:
    """Check one file; `held_out` is another file whose prompts must not occur in it."""
    file = RowFile(path)
    bad: dict[str, list[int]] = defaultdict(list)
    records: Records = {}
    for row, record in file.records():
        if isinstance(record, RowError):
            bad[str(record)].append(row)
        else:
            records[row] = record
    findings = [Finding("bad_row", why, tuple(rows)) for why, rows in bad.items()]
    findings += _answers(file, records) + _duplicates(records)
    findings += _sources(records) if reward is None else _graded(records, reward)
    if held_out is not None:
        findings += _overlap(records, held_out)
    prompts = responses = None
    if tokenizer is not None:
        require_chat_template(tokenizer)
        prompts, refused, long = _prompt_lengths(records, tokenizer, max_prompt_tokens)
        findings += refused + long
        responses = _lengths(_count(tokenizer, [r["response"] for r in records.values() if r["response"]]))
    counts = Counter(record["data_source"] for record in records.values())
    return Report(path, len(file), dict(counts), tuple(findings), prompts, responses)


def _answers(file: RowFile, records: Records) -> list[Finding]:
    """Find rows without a ground truth; a file for supervised training needs responses instead."""
    if file.has("reward_model"):
        rows = [row for row, record in records.items() if _empty(record["ground_truth"])]
        return _finding("empty_ground_truth", "the ground truth is empty", rows)
    rows = [row for row, record in records.items() if _empty(record["response"])]
    return _finding("no_response", "there is neither a ground truth nor a response", rows)


def _duplicates(records: Records) -> list[Finding]:
    first: dict[str, int] = {}
    again, contradicting = [], []
    for row, record in records.items():
        original = first.setdefault(_key(record), row)
        if original == row:
            continue
        same = records[original]["ground_truth"] == record["ground_truth"]
        (again if same else contradicting).append(row)
    return [
        *_finding("duplicate", "the prompt occurs before", again),
        *_finding("contradiction", "the prompt occurs before with another ground truth", contradicting),
    ]


def _sources(records: Records) -> list[Finding]:
    rows: dict[str, list[int]] = defaultdict(list)
    for row, record in records.items():
        if record["data_source"] not in KNOWN_SOURCES:
            rows[record["data_source"]].append(row)
    what = "no built-in reward is known for data_source {!r}; say which one grades it with --reward"
    return [Finding("unknown_source", what.format(source), tuple(found)) for source, found in rows.items()]


def _graded(records: Records, reward: RewardConfig) -> list[Finding]:
    """Grade each row's own response (an empty one where it has none) to see that the reward can read its answer."""
    from rlctl_train.rewards.pool import GradedSample, GraderPool

    samples = [
        GradedSample(r["response"] or "", r["ground_truth"], r["data_source"], r["extra_info"])
        for r in records.values()
    ]
    with GraderPool(reward, GraderConfig()) as pool:
        grades = pool.score(samples)
    failed: dict[str, list[int]] = defaultdict(list)
    wrong = []
    for (row, record), grade in zip(records.items(), grades, strict=True):
        if grade.error is not None:
            failed[grade.error].append(row)
        elif record["response"] and grade.accuracy <= 0:
            wrong.append(row)
    findings = [Finding("ungradable", f"the reward fails: {why}", tuple(rows)) for why, rows in failed.items()]
    return findings + _finding("wrong_response", "the row's own response gets no reward", wrong)


def _overlap(records: Records, held_out: Path) -> list[Finding]:
    other = {_key(record) for _, record in RowFile(held_out).records() if not isinstance(record, RowError)}
    rows = [row for row, record in records.items() if _key(record) in other]
    return _finding("overlap", f"the prompt occurs in {held_out} too", rows)


def _prompt_lengths(
    records: Records, tokenizer: PreTrainedTokenizerBase, limit: int | None
) -> tuple[Lengths | None, list[Finding], list[Finding]]:
    texts: dict[int, str] = {}
    refused: dict[str, list[int]] = defaultdict(list)
    for row, record in records.items():
        try:
            texts[row] = render(tokenizer, record["prompt"])
        except RowError as error:
            refused[str(error)].append(row)
    counts = _count(tokenizer, list(texts.values()))
    long = [row for row, count in zip(texts, counts, strict=True) if limit is not None and count > limit]
    return (
        _lengths(counts),
        [Finding("bad_row", why, tuple(rows)) for why, rows in refused.items()],
        _finding("too_long", f"the prompt is longer than {limit} tokens after the chat template", long),
    )


def _count(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[int]:
    counts: list[int] = []
    for start in range(0, len(texts), CHUNK_ROWS):
        counts += [len(ids) for ids in token_ids(tokenizer, list(texts[start : start + CHUNK_ROWS]))]
    return counts


def _lengths(counts: list[int]) -> Lengths | None:
    if not counts:
        return None
    ordered = sorted(counts)
    low, high = ordered[0], ordered[-1]
    width = max(-(-(high - low + 1) // NUM_BINS), 1)
    bins = Counter((count - low) // width for count in ordered)
    histogram = tuple((low + i * width, low + (i + 1) * width - 1, bins[i]) for i in range(max(bins) + 1))
    p95 = ordered[-(-len(ordered) * 95 // 100) - 1]
    return Lengths(low, sum(ordered) / len(ordered), p95, high, histogram)


def _finding(kind: str, what: str, rows: Iterable[int]) -> list[Finding]:
    found = tuple(rows)
    return [Finding(kind, what, found)] if found else []


def _key(record: dict[str, Any]) -> str:
    return json.dumps(record.get("messages", record["prompt"]))


def _empty(value: Any) -> bool:
    return value is None or (isinstance(value, str | list | dict) and not value)
