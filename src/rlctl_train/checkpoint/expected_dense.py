"""The tensors of plain decoders, worked out from the config alone, as transformers would build them.

Of what is not exactly such a model, or says anything unusual, nothing is claimed: then transformers is asked.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from rlctl_train.checkpoint.expected_types import Expected

SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
)  # fmt: skip
SWITCHES = {"tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False}
"""Keys that a config may leave out, and what that means in every family here."""
EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True)
class Family:
    """How the decoders of one kind differ from those of another."""

    name: str
    """What its classes begin with."""
    qkv_bias: bool | None = False
    """Of queries, keys and values; None: as the config's attention_bias says, the output projection too."""
    has_mlp_bias: bool = False
    """Whether the config's mlp_bias counts."""
    norms_heads: bool = False
    """Whether queries and keys are normalised head by head; then the config must say head_dim."""


FAMILIES = {
    "llama": Family("Llama", qkv_bias=None, has_mlp_bias=True),
    "mistral": Family("Mistral"),
    "qwen2": Family("Qwen2", qkv_bias=True),
    "qwen3": Family("Qwen3", qkv_bias=None, norms_heads=True),
}
"""By `model_type`."""


def dense_decoder(config: Mapping[str, Any]) -> Expected | None:
    """Return what a language model of these families needs; None where the config is of another, or lacks a size."""
    family = FAMILIES.get(str(config.get("model_type")))
    if family is None or config.get("architectures") != [f"{family.name}ForCausalLM"] or "auto_map" in config:
        return None
    switches = {key: config.get(key, absent) for key, absent in SWITCHES.items()}
    sizes = [config.get(key) for key in SIZES]
    if any(type(value) is not bool for value in switches.values()) or not all(map(_is_size, sizes)):
        return None
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    head_dim = config.get("head_dim", None if family.norms_heads else hidden // heads)
    if hidden % heads or not _is_size(head_dim):
        return None
    shapes = dict(_shapes(family, config, switches, head_dim))
    tied = {HEAD: EMBEDDINGS} if switches["tie_word_embeddings"] else {}
    return Expected(shapes, tied, {}, (EMBEDDINGS, HEAD), f"{family.name}Model", (r"rotary_emb\.inv_freq$",))


def _is_size(value: Any) -> bool:
    return type(value) is int and value > 0


def _shapes(
    family: Family, config: Mapping[str, Any], switches: Mapping[str, bool], head_dim: int
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield each tensor's name and shape, in the model's order."""
    hidden, wide = config["hidden_size"], config["intermediate_size"]
    queries, keys = (config[f"num_{kind}_heads"] * head_dim for kind in ("attention", "key_value"))
    by_config = switches["attention_bias"]
    qkv_bias = by_config if family.qkv_bias is None else family.qkv_bias
    out_bias = by_config and family.qkv_bias is None
    mlp_bias = switches["mlp_bias"] and family.has_mlp_bias
    yield EMBEDDINGS, (config["vocab_size"], hidden)
    for layer in range(config["num_hidden_layers"]):
        place = f"model.layers.{layer}"
        yield from _linear(f"{place}.self_attn.q_proj", queries, hidden, bias=qkv_bias)
        yield from _linear(f"{place}.self_attn.k_proj", keys, hidden, bias=qkv_bias)
        yield from _linear(f"{place}.self_attn.v_proj", keys, hidden, bias=qkv_bias)
        yield from _linear(f"{place}.self_attn.o_proj", hidden, queries, bias=out_bias)
        if family.norms_heads:
            yield f"{place}.self_attn.q_norm.weight", (head_dim,)
            yield f"{place}.self_attn.k_norm.weight", (head_dim,)
        yield from _linear(f"{place}.mlp.gate_proj", wide, hidden, bias=mlp_bias)
        yield from _linear(f"{place}.mlp.up_proj", wide, hidden, bias=mlp_bias)
        yield from _linear(f"{place}.mlp.down_proj", hidden, wide, bias=mlp_bias)
        yield f"{place}.input_layernorm.weight", (hidden,)
        yield f"{place}.post_attention_layernorm.weight", (hidden,)
    yield "model.norm.weight", (hidden,)
    yield HEAD, (config["vocab_size"], hidden)


def _linear(name: str, num_out: int, num_in: int, *, bias: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", (num_out, num_in)
    if bias:
        yield f"{name}.bias", (num_out,)
