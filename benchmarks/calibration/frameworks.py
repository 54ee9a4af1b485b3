"""Peaks that training frameworks published with their full configuration, as setups of the calculator.

`reads` in the table says where a row's configuration had to be read from the framework's code, and which path it took.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from rlctl_hw.model_catalogue import named_shape
from rlctl_hw.setup import Setup
from rlctl_hw.types import Mesh

TABLE = Path(__file__).parent / "frameworks.csv"

Row = Mapping[str, str]


def rows() -> list[dict[str, str]]:
    """Return the table."""
    with TABLE.open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def setup(row: Row) -> Setup:
    """Return the setup of a row."""
    mesh = Mesh(**_given(row, Mesh))
    sharded = replace(mesh, dp_shard=int(row["gpus"]) // mesh.world_size)
    return Setup(shape=named_shape(row["model"]), mesh=sharded, **_given(row, Setup, leave_out=("device",)))


def common_flags(row: Row) -> Setup:
    """Return the setup as somebody describes it who does not know the framework's code: the path stays unknown."""
    known, usual = setup(row), Setup(named_shape(row["model"]), "fsdp2", "sft")
    return replace(
        known,
        fp32_logits=usual.fp32_logits,
        compiled_loss=usual.compiled_loss,
        logits_chunk_tokens=usual.logits_chunk_tokens,
        activation_offload=usual.activation_offload,
        lora_targets=usual.lora_targets,
    )


def covered() -> Iterator[tuple[Row, Setup]]:
    """Yield every row with its setup."""
    for row in rows():
        yield row, setup(row)


def _given(row: Row, record: type, leave_out: tuple[str, ...] = ()) -> dict[str, Any]:
    names = [field.name for field in fields(record) if field.name not in leave_out]
    return {name: _value(row[name]) for name in names if row.get(name)}


def _value(text: str) -> Any:
    if text in ("True", "False"):
        return text == "True"
    return int(text) if text.isdigit() else text
