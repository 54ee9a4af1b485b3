"""What a forward pass keeps for the backward pass: the tensors autograd saves, counted per token and layer.

Letters: h hidden size, a heads, s sequence length, t tensor-parallel degree. All counts are bytes per token of one
rank's part of the sequence. Tensors of the hidden size are split by t under sequence parallelism only, others always.
"""

from __future__ import annotations

from dataclasses import dataclass

from rlctl_hw.setup import Setup

HALF, FULL = 2, 4
"""Bytes of a bf16 and of an fp32 element."""


@dataclass(frozen=True)
class PerToken:
    """Bytes per token: of tensors of the hidden size, and of tensors that are split by head or width."""

    whole: float
    split: float

    def on_rank(self, setup: Setup) -> float:
        """Return the bytes per token on one tensor-parallel rank."""
        tp = setup.mesh.tp
        return self.whole / (tp if setup.mesh.sequence_parallel else 1) + self.split / tp


def tokens(setup: Setup) -> int:
    """Return the tokens of one micro-batch on one rank."""
    return setup.micro_batch * setup.seq_len // setup.mesh.cp


def kept(setup: Setup, *, moe: bool) -> float:
    """Return the bytes per token that one layer keeps."""
    if setup.recompute == "full":
        return layer_input(setup)
    everything = full_layer(setup, moe=moe)
    if setup.recompute == "none":
        return everything
    chosen = _operator_choice(setup, moe) if setup.engine == "fsdp2" else _without_attention_core(setup, moe)
    return min(everything, max(layer_input(setup), chosen.on_rank(setup)))


def layer_input(setup: Setup) -> float:
    """Return the bytes per token of a layer's input, all that full recomputation keeps."""
    return PerToken(HALF * setup.shape.hidden_size, 0).on_rank(setup)


def full_layer(setup: Setup, *, moe: bool) -> float:
    """Return the bytes per token that one layer keeps when nothing is recomputed."""
    return _all_tensors(setup, moe).on_rank(setup) + 2 * _gathered_input(setup)


def last_norm(setup: Setup) -> float:
    """Return the bytes per token that the norm before the head keeps, with its result."""
    per_value = 2 * HALF if setup.engine == "megatron" else FULL + 2 * HALF
    return PerToken(per_value * setup.shape.hidden_size, 0).on_rank(setup) + _gathered_input(setup)


def backward_extra(setup: Setup, *, moe: bool) -> float:
    """Return the gradients in flight inside one layer's backward pass: three of the MLP's width, two of h."""
    return PerToken(2 * HALF * setup.shape.hidden_size, 3 * HALF * _mlp_width(setup, moe)).on_rank(setup)


def gathered_inputs(setup: Setup) -> float:
    """Return what sequence parallelism gathers in a layer's backward pass: a whole gradient, and Megatron, which does
    not keep the whole inputs of attention and MLP, one of them again."""
    if not setup.mesh.sequence_parallel or setup.mesh.tp == 1:
        return 0.0
    return (2 if setup.engine == "megatron" else 1) * HALF * setup.shape.hidden_size


def _gathered_input(setup: Setup) -> float:
    """Return the bytes per token of the whole input that a column-parallel map keeps under DTensor."""
    if setup.engine == "megatron" or not setup.mesh.sequence_parallel or setup.mesh.tp == 1:
        return 0.0
    return HALF * setup.shape.hidden_size


def forward_only(setup: Setup, *, moe: bool) -> float:
    """Return what a layer needs at one time without a backward pass: residual and norm, then the wider block."""
    h, heads = setup.shape.hidden_size, _heads(setup)
    mlp = HALF * 3 * _mlp_width(setup, moe)
    attention = HALF * (2 * heads.query + 2 * heads.key + 2 * heads.value) + attention_core(setup)
    return PerToken(FULL * h + 2 * HALF * h, max(mlp, attention)).on_rank(setup)


def attention_core(setup: Setup) -> float:
    """Return the scores that unfused attention keeps: softmax in fp32 and in bf16 (transformers); in Megatron bf16,
    with dropout its mask and result too (5as, arXiv:2205.05198). Flash attention keeps one fp32 number a head."""
    heads, row = setup.shape.num_heads, setup.seq_len / setup.mesh.cp
    if setup.attention == "flash":
        return FULL * heads
    if setup.engine == "megatron":
        return (5 if setup.dropout else HALF) * heads * row
    return (FULL + HALF) * heads * row


