"""How many parameters each part of a decoder has, and how many bytes its keys and values take. Pure arithmetic.

Letters: h hidden size, V vocabulary, L layers, q and kv widths of all queries and of all keys, I width of an MLP,
E experts of a layer, k experts a token passes, r rank of a LoRA pair.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from rlctl_hw.types import ModelShape

ATTENTION_TARGETS = (
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "q_a_proj",
    "q_b_proj",
    "kv_a_proj_with_mqa",
    "kv_b_proj",
)
MLP_TARGETS = ("gate_proj", "up_proj", "down_proj")
ALL_LINEAR = ATTENTION_TARGETS + MLP_TARGETS
"""Every projection of every layer: what `all-linear` means to peft."""


@dataclass(frozen=True)
class Projection:
    """One linear map of a layer, [num_in] to [num_out], and how many of it there are."""

    name: str
    num_in: int
    num_out: int
    bias: bool = False
    count: int = 1

    @property
    def num_params(self) -> int:
        """Return the parameters of all `count` of them."""
        return self.count * (self.num_in * self.num_out + (self.num_out if self.bias else 0))


def total_params(shape: ModelShape) -> int:
    """Return the parameters of the whole model by its sizes: embeddings, layers and the final norm."""
    sparse = num_sparse_layers(shape)
    layers = sparse * layer_params(shape, moe=True) if sparse else 0
    dense = shape.num_layers - sparse
    layers += dense * layer_params(shape, moe=False) if dense else 0
    return embedding_params(shape) + output_params(shape) + layers + shape.hidden_size


def active_params(shape: ModelShape) -> int:
    """Return the parameters one token passes through: k of E experts, everything else whole."""
    experts = shape.experts
    if experts is None:
        return shape.num_params
    idle = experts.num_experts - experts.experts_per_token
    return shape.num_params - experts.num_layers * idle * one_expert_params(shape)


def embedding_params(shape: ModelShape) -> int:
    """Return V*h of the input embedding, which a tied output shares."""
    return shape.vocab_size * shape.hidden_size


def output_params(shape: ModelShape) -> int:
    """Return V*h of the output projection; 0 where it is the embedding."""
    return 0 if shape.tied else shape.vocab_size * shape.hidden_size


def critic_params(shape: ModelShape) -> int:
    """Return the parameters with a value head [h, 1] in place of the output projection."""
    return shape.num_params - output_params(shape) + shape.hidden_size


def num_sparse_layers(shape: ModelShape) -> int:
    """Return how many layers have experts."""
    return 0 if shape.experts is None else shape.experts.num_layers


def layer_params(shape: ModelShape, *, moe: bool) -> int:
    """Return one decoder layer: attention, norms, and experts or a dense MLP."""
    mlp = sparse_mlp_params(shape) if moe else dense_mlp_params(shape)
    return attention_params(shape) + mlp + shape.norms_per_layer * shape.hidden_size


def largest_layer_params(shape: ModelShape) -> int:
    """Return the largest decoder layer: what an engine that gathers layer by layer holds whole."""
    kinds = {True} if num_sparse_layers(shape) == shape.num_layers else {False, shape.experts is not None}
    return max(layer_params(shape, moe=moe) for moe in kinds)


def attention_params(shape: ModelShape) -> int:
    """Return one layer's attention with its biases, inner norms and sinks."""
    rest = (2 * shape.head_dim if shape.qk_norm else 0) + (shape.num_heads if shape.sinks else 0)
    if shape.latent is not None:
        rest = shape.latent.kv_rank + (shape.latent.query_rank or 0)
    return rest + sum(projection.num_params for projection in attention_projections(shape))


def dense_mlp_params(shape: ModelShape) -> int:
    """Return the MLP of a layer without experts."""
    return sum(projection.num_params for projection in _mlp(shape, shape.intermediate_size))


def sparse_mlp_params(shape: ModelShape) -> int:
    """Return experts, shared experts and router of one layer."""
    experts = shape.experts
    assert experts is not None
    router = shape.hidden_size * experts.num_experts + (experts.num_experts if experts.router_bias else 0)
    return expert_params(shape) + shared_expert_params(shape) + router


def expert_params(shape: ModelShape) -> int:
    """Return all routed experts of one layer: what expert parallelism divides."""
    return 0 if shape.experts is None else shape.experts.num_experts * one_expert_params(shape)


def one_expert_params(shape: ModelShape) -> int:
    """Return one routed expert of one layer."""
    assert shape.experts is not None
    projections = _mlp(shape, shape.experts.expert_size, bias=shape.experts.expert_bias)
    return sum(projection.num_params for projection in projections)


