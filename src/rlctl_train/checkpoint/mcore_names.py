"""Megatron-core's names of weights and Hugging Face's, and which rows of the one are the other. Pure data, no files.

H: heads. G: groups of heads that share a key and a value. F: width of the feed-forward layer. E: experts. L: layers.
Megatron keeps queries, keys and values of a layer in one tensor, by group: H/G queries, one key, one value, G times;
and gate and up projection in another, [2 F, ...], the gate first.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

LAYER = re.compile(r"decoder\.layers\.(?:(?P<layer>\d+)\.)?(?P<rest>\D.*)")
EXPERT = re.compile(r"mlp\.experts\.experts\.(?:(?P<expert>\d+)\.)?(?P<rest>linear_fc[12]\..*)")
WITHOUT_WEIGHTS = re.compile(r".*(_extra_state|\binv_freq|\blocal_tokens_per_expert)\b.*")
"""What a name looks like that holds no weight: scales of FP8, tables of the rotary embedding, counters of a router."""
OPTIMIZER = re.compile(r"(chained_\d+\.)?optimizer\..*")
WRAPPERS = re.compile(r"^(module\.)+")
OUTSIDE = {
    "embedding.word_embeddings.weight": "model.embed_tokens.weight",
    "decoder.final_layernorm.weight": "model.norm.weight",
    "output_layer.weight": "lm_head.weight",
}
VALUE_HEAD = {"output_layer.weight": "score.weight", "output_layer.bias": "score.bias"}
"""What the output layer of a critic is."""
IN_LAYER = {
    "input_layernorm.weight": "input_layernorm.weight",
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "self_attention.linear_proj.weight": "self_attn.o_proj.weight",
    "self_attention.linear_proj.bias": "self_attn.o_proj.bias",
    "self_attention.q_layernorm.weight": "self_attn.q_norm.weight",
    "self_attention.k_layernorm.weight": "self_attn.k_norm.weight",
    "pre_mlp_layernorm.weight": "post_attention_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "post_attention_layernorm.weight",
}
IN_LATENT_ATTENTION = {
    "self_attention.linear_q_proj.weight": "self_attn.q_proj.weight",
    "self_attention.linear_q_down_proj.weight": "self_attn.q_a_proj.weight",
    "self_attention.linear_q_up_proj.weight": "self_attn.q_b_proj.weight",
    "self_attention.linear_q_up_proj.layer_norm_weight": "self_attn.q_a_layernorm.weight",
    "self_attention.q_layernorm.weight": "self_attn.q_a_layernorm.weight",
    "self_attention.linear_kv_down_proj.weight": "self_attn.kv_a_proj_with_mqa.weight",
    "self_attention.linear_kv_up_proj.weight": "self_attn.kv_b_proj.weight",
    "self_attention.linear_kv_up_proj.layer_norm_weight": "self_attn.kv_a_layernorm.weight",
    "self_attention.kv_layernorm.weight": "self_attn.kv_a_layernorm.weight",
}
"""These come before `IN_LAYER` where a model has latent attention."""


@dataclass(frozen=True)
class Family:
    """How a family of Hugging Face models names its mixture of experts."""

    block: str = "mlp"
    expert: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    shared: str = "shared_experts"


@dataclass(frozen=True)
class Model:
    """What the names of a model's tensors depend on."""

    family: Family = Family()
    latent_attention: bool = False
    """Whether keys and values are made from a latent vector (MLA)."""
    value_head: bool = False
    """Whether the output layer gives one value instead of logits."""


FAMILIES = {
    "mixtral": Family(block="block_sparse_moe", expert=("w1", "w3", "w2")),
    "qwen2_moe": Family(shared="shared_expert"),
}
"""By `model_type`; `family_of` says of others."""


@dataclass(frozen=True)
class Source:
    """What a tensor of Megatron's becomes: names, in the order of its parts."""

    targets: tuple[str, ...]
    """With `{layer}` and `{expert}` where the tensor has such a dimension; one name, (gate, up) or (q, k, v)."""
    layers_stacked: bool = False
    """Whether its first dimension counts layers, [L, ...]."""
    experts_stacked: bool = False
    """Whether its next dimension counts experts, [E, ...]."""