def _all_tensors(setup: Setup, moe: bool) -> PerToken:
    norms, attention, mlp = _norms(setup), _attention(setup), _mlp(setup, moe)
    return PerToken(
        norms.whole + attention.whole + mlp.whole,
        norms.split + attention.split + mlp.split + attention_core(setup),
    )


@dataclass(frozen=True)
class _Heads:
    """Widths of all queries, keys, values and results; of latent attention, also of the latents."""

    query: float
    key: float
    value: float
    result: float
    latent: float = 0.0


def _heads(setup: Setup) -> _Heads:
    shape, latent = setup.shape, setup.shape.latent
    if latent is None:
        query, key = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
        return _Heads(query, key, key, query)
    head, count = latent.nope_dim + latent.rope_dim, shape.num_heads
    ranks = 2 * (latent.query_rank or 0) + 2 * latent.kv_rank + latent.rope_dim
    return _Heads(count * head, count * head, count * latent.value_dim, count * latent.value_dim, ranks)


def _norms(setup: Setup) -> PerToken:
    """A norm written in PyTorch keeps its input in fp32, the normed value and its result (4 + 2 + 2); a fused one
    keeps input and result (2 + 2). A frozen scale needs no normed value."""
    h, count = setup.shape.hidden_size, setup.shape.norms_per_layer
    if setup.engine == "megatron":
        masks = 2 * h if setup.dropout else 0
        return PerToken(count * 2 * HALF * h + masks, 0)
    results = 1 if setup.lora_rank else 2
    if setup.lora_rank and setup.lora_targets == "attention":
        return PerToken(count * FULL * h + HALF * h, 0)
    return PerToken(count * (FULL + results * HALF) * h, 0)


def _attention(setup: Setup) -> PerToken:
    """Queries, keys and values as attention takes them, and its result; before the rotation they are not kept."""
    heads = _heads(setup)
    split = HALF * (heads.query + heads.key + heads.value + heads.result)
    if setup.shape.latent is not None:
        # Up-projections and their split parts stay beside the joined heads.
        split += HALF * (heads.query + heads.key)
    if setup.shape.qk_norm and setup.shape.latent is None:
        per_element = 2 * HALF if setup.engine == "megatron" else FULL + HALF
        split += per_element * (heads.query + heads.key)
    return PerToken(HALF * heads.latent, split)


def _mlp(setup: Setup, moe: bool) -> PerToken:
    """Transformers keeps gate, its activation, up and their product; a fused activation keeps gate, up and product.

    Megatron's experts weigh the activation by the router's probability: without a gate, that product is a third.
    """
    shape = setup.shape
    ungated = 3 if moe and setup.engine == "megatron" else 2
    parts = (3 if setup.engine == "megatron" else 4) if shape.gated_mlp else ungated
    if setup.lora_rank and setup.lora_targets == "attention":
        # A frozen map does not keep its input.
        parts -= 1
    copies = 0.0
    if moe and shape.experts is not None:
        # Tokens in expert order on the way in, and the experts' results on the way out.
        copies = 2 * HALF * shape.experts.experts_per_token * shape.hidden_size
    return PerToken(copies, HALF * parts * _mlp_width(setup, moe))


def _mlp_width(setup: Setup, moe: bool) -> float:
    """Return the width one token passes: the dense MLP, or its experts and the shared ones."""
    experts = setup.shape.experts
    if not moe or experts is None:
        return setup.shape.intermediate_size
    # Experts are split by their own tensor parallelism; tp ranks divide what etp ranks do not by tokens.
    return experts.experts_per_token * experts.expert_size + experts.shared_size


def _operator_choice(setup: Setup, moe: bool) -> PerToken:
    """torchtitan's selective checkpointing: attention's result, and every second matrix product's result
    (queries, values, gate, down projection); the layer's input stays too."""
    h, heads = setup.shape.hidden_size, _heads(setup)
    split = HALF * (heads.query + heads.value + heads.result + _mlp_width(setup, moe)) + attention_core(setup)
    return PerToken(2 * HALF * h, split)


def _without_attention_core(setup: Setup, moe: bool) -> PerToken:
    """Megatron's selective recomputation: scores and softmax of unfused attention are computed again."""
    everything = _all_tensors(setup, moe)
    return PerToken(everything.whole, everything.split - attention_core(setup))