def shared_expert_params(shape: ModelShape) -> int:
    """Return the experts of one layer that every token passes, with their gate."""
    experts = shape.experts
    if experts is None or experts.shared_size == 0:
        return 0
    gate = shape.hidden_size if experts.shared_gate else 0
    return gate + sum(projection.num_params for projection in _mlp(shape, experts.shared_size))


def attention_projections(shape: ModelShape) -> tuple[Projection, ...]:
    """Return the linear maps of one layer's attention."""
    hidden, query = shape.hidden_size, shape.num_heads * shape.head_dim
    latent, bias = shape.latent, shape.qkv_bias
    if latent is None:
        key_value = shape.num_kv_heads * shape.head_dim
        return (
            Projection("q_proj", hidden, query, bias),
            Projection("k_proj", hidden, key_value, bias),
            Projection("v_proj", hidden, key_value, bias),
            Projection("o_proj", query, hidden, shape.output_bias),
        )
    rank = latent.query_rank
    queries = (
        (Projection("q_proj", hidden, query),)
        if rank is None
        else (Projection("q_a_proj", hidden, rank, bias), Projection("q_b_proj", rank, query))
    )
    return (
        *queries,
        Projection("kv_a_proj_with_mqa", hidden, latent.kv_rank + latent.rope_dim, bias),
        Projection("kv_b_proj", latent.kv_rank, shape.num_heads * (latent.nope_dim + latent.value_dim)),
        Projection("o_proj", shape.num_heads * latent.value_dim, hidden, shape.output_bias),
    )


def projections(shape: ModelShape, *, experts: bool = True) -> Iterator[Projection]:
    """Yield the linear maps of all layers with their counts; `experts=False` leaves out the routed ones."""
    sparse = num_sparse_layers(shape)
    for projection in attention_projections(shape):
        yield _counted(projection, shape.num_layers)
    for projection in _mlp(shape, shape.intermediate_size):
        yield _counted(projection, shape.num_layers - sparse)
    if shape.experts is not None:
        for projection in _mlp(shape, shape.experts.shared_size):
            yield _counted(projection, sparse if shape.experts.shared_size else 0)
        for projection in _mlp(shape, shape.experts.expert_size, bias=shape.experts.expert_bias) if experts else ():
            yield _counted(projection, sparse * shape.experts.num_experts)


def lora_params(shape: ModelShape, rank: int, targets: Iterable[str] = ALL_LINEAR, *, experts: bool = True) -> int:
    """Return the parameters of LoRA pairs [in, r] and [r, out] on the named projections (arXiv:2106.09685)."""
    wanted = frozenset(targets)
    chosen = (p for p in projections(shape, experts=experts) if p.name in wanted)
    return sum(p.count * rank * (p.num_in + p.num_out) for p in chosen)


def kv_values_per_token(shape: ModelShape) -> int:
    """Return the numbers one layer caches of a token: keys and values, or the latent and its position part."""
    if shape.latent is not None:
        return shape.latent.kv_rank + shape.latent.rope_dim
    return 2 * shape.num_kv_heads * shape.head_dim


def kv_bytes_per_token(shape: ModelShape, value_bytes: float) -> float:
    """Return the bytes of one token's keys and values in all layers, while it is inside every window."""
    return shape.num_layers * kv_values_per_token(shape) * value_bytes


def kv_bytes(shape: ModelShape, num_tokens: float, value_bytes: float) -> float:
    """Return the bytes of a sequence's keys and values; windowed layers keep their window only."""
    seen = num_tokens if shape.sliding_window is None else min(num_tokens, shape.sliding_window)
    layer_tokens = (shape.num_layers - shape.num_windowed_layers) * num_tokens + shape.num_windowed_layers * seen
    return layer_tokens * kv_values_per_token(shape) * value_bytes


def _mlp(shape: ModelShape, width: int, *, bias: bool | None = None) -> tuple[Projection, ...]:
    """Return the linear maps of one MLP; `bias` unset takes the model's own for dense ones."""
    bias = shape.mlp_bias if bias is None else bias
    up = ("gate_proj", "up_proj") if shape.gated_mlp else ("up_proj",)
    return (
        *(Projection(name, shape.hidden_size, width, bias) for name in up),
        Projection("down_proj", width, shape.hidden_size, bias),
    )


def _counted(projection: Projection, count: int) -> Projection:
    return Projection(projection.name, projection.num_in, projection.num_out, projection.bias, count)
