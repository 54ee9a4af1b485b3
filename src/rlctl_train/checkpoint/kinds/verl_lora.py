"""LoRA in verl's checkpoints: PEFT's own names among the weights, and its settings in a file beside them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlctl_train.checkpoint.kinds.folder import read_table
from rlctl_train.checkpoint.stored import Adapter, DerivedTensor, NamedTensor, StoredTensor

PREFIX = "base_model.model."
LORA = re.compile(r"\.(lora_(?:A|B|embedding_A|embedding_B|magnitude_vector))(?:\.([^.]+))?(\.weight)?$")


def split_adapter(
    tensors: Mapping[str, NamedTensor], folder: Path
) -> tuple[dict[str, NamedTensor], Adapter | None, list[str]]:
    """Return base weights under their own names, the adapter under PEFT's, and what is not known of it."""
    if not any(LORA.search(name) for name in tensors):
        return dict(tensors), None, []
    base: dict[str, NamedTensor] = {}
    adapter: dict[str, NamedTensor] = {}
    for name, tensor in tensors.items():
        if match := LORA.search(name):
            new_name = f"{name[: match.start()]}.{match[1]}{match[3] or ''}"
            adapter[new_name] = renamed(tensor, new_name)
        else:
            new_name = name.removeprefix(PREFIX).replace(".base_layer.", ".")
            base[new_name] = renamed(tensor, new_name)
    settings, notes = _settings(folder, adapter)
    return base, Adapter(settings, adapter), notes


def renamed(tensor: NamedTensor, name: str) -> NamedTensor:
    """Return the same tensor under another name."""
    if isinstance(tensor, StoredTensor):
        return tensor.renamed(name)
    return DerivedTensor(name, tensor.dtype, tensor.shape, tensor.read)


def _settings(folder: Path, adapter: Mapping[str, NamedTensor]) -> tuple[dict[str, Any], list[str]]:
    whole = folder / "lora_adapter" / "adapter_config.json"
    if whole.is_file():
        return read_table(whole), []
    downs = {name: tensor for name, tensor in adapter.items() if ".lora_A" in name}
    layers = {name.partition(".lora_A")[0].rpartition(".")[2] for name in downs}
    settings: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "target_modules": sorted(layers),
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
    }
    short = folder / "lora_train_meta.json"
    if short.is_file():
        told = read_table(short)
        return settings | {key: told[key] for key in ("r", "lora_alpha", "task_type") if key in told}, []
    ranks = sorted({tensor.shape[0] for tensor in downs.values()})
    settings["r"] = ranks[0] if len(ranks) == 1 else max(ranks, default=0)
    note = "neither lora_adapter/adapter_config.json nor lora_train_meta.json is there: lora_alpha is not known"
    return settings, [note]
