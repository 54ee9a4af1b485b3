"""The shape of a decoder from its Hugging Face `config.json`: exact for the architectures of `architectures.py`.

Another architecture gets an approximate shape, with the number of parameters that its weight files name. What the parts
of a shape count is in `params.py`; shapes that need no file are in `model_catalogue.py`.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rlctl_hw import params
from rlctl_hw.architectures import ARCHITECTURES, SAME_AS, Architecture
from rlctl_hw.types import Experts, LatentAttention, ModelShape

WEIGHTS_INDEX = "model.safetensors.index.json"
HEADER_LIMIT_BYTES = 100 * 2**20
"""The format allows a header no longer than this."""
DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "float8_e4m3fn": 1, "float8_e5m2": 1, "float64": 8}
STATE_TOKENS = 1024
"""Tokens whose keys and values take as much as the constant state of a linear-attention layer; the state of Qwen3-Next
(32 heads of 128 by 128 in float32) is 2 MiB, 1024 tokens of its full layers."""


def shape_from_config(config: Mapping[str, Any], *, num_params: int | None = None) -> ModelShape:
    """Read a `config.json`; a missing size, or an architecture that cannot be counted, raises ValueError.

    `num_params`, as the weights have it, makes an approximate shape of an architecture that is not listed.
    """
    config, is_whole = _decoder(config)
    name = config.get("model_type")
    architecture = _known(name)
    if architecture is None and num_params is None:
        raise ValueError(
            f"model_type {name!r} is not one the planner can count; known: {', '.join(ARCHITECTURES)}; for another, "
            f"keep its safetensors files, or {WEIGHTS_INDEX} alone, beside config.json"
        )
    shape = _read(config, str(name), architecture or _guessed(config))
    if architecture is not None and is_whole:
        return shape
    approximate = replace(shape, num_params=num_params or shape.num_params, exact=False)
    return replace(approximate, active_params=params.active_params(approximate))


def shape_from_file(file: Path) -> ModelShape:
    """Read the `config.json` of a model folder; what it does not settle is read from the weight files beside it.

    A file that cannot be read raises OSError; one without a model in it, ValueError.
    """
    config = _json_object(file)
    name = _decoder(config)[0].get("model_type")
    known = _known(name) is not None and _decoder(config)[1]
    return shape_from_config(config, num_params=None if known else weights_params(file.parent, config))


def weights_params(folder: Path, config: Mapping[str, Any]) -> int | None:
    """Return the number of parameters in a folder's safetensors files, else as their index tells; None without both.

    An index names bytes; the config's dtype turns them into parameters, so that quantised weights count too few.
    """
    files = sorted(folder.glob("*.safetensors"))
    index = _json_object(folder / WEIGHTS_INDEX) if (folder / WEIGHTS_INDEX).is_file() else {}
    shards = set(index.get("weight_map", {}).values())
    if files and shards <= {file.name for file in files}:
        return sum(_header_params(file) for file in files)
    metadata = index.get("metadata", {})
    if "total_parameters" in metadata:
        return int(metadata["total_parameters"])
    if "total_size" not in metadata:
        return None
    dtype = config.get("dtype") or config.get("torch_dtype") or "bfloat16"
    return int(metadata["total_size"]) // DTYPE_BYTES.get(str(dtype), 2)


def _known(name: Any) -> Architecture | None:
    return ARCHITECTURES.get(SAME_AS.get(name, name)) if isinstance(name, str) else None


def _decoder(config: Mapping[str, Any]) -> tuple[Mapping[str, Any], bool]:
    """Return the language model's part of a config, and whether it is all of the model."""
    text = config.get("text_config")
    if not isinstance(text, Mapping):
        return config, not any(key in config for key in ("vision_config", "audio_config"))
    outer = {key: config[key] for key in ("tie_word_embeddings", "vocab_size") if key in config}
    return {**outer, **text}, False


def _read(config: Mapping[str, Any], name: str, architecture: Architecture) -> ModelShape:
    given = {key: value for key, value in config.items() if value is not None}
    reader = _Reader({**architecture.defaults, **given})
    num_layers, num_heads = reader.size("num_hidden_layers"), reader.size("num_attention_heads")
    hidden_size = reader.size("hidden_size")
    latent = _latent(reader) if architecture.latent else None
    window = _window(reader, architecture, num_layers)
    experts = _experts(reader, architecture, num_layers)
    shape = ModelShape(
        architecture=name,
        hidden_size=hidden_size,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_heads if latent else reader.size("num_key_value_heads", num_heads),
        head_dim=_head_dim(reader, latent, hidden_size, num_heads),
        intermediate_size=_dense_width(reader, experts, num_layers),
        vocab_size=reader.size("vocab_size"),
        tied=bool(reader.values.get("tie_word_embeddings", architecture.tied)),
        num_params=0,
        max_position=reader.optional_size("max_position_embeddings"),
        qkv_bias=reader.switch(architecture.qkv_bias),
        output_bias=reader.switch(architecture.output_bias),
        mlp_bias=reader.switch(architecture.mlp_bias),
        qk_norm=reader.switch(architecture.qk_norm),
        sinks=architecture.sinks,
        norms_per_layer=architecture.norms_per_layer,
        experts=experts,
        latent=latent,
        sliding_window=window.tokens,
        num_windowed_layers=window.num_layers,
    )
    shape = replace(shape, num_params=params.total_params(shape))
    return replace(shape, active_params=params.active_params(shape))


