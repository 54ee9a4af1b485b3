"""Read source data for `data.prepare_sets`: JSON lines, parquet or JSON files on this machine, or the hub. No torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rlctl_train.config.errors import PREFLIGHT, UserError
from rlctl_train.data.jsonl import Line, read_jsonl

SPLITS = ("train", "test")


def local_splits(source: Path, required: Sequence[str]) -> dict[str, list[Line]]:
    """Return the splits found in a folder (`train*`, `test*`, at most one folder deep) or in one file (as train)."""
    if not source.exists():
        raise UserError(f"no such file or folder: {source}", "check --source", exit_code=PREFLIGHT)
    if source.is_file():
        name = next((split for split in SPLITS if source.stem.startswith(split)), SPLITS[0])
        return {name: _read_all([source], required)}
    files = {split: _files(source, split) for split in SPLITS}
    if not files[SPLITS[0]]:
        raise UserError(
            f"{source} has no train split", "put train.jsonl (or .parquet) and test.jsonl there", exit_code=PREFLIGHT
        )
    return {split: _read_all(found, required) for split, found in files.items() if found}


def hub_splits(dataset: str, subset: str) -> dict[str, list[Line]]:
    """Download a dataset from the Hugging Face hub, or say why that is not possible here."""
    remedy = "give the files with --source PATH"
    try:
        import datasets  # pyright: ignore[reportMissingImports], an optional package
    except ImportError as error:
        raise UserError(
            f"reading {dataset} from the hub needs the package datasets",
            f"pip install 'rlctl[hub]', or {remedy}",
            exit_code=PREFLIGHT,
        ) from error
    try:
        loaded = {split: datasets.load_dataset(dataset, subset, split=split) for split in SPLITS}
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise UserError(
            f"cannot read {dataset} from the hub: {error}", f"check the network, or {remedy}", exit_code=PREFLIGHT
        ) from error
    return {split: [Line(i, dict(row)) for i, row in enumerate(rows)] for split, rows in loaded.items()}


def _files(source: Path, split: str) -> list[Path]:
    """Find one split's files: JSON lines or parquet by name, else single JSON problems in a folder of that name."""
    for pattern in (f"{split}*.jsonl", f"{split}*.parquet", f"*/{split}*.parquet", f"{split}/**/*.json"):
        if found := sorted(source.glob(pattern)):
            return found
    return []


def _read_all(files: Sequence[Path], required: Sequence[str]) -> list[Line]:
    lines: list[Line] = []
    for file in files:
        lines += _read(file, required, first=len(lines))
    return lines


def _read(file: Path, required: Sequence[str], first: int) -> list[Line]:
    """Read one file; rows of parquet and single JSON files are numbered from `first`."""
    if file.suffix == ".json":
        return [Line(first, _require(file, json.loads(file.read_bytes()), required))]
    if file.suffix != ".parquet":
        return read_jsonl(file, *required)
    try:
        rows = pq.read_table(file).to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{file} is not readable as parquet: {error}", "check the file", exit_code=PREFLIGHT) from error
    return [Line(i, _require(file, row, required)) for i, row in enumerate(rows, start=first)]


def _require(file: Path, value: Any, required: Sequence[str]) -> dict[str, Any]:
    missing = [key for key in required if key not in value]
    if missing:
        raise UserError(
            f"{file} has no {' and no '.join(map(repr, missing))}, only {', '.join(map(repr, value))}",
            "give a file of this dataset, or use `rlctl data prep jsonl`",
        )
    return value
