"""Adapters of the PEFT library: `adapter_config.json` and `adapter_model.safetensors` or `.bin`."""

from __future__ import annotations

from pathlib import Path

from rlctl_train.checkpoint.kinds.folder import dtype_words, missing, read_table
from rlctl_train.checkpoint.kinds.huggingface import read_weights
from rlctl_train.checkpoint.stored import Adapter, Checkpoint

SETTINGS = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
TOLD = ("base_model_name_or_path", "peft_type", "r", "lora_alpha")
"""Settings that are facts of the checkpoint."""


def recognise(path: Path) -> str | None:
    """Say why a folder is an adapter; None where it is none."""
    return f"it has {SETTINGS}" if (path / SETTINGS).is_file() else None


def read(path: Path) -> Checkpoint:
    """Read the adapter; there are no weights beside it."""
    if not (path / SETTINGS).is_file():
        raise missing(path, f"there is no {SETTINGS}")
    file = next((path / name for name in WEIGHTS if (path / name).is_file()), None)
    if file is None:
        raise missing(path, f"there is neither {' nor '.join(WEIGHTS)}")
    settings = read_table(path / SETTINGS)
    tensors, notes = read_weights(file)
    facts: dict[str, str | int] = {"dtype": dtype_words(tensors.values())}
    facts |= {name: str(settings[name]) for name in TOLD if settings.get(name) is not None}
    return Checkpoint(
        kind="peft",
        path=path,
        tensors={},
        adapter=Adapter(settings, tensors),
        facts=facts,
        notes=tuple(notes),
        files=(path / SETTINGS, file),
    )
