"""Write prompt files: parquet in the field's common columns, all splits or none. No torch."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rlctl_train.config.errors import PREFLIGHT, UserError

MESSAGE = pa.struct([("role", pa.string()), ("content", pa.string())])


@dataclass(frozen=True)
class Written:
    """One parquet file that now exists."""

    path: Path
    num_rows: int
    columns: tuple[str, ...]


@dataclass(frozen=True)
class Skipped:
    """A source row that was left out, and why; `row` is a line number of a JSON lines file or a row number."""

    split: str
    row: int
    why: str


@dataclass(frozen=True)
class Prepared:
    """What a preparation wrote, and what it left out."""

    files: tuple[Written, ...]
    skipped: tuple[Skipped, ...] = ()


def common_row(
    *,
    source: str,
    prompt: list[dict[str, str]],
    ability: str,
    truth: str | None,
    extra: Mapping[str, Any],
    response: str | None,
) -> dict[str, Any]:
    """Return a row in the common columns."""
    return {
        "data_source": source,
        "prompt": prompt,
        "ability": ability,
        "reward_model": {"style": "rule", "ground_truth": truth},
        "extra_info": dict(extra),
        "response": response,
    }


def user_message(content: str) -> list[dict[str, str]]:
    """Return a prompt of one user message."""
    return [{"role": "user", "content": content}]


def to_table(rows: Sequence[dict[str, Any]]) -> pa.Table:
    """Return rows of `common_row` as a table; the fields of `extra_info` are those of the rows."""
    extra = pa.array([row["extra_info"] for row in rows])
    schema = pa.schema(
        [
            ("data_source", pa.string()),
            ("prompt", pa.list_(MESSAGE)),
            ("ability", pa.string()),
            ("reward_model", pa.struct([("style", pa.string()), ("ground_truth", pa.string())])),
            ("extra_info", extra.type),
            ("response", pa.string()),
        ]
    )
    return pa.Table.from_pylist(list(rows), schema=schema)


def write_splits(out_dir: Path, splits: Mapping[str, Sequence[dict[str, Any]]], *, force: bool) -> tuple[Written, ...]:
    """Write `NAME.parquet` for each split; after any failure the folder is as it was before."""
    tables = {out_dir / f"{name}.parquet": to_table(rows) for name, rows in splits.items()}
    existing = [str(path) for path in tables if path.exists()]
    if existing and not force:
        raise UserError(f"{', '.join(existing)} exists already", "choose another --out, or overwrite with --force")
    try:
        _write_all(out_dir, tables)
    except OSError as error:
        raise UserError(
            f"cannot write to {out_dir}: {error.strerror or error}",
            "choose an --out that can be written",
            exit_code=PREFLIGHT,
        ) from error
    return tuple(Written(path, table.num_rows, tuple(table.column_names)) for path, table in tables.items())


def _write_all(out_dir: Path, tables: Mapping[Path, pa.Table]) -> None:
    made = [folder for folder in (out_dir, *out_dir.parents) if not folder.exists()]
    temporary = {path: path.with_name(f".{path.name}.{os.getpid()}.tmp") for path in tables}
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        for path, table in tables.items():
            pq.write_table(table, temporary[path])
        for path in tables:
            temporary[path].replace(path)
    except BaseException:
        for path in temporary.values():
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
        for folder in made:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise
