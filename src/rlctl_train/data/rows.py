"""Rows of prompt files: parquet in the field's common columns, read into plain records. No torch.

A record holds `prompt` (chat messages), `data_source`, `ground_truth`, `extra_info`, `response` (or None) and,
where the file has whole conversations, `messages`. Rows count from 0, over all files of a folder in name order.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rlctl_train.config.errors import PREFLIGHT, UserError

COLUMNS = ("data_source", "prompt", "messages", "reward_model", "extra_info", "response")
ROLES = ("system", "user", "assistant", "tool", "developer")
CHUNK_ROWS = 1024


class RowError(Exception):
    """A row that cannot be used; the message says why."""


class RowFile:
    """The rows of a parquet file, or of all parquet files of a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._table = _read(path)

    def __len__(self) -> int:
        return self._table.num_rows

    def has(self, column: str) -> bool:
        """Say whether the file has a column."""
        return column in self._table.column_names

    def require(self, column: str) -> None:
        """Refuse a file without this column."""
        if not self.has(column):
            raise _missing(self.path, column, self._table.column_names)

    def record(self, row: int) -> dict[str, Any]:
        """Return one record; a row that cannot be used raises `RowError`."""
        return to_record(self._table.slice(row, 1).to_pylist()[0])

    def records(self) -> Iterator[tuple[int, dict[str, Any] | RowError]]:
        """Yield every row number with its record, or with what is wrong with it."""
        for start in range(0, len(self), CHUNK_ROWS):
            for row, columns in enumerate(self._table.slice(start, CHUNK_ROWS).to_pylist(), start=start):
                try:
                    yield row, to_record(columns)
                except RowError as error:
                    yield row, error


def to_record(columns: dict[str, Any]) -> dict[str, Any]:
    """Turn a row's columns into a record; a row that cannot be used raises `RowError`."""
    record: dict[str, Any] = {
        "data_source": columns.get("data_source") or "unnamed",
        "ground_truth": (columns.get("reward_model") or {}).get("ground_truth"),
        "extra_info": columns.get("extra_info") or {},
        "response": columns.get("response"),
    }
    if columns.get("messages") is not None:
        messages = as_messages(columns["messages"], "messages")
        first = next((i for i, message in enumerate(messages) if message["role"] == "assistant"), None)
        if not first:
            raise RowError("'messages' needs a user message and, after it, one by the assistant")
        return record | {"prompt": messages[:first], "response": messages[first]["content"], "messages": messages}
    record["prompt"] = as_messages(columns.get("prompt"), "prompt")
    if record["response"] is not None and not isinstance(record["response"], str):
        raise RowError("'response' is not text")
    return record


def as_messages(value: Any, column: str) -> list[dict[str, str]]:
    """Return a prompt as chat messages; text becomes one user message. What is neither raises `RowError`."""
    if isinstance(value, str):
        value = [{"role": "user", "content": value}]
    if not isinstance(value, list) or not value:
        raise RowError(f"{column!r} is empty" if not value else f"{column!r} is neither text nor a list of messages")
    messages = []
    for message in value:
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise RowError(f"{column!r} has a message whose role is not one of {', '.join(ROLES)}")
        if not isinstance(message.get("content"), str):
            raise RowError(f"{column!r} has a message without text")
        messages.append({"role": message["role"], "content": message["content"]})
    if not any(message["content"].strip() for message in messages):
        raise RowError(f"{column!r} is empty")
    return messages


def _read(path: Path) -> pa.Table:
    if not path.exists():
        raise UserError(
            f"no such file or folder: {path}", "check the path, or make it with `rlctl data prep`", exit_code=PREFLIGHT
        )
    files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    if not files:
        raise UserError(
            f"{path} holds no *.parquet file", "name a parquet file or a folder of them", exit_code=PREFLIGHT
        )
    tables = [_read_file(file) for file in files]
    try:
        table = pa.concat_tables(tables, promote_options="permissive")
    except pa.ArrowException as error:
        raise UserError(
            f"the files in {path} have different columns: {error}",
            "write them with the same columns",
            exit_code=PREFLIGHT,
        ) from error
    if table.num_rows == 0:
        raise UserError(f"{path} has no rows", "give a file with at least one row", exit_code=PREFLIGHT)
    return table


def _read_file(file: Path) -> pa.Table:
    try:
        names = pq.read_schema(file).names
        table = pq.read_table(file, columns=[name for name in COLUMNS if name in names])
    except (pa.ArrowException, OSError) as error:
        remedy = "write it again as parquet"
        if file.suffix in (".jsonl", ".json"):
            remedy = f"convert it: rlctl data prep jsonl --source {file} --out FOLDER"
        raise UserError(f"{file} is not readable as parquet: {error}", remedy, exit_code=PREFLIGHT) from error
    if not {"prompt", "messages"}.intersection(names):
        raise _missing(file, "prompt", names)
    return table


def _missing(path: Path, column: str, names: list[str]) -> UserError:
    return UserError(
        f"{path} has no column {column!r}, only {', '.join(names)}",
        f"add {column!r} (see docs/data.md), or make the file with `rlctl data prep`",
        exit_code=PREFLIGHT,
    )
