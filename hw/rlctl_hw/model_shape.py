"""Parameters and shapes of a decoder from its Hugging Face `config.json`, exact for the dense architectures listed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from rlctl_hw.types import ModelShape


@dataclass(frozen=True)
class Architecture:
    """What the config of one architecture leaves unsaid: its biases, norms and defaults."""

    num_kv_heads: int | None
    """Key/value heads where the config names none; None means as many as query heads."""
    qkv_bias: bool = False
    """Query, key and value projections always have a bias (Qwen2)."""
    optional_bias: tuple[str, ...] = ()
    """Config keys that may switch biases on."""
    qk_norm: bool = False
    """Queries and keys are normalised per head (Qwen3)."""
    head_dim: int | None = None
    """Head size where the config names none; None means hidden size over heads."""


ARCHITECTURES = {
    "qwen2": Architecture(num_kv_heads=32, qkv_bias=True),
    "qwen3": Architecture(num_kv_heads=32, optional_bias=("attention_bias",), qk_norm=True, head_dim=128),
    "llama": Architecture(num_kv_heads=None, optional_bias=("attention_bias", "mlp_bias")),
    "mistral": Architecture(num_kv_heads=8),
}


def shape_from_config(config: Mapping[str, Any]) -> ModelShape:
    """Read a `config.json`; an architecture that is not listed, or a missing size, raises ValueError."""
    name = config.get("model_type")
    architecture = ARCHITECTURES.get(name) if isinstance(name, str) else None
    if architecture is None:
        raise ValueError(f"model_type {name!r} is not one the planner can count; known: {', '.join(ARCHITECTURES)}")
    hidden_size = _size(config, "hidden_size")
    num_heads = _size(config, "num_attention_heads")
    shape = ModelShape(
        architecture=str(name),
        hidden_size=hidden_size,
        num_layers=_size(config, "num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=_size(config, "num_key_value_heads", architecture.num_kv_heads or num_heads),
        head_dim=_size(config, "head_dim", architecture.head_dim or max(1, hidden_size // num_heads)),
        intermediate_size=_size(config, "intermediate_size"),
        vocab_size=_size(config, "vocab_size"),
        tied=bool(config.get("tie_word_embeddings", False)),
        num_params=0,
        max_position=_size(config, "max_position_embeddings") if "max_position_embeddings" in config else None,
    )
    biases = frozenset(key for key in architecture.optional_bias if config.get(key))
    return _counted(shape, architecture, biases)


def known_shape(hub_id: str) -> ModelShape | None:
    """Return the shape of a model the presets use, so that planning for it needs no network."""
    sizes = KNOWN_MODELS.get(hub_id)
    return None if sizes is None else shape_from_config(_QWEN2_5 | sizes)


def _counted(shape: ModelShape, architecture: Architecture, biases: frozenset[str]) -> ModelShape:
    embeddings = shape.vocab_size * shape.hidden_size * (1 if shape.tied else 2)
    layers = shape.num_layers * _layer_params(shape, architecture, biases)
    return replace(shape, num_params=layers + embeddings + shape.hidden_size)


def _layer_params(shape: ModelShape, architecture: Architecture, biases: frozenset[str]) -> int:
    """Count one decoder layer: attention, gated MLP, two norms."""
    hidden, ffn = shape.hidden_size, shape.intermediate_size
    query, key_value = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    attention = 2 * hidden * query + 2 * hidden * key_value
    if architecture.qkv_bias or "attention_bias" in biases:
        attention += query + 2 * key_value
    if "attention_bias" in biases:
        attention += hidden
    if architecture.qk_norm:
        attention += 2 * shape.head_dim
    mlp = 3 * hidden * ffn + (2 * ffn + hidden if "mlp_bias" in biases else 0)
    return attention + mlp + 2 * hidden


def _size(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = config.get(key)
    if value is None:
        value = default
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"config.json: {key} is {value!r}, but the planner needs a positive whole number")
    return value


_QWEN2_5 = {"model_type": "qwen2", "vocab_size": 151936, "max_position_embeddings": 32768, "tie_word_embeddings": True}

KNOWN_MODELS: dict[str, dict[str, Any]] = {
    "Qwen/Qwen2.5-0.5B-Instruct": {
        "hidden_size": 896,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "intermediate_size": 4864,
    },
    "Qwen/Qwen2.5-1.5B-Instruct": {
        "hidden_size": 1536,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "intermediate_size": 8960,
    },
    "Qwen/Qwen2.5-7B-Instruct": {
        "hidden_size": 3584,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "intermediate_size": 18944,
        "vocab_size": 152064,
        "tie_word_embeddings": False,
    },
}