def _head_dim(reader: _Reader, latent: LatentAttention | None, hidden_size: int, num_heads: int) -> int:
    if latent is not None:
        return latent.nope_dim + latent.rope_dim
    return reader.size("head_dim", max(1, hidden_size // num_heads))


def _dense_width(reader: _Reader, experts: Experts | None, num_layers: int) -> int:
    """Return the width of a dense MLP; a config whose layers all have experts may leave it out."""
    all_sparse = experts is not None and experts.num_layers == num_layers
    return reader.size("intermediate_size", experts.expert_size if experts and all_sparse else None)


def _latent(reader: _Reader) -> LatentAttention:
    return LatentAttention(
        kv_rank=reader.size("kv_lora_rank"),
        nope_dim=reader.size("qk_nope_head_dim"),
        rope_dim=reader.size("qk_rope_head_dim"),
        value_dim=reader.size("v_head_dim"),
        query_rank=reader.optional_size("q_lora_rank"),
    )


def _experts(reader: _Reader, architecture: Architecture, num_layers: int) -> Experts | None:
    num_experts = reader.first_size("num_experts", "num_local_experts", "n_routed_experts")
    if num_experts is None:
        return None
    num_sparse = sum(_is_sparse(reader, layer) for layer in range(num_layers))
    if num_sparse == 0:
        return None
    width = reader.first_size("moe_intermediate_size", "intermediate_size")
    if width is None:
        raise ValueError("config.json has experts but neither moe_intermediate_size nor intermediate_size")
    shared = reader.first_size("shared_expert_intermediate_size")
    num_shared = reader.first_size("n_shared_experts", "num_shared_experts") or 0
    return Experts(
        num_experts=num_experts,
        experts_per_token=reader.size("num_experts_per_tok"),
        expert_size=width,
        shared_size=shared if shared is not None else num_shared * width,
        num_layers=num_sparse,
        router_bias=architecture.router_bias,
        shared_gate=architecture.shared_gate and shared is not None,
        expert_bias=architecture.expert_bias,
    )


def _is_sparse(reader: _Reader, layer: int) -> bool:
    """Return whether a layer has experts: DeepSeek counts dense layers at the start, Qwen names them or steps."""
    if layer < reader.count("first_k_dense_replace", 0) or layer in reader.items("mlp_only_layers"):
        return False
    every = reader.values.get("moe_layer_freq", 1)
    if isinstance(every, list):
        return bool(every[layer])
    return layer % reader.size("moe_layer_freq", 1) == 0 and (layer + 1) % reader.size("decoder_sparse_step", 1) == 0


@dataclass(frozen=True)
class _Window:
    tokens: int | None
    num_layers: int


def _window(reader: _Reader, architecture: Architecture, num_layers: int) -> _Window:
    tokens = reader.first_size("sliding_window")
    if kinds := reader.items("layer_types"):
        linear = sum("linear" in str(kind) or "mamba" in str(kind) for kind in kinds)
        sliding = sum(kind == "sliding_attention" for kind in kinds) if tokens else 0
        kept = max(tokens or 0 if sliding else 0, STATE_TOKENS if linear else 0)
        return _Window(kept, linear + sliding) if linear + sliding else _Window(None, 0)
    is_on = tokens is not None and reader.values.get("use_sliding_window", True)
    count = sum(_is_windowed(reader, architecture, layer) for layer in range(num_layers)) if is_on else 0
    return _Window(tokens, count) if count else _Window(None, 0)


def _is_windowed(reader: _Reader, architecture: Architecture, layer: int) -> bool:
    match architecture.windows:
        case "none":
            return False
        case "all":
            return True
        case "above":
            return bool(reader.values.get("use_sliding_window")) and layer >= reader.count("max_window_layers", 28)
        case "alternate":
            return layer % 2 == 0
        case "pattern":
            return (layer + 1) % reader.size("sliding_window_pattern", 6) != 0


def _guessed(config: Mapping[str, Any]) -> Architecture:
    """Return an architecture by the keys of a config nobody listed."""
    return Architecture(
        qkv_bias="attention_bias",
        output_bias="attention_bias",
        mlp_bias="mlp_bias",
        latent="kv_lora_rank" in config and "qk_rope_head_dim" in config,
        shared_gate="shared_expert_intermediate_size" in config,
        windows="all" if config.get("sliding_window") else "none",
    )


@dataclass(frozen=True)
class _Reader:
    """Typed access to a config whose unset keys are left out."""

    values: Mapping[str, Any]

    def size(self, key: str, default: int | None = None) -> int:
        value = self.values.get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"config.json: {key} is {value!r}, but the planner needs a positive whole number")
        return value

    def optional_size(self, key: str) -> int | None:
        return self.size(key) if key in self.values else None

    def first_size(self, *keys: str) -> int | None:
        """Return the first of several keys that is set and not zero."""
        return next((self.size(key) for key in keys if self.values.get(key)), None)

    def count(self, key: str, default: int) -> int:
        """Return a whole number that may be zero."""
        return self.size(key, default) if self.values.get(key, default) else 0

    def items(self, key: str) -> list[Any]:
        value = self.values.get(key, [])
        if not isinstance(value, list):
            raise ValueError(f"config.json: {key} is {value!r}, but the planner needs a list")
        return value

    def switch(self, setting: bool | str) -> bool:
        return bool(self.values.get(setting, False)) if isinstance(setting, str) else setting


def _json_object(file: Path) -> dict[str, Any]:
    data = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(data, dict):
        raise ValueError(f"{file} is not a JSON object")
    return data


def _header_params(file: Path) -> int:
    """Return the parameters in one safetensors file: 8 bytes of length, then a JSON table of dtype and shape."""
    with file.open("rb") as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 0 < length <= HEADER_LIMIT_BYTES:
            raise ValueError(f"{file} is not a safetensors file")
        header = json.loads(stream.read(length))
    return sum(math.prod(tensor["shape"]) for name, tensor in header.items() if name != "__metadata__")
