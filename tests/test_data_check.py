"""Checking a prompt file: every kind of problem is found, with its rows; a clean file says so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer

from rlctl_train.config.data import ArithmeticData
from rlctl_train.config.reward import ArithmeticReward
from rlctl_train.data.arithmetic import write_arithmetic
from rlctl_train.data.check import Report, check_file


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def row(prompt: str, answer: str | None, source: str = "arithmetic", response: str | None = None) -> dict[str, Any]:
    return {"data_source": source, "prompt": prompt, "reward_model": {"ground_truth": answer}, "response": response}


def found(report: Report) -> dict[str, tuple[int, ...]]:
    return {finding.kind: finding.rows for finding in report.findings}


def test_prepared_files_are_clean(tmp_path: Path, tiny_model: Path) -> None:
    write_arithmetic(ArithmeticData(num_train=40, num_val=10), tmp_path, 0)
    report = check_file(
        tmp_path / "train.parquet",
        tokenizer=AutoTokenizer.from_pretrained(tiny_model),
        max_prompt_tokens=12,
        reward=ArithmeticReward(),
        held_out=tmp_path / "val.parquet",
    )
    assert report.findings == () and report.sources == {"arithmetic": 40}


def test_each_problem_names_its_rows(tmp_path: Path) -> None:
    rows = [
        row("1+1=", "2"), row("", "3"), row("1+2=", None), row("1+1=", "2"), row("1+1=", "3"), row("2+2=", "4", "mine"),
    ]  # fmt: skip
    report = check_file(write(tmp_path / "x.parquet", rows))
    assert found(report) == {
        "bad_row": (1,), "empty_ground_truth": (2,), "duplicate": (3,), "contradiction": (4,), "unknown_source": (5,),
    }  # fmt: skip


def test_overlap_with_held_out_rows_is_found(tmp_path: Path) -> None:
    held_out = write(tmp_path / "val.parquet", [row("1+2=", "3")])
    train = write(tmp_path / "train.parquet", [row("1+1=", "2"), row("1+2=", "3")])
    assert found(check_file(train, held_out=held_out)) == {"overlap": (1,)}


def test_a_named_reward_must_read_every_answer_and_accept_every_response(tmp_path: Path) -> None:
    rows = [row("1+1=", "2", "mine", "2"), row("1+2=", "three", "mine"), row("2+2=", "4", "mine", "5")]
    report = check_file(write(tmp_path / "x.parquet", rows), reward=ArithmeticReward())
    assert found(report) == {"ungradable": (1,), "wrong_response": (2,)}


def test_lengths_are_counted_after_the_chat_template(tmp_path: Path, tiny_model: Path) -> None:
    rows = [row("1" * length, "1") for length in (1, 2, 3, 30)]
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    report = check_file(write(tmp_path / "x.parquet", rows), tokenizer=tokenizer, max_prompt_tokens=20)
    assert found(report) == {"too_long": (3,)}
    lengths = report.prompt_tokens
    assert lengths is not None and report.response_tokens is None
    assert (lengths.min, lengths.mean, lengths.p95, lengths.max) == (4, 12.0, 33, 33)
    assert sum(count for _, _, count in lengths.histogram) == 4
    assert all(low <= high for low, high, _ in lengths.histogram)


@pytest.mark.parametrize(("response", "kinds"), [("2", set()), (None, {"no_response"})])
def test_a_supervised_file_needs_responses_and_no_ground_truth(
    tmp_path: Path, response: str | None, kinds: set[str]
) -> None:
    rows = [{"data_source": "arithmetic", "prompt": "1+1=", "response": response}]
    assert set(found(check_file(write(tmp_path / "x.parquet", rows)))) == kinds
