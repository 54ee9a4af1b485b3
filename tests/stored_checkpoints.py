"""Checkpoints for tests: tiny models, and a reader of safetensors folders as simple as it can be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from rlctl_train.checkpoint.safetensors_writer import DTYPES
from rlctl_train.checkpoint.stored import Adapter, Checkpoint, NamedTensor, Piece, StoredTensor

SHAPE: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
    "intermediate_size": 64, "vocab_size": 96, "max_position_embeddings": 64,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "Qwen2ForCausalLM": {"tie_word_embeddings": True},
    "Qwen3ForCausalLM": {"head_dim": 16},
    "LlamaForCausalLM": {},
    "Gemma2ForCausalLM": {"head_dim": 16},
    "MixtralForCausalLM": {"num_local_experts": 4},
    "Qwen3MoeForCausalLM": {
        "head_dim": 16, "num_experts": 4, "moe_intermediate_size": 16, "num_experts_per_tok": 2,
    },
}  # fmt: skip
"""Class -> what its config has beside SHAPE."""
WIDTHS = {name: dtype for dtype, name in DTYPES.items()}


def make_model(architecture: str, seed: int = 0, **settings: Any) -> PreTrainedModel:
    """Return a tiny model of random weights, norms and biases included."""
    torch.manual_seed(seed)
    task = next(task for task in ("ForCausalLM", "ForTokenClassification") if architecture.endswith(task))
    config_class = getattr(transformers, architecture.removesuffix(task) + "Config")
    extra = FAMILIES.get(architecture, {})
    model = getattr(transformers, architecture)(config_class(**SHAPE | extra | settings))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    return model.eval()


def save_model(folder: Path, architecture: str, seed: int = 0, **settings: Any) -> PreTrainedModel:
    """Write a tiny model as a Hugging Face folder and return it."""
    model = make_model(architecture, seed, **settings)
    model.save_pretrained(folder)
    return model


def read_folder(folder: Path, kind: str | None = None) -> Checkpoint:
    """Read a folder of safetensors files, and an adapter beside them or alone."""
    files = sorted(folder.glob("*.safetensors"))
    tensors = {name: tensor for file in files for name, tensor in read_file(file).items()}
    adapter = None
    for place in (folder, folder / "adapter"):
        if (place / "adapter_config.json").is_file():
            settings = json.loads((place / "adapter_config.json").read_text())
            adapter = Adapter(settings, read_file(place / "adapter_model.safetensors"))
    if (folder / "adapter_config.json").is_file():
        tensors = {}
    has_config = (folder / "config.json").is_file()
    return Checkpoint(
        "huggingface", folder, tensors, folder if has_config else None, adapter,
        files=(*files, *folder.glob("adapter/*.safetensors")),
    )  # fmt: skip


def read_file(file: Path) -> dict[str, NamedTensor]:
    """Return the tensors of one safetensors file."""
    with file.open("rb") as stream:
        num_bytes = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(num_bytes))
    header.pop("__metadata__", None)
    found: dict[str, NamedTensor] = {}
    for name, entry in header.items():
        shape = tuple(entry["shape"])
        piece = Piece(file, 8 + num_bytes + entry["data_offsets"][0], (0,) * len(shape), shape)
        found[name] = StoredTensor(name, WIDTHS[entry["dtype"]], shape, (piece,))
    return found


def in_files(folder: Path, tensors: dict[str, Tensor], num_pieces: int = 1) -> dict[str, NamedTensor]:
    """Write tensors as raw files, cut along the first dimension into so many, and return them as they lie there."""
    folder.mkdir(parents=True, exist_ok=True)
    return {name: _in_files(folder, name, tensor, num_pieces) for name, tensor in tensors.items()}


def _in_files(folder: Path, name: str, tensor: Tensor, num_pieces: int) -> StoredTensor:
    pieces, row = [], 0
    parts = [tensor] if tensor.dim() == 0 else tensor.detach().chunk(num_pieces)
    for number, part in enumerate(parts):
        file = folder / f"{name}.{number}"
        file.write_bytes(b"header" + part.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        pieces.append(Piece(file, 6, (row, *[0] * (tensor.dim() - 1))[: tensor.dim()], tuple(part.shape)))
        row += part.shape[0] if tensor.dim() else 0
    return StoredTensor(name, tensor.dtype, tuple(tensor.shape), tuple(pieces))
