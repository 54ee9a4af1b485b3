"""Kinds of checkpoints: each a module that tells whether a folder is one, and reads it as tensors in files.

A module has `recognise(path) -> str | None`, the reason in words, cheap and without side effects, and
`read(path) -> Checkpoint`, which raises UserError for what it cannot read. Nothing in a checkpoint is ever executed.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from rlctl_train.checkpoint.stored import Checkpoint
from rlctl_train.config.errors import UserError

KINDS = {
    "rlctl": "rlctl_train.checkpoint.kinds.own",
    "verl-fsdp": "rlctl_train.checkpoint.kinds.verl_fsdp",
    "megatron": "rlctl_train.checkpoint.kinds.megatron",
    "deepspeed": "rlctl_train.checkpoint.kinds.deepspeed",
    "peft": "rlctl_train.checkpoint.kinds.peft",
    "huggingface": "rlctl_train.checkpoint.kinds.huggingface",
}
"""Name -> module, in the order in which a folder is tried."""


def recognise(path: Path) -> tuple[str, str]:
    """Return the kind of a checkpoint and why it is taken for one; raises UserError where it is none."""
    if not path.exists():
        raise UserError(f"{path}: there is no such file or folder", "name the folder of a checkpoint")
    for kind in KINDS:
        reason = _module(kind).recognise(path)
        if reason is not None:
            return kind, reason
    raise UserError(
        f"{path} is no checkpoint of a known kind", f"look inside, or name one with --kind: {', '.join(KINDS)}"
    )


def read(path: Path, kind: str | None = None) -> Checkpoint:
    """Read a checkpoint as tensors in files, of the kind it is recognised as unless one is named."""
    return _module(recognise(path)[0] if kind is None else kind).read(path)


def _module(kind: str) -> Any:
    return importlib.import_module(KINDS[kind])