def family_of(model_type: str | None, names: Iterable[str]) -> Family:
    """Return how a model's experts are named; a shared expert with a gate of its own is Qwen's."""
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    return FAMILIES["qwen2_moe"] if any(name.endswith(".shared_experts.gate_weight") for name in names) else Family()


def plain(name: str) -> str:
    """Return a weight's name without what wrappers of the model (for data parallelism, for half precision) prepend."""
    return WRAPPERS.sub("", name)


def source(name: str, model: Model) -> Source | None:
    """Return what a tensor becomes, or None where the name is none of Megatron's that is known here."""
    if model.value_head and name in VALUE_HEAD:
        return Source((VALUE_HEAD[name],))
    if name in OUTSIDE:
        return Source((OUTSIDE[name],))
    in_layer = LAYER.fullmatch(name)
    if in_layer is None:
        return None
    layer, rest = in_layer["layer"], in_layer["rest"]
    expert = EXPERT.fullmatch(rest)
    if expert is None:
        targets = _dense(rest, model)
    else:
        block = f"{model.family.block}.experts.{expert['expert'] or '{expert}'}"
        targets = _feed_forward(expert["rest"], block, model.family.expert)
    if not targets:
        return None
    prefix = f"model.layers.{layer or '{layer}'}."
    return Source(
        tuple(prefix + target for target in targets),
        layers_stacked=layer is None,
        experts_stacked=expert is not None and expert["expert"] is None,
    )


def heads_fit(num_rows: int, num_heads: int, num_groups: int) -> bool:
    """Say whether queries, keys and values of so many heads can have so many rows."""
    return num_groups > 0 and num_heads % num_groups == 0 and num_rows % (num_heads + 2 * num_groups) == 0


def qkv_spans(num_rows: int, num_heads: int, num_groups: int) -> tuple[list[tuple[int, int]], ...]:
    """Return the spans (first row, number of rows) of queries, keys and values in their common tensor."""
    assert heads_fit(num_rows, num_heads, num_groups)
    head = num_rows // (num_heads + 2 * num_groups)
    queries = num_heads // num_groups * head
    starts = range(0, num_rows, queries + 2 * head)
    return (
        [(start, queries) for start in starts],
        [(start + queries, head) for start in starts],
        [(start + queries + head, head) for start in starts],
    )


def _dense(rest: str, model: Model) -> tuple[str, ...]:
    """Return what a tensor of a layer becomes, if it belongs to no expert."""
    family = model.family
    if model.latent_attention and rest in IN_LATENT_ATTENTION:
        return (IN_LATENT_ATTENTION[rest],)
    if rest in IN_LAYER:
        return (IN_LAYER[rest],)
    if rest in ("self_attention.linear_qkv.weight", "self_attention.linear_qkv.bias"):
        kind = rest.rpartition(".")[2]
        return tuple(f"self_attn.{part}_proj.{kind}" for part in "qkv")
    in_moe = {
        "mlp.router.weight": f"{family.block}.gate.weight",
        "mlp.router.expert_bias": f"{family.block}.gate.e_score_correction_bias",
        "mlp.shared_experts.gate_weight": f"{family.block}.{family.shared}_gate.weight",
    }
    if rest in in_moe:
        return (in_moe[rest],)
    for owner, block in (("mlp.shared_experts.", f"{family.block}.{family.shared}"), ("mlp.", "mlp")):
        if rest.startswith(f"{owner}linear_fc"):
            return _feed_forward(rest.removeprefix(owner), block, Family().expert)
    return ()


def _feed_forward(rest: str, block: str, names: tuple[str, str, str]) -> tuple[str, ...]:
    """Return what `linear_fc1` or `linear_fc2` of a block becomes; gate and up may be apart, as `_w` and `_v`."""
    gate, up, down = names
    parts = {"linear_fc1.X": (gate, up), "linear_fc1.X_w": (gate,), "linear_fc1.X_v": (up,), "linear_fc2.X": (down,)}
    for kind in ("weight", "bias"):
        if (key := rest.replace(kind, "X")) in parts and kind in rest:
            return tuple(f"{block}.{part}.{kind}" for part in parts[key])
    return ()
