"""Parameters of one rank by part, and bytes per element.

Letters: h hidden size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

from rlctl_hw import params
from rlctl_hw.setup import Setup, WeightDtype
from rlctl_hw.types import ModelShape

GIB = 1024**3
BYTES: dict[WeightDtype, float] = {
    "float32": 4.0,
    "bfloat16": 2.0,
    "float16": 2.0,
    "float8": 1.0,
    # Half a byte and, per block of 64, a quantised scale: double quantisation of QLoRA, arXiv:2305.14314, section 3.
    "nf4": 0.5 + 0.127 / 8,
}
VOCABULARY_MULTIPLE = 128
"""Megatron pads the vocabulary to a multiple of this per tensor-parallel rank."""
WHOLE_ON_EVERY_RANK = ("q_a_proj", "kv_a_proj_with_mqa")
"""Down-projections of latent attention: tensor parallelism splits heads, and these come before there are heads."""


@dataclass(frozen=True)
class LayerParams:
    """Parameters of one decoder layer on one tensor-parallel rank."""

    dense: float
    """Attention, norms, router, and dense MLP or shared experts."""
    routed: float = 0.0
    """All routed experts, before expert parallelism divides them; 0 in a dense layer."""


def vocabulary(setup: Setup) -> int:
    """Return the rows of the embedding on one rank, padded as the engine pads them."""
    multiple = VOCABULARY_MULTIPLE if setup.engine == "megatron" else 1
    return -(-setup.shape.vocab_size // (multiple * setup.mesh.tp)) * multiple


def table_params(setup: Setup) -> float:
    """Return the parameters of one embedding table, or of the head, on a rank."""
    return vocabulary(setup) * setup.shape.hidden_size


def layer_params(setup: Setup, *, moe: bool) -> LayerParams:
    """Count one layer on a rank. What `num_params` has beyond the counted parts is spread over the layers."""
    shape, tp = setup.shape, setup.mesh.tp
    own = _attention(shape, tp) + shape.norms_per_layer * shape.hidden_size + _uncounted(shape) / tp
    if not moe:
        return LayerParams(own + params.dense_mlp_params(shape) / tp)
    routed = params.expert_params(shape)
    shared = params.shared_expert_params(shape)
    router = params.sparse_mlp_params(shape) - routed - shared
    return LayerParams(own + router + shared / tp, routed / setup.mesh.etp)


def _attention(shape: ModelShape, tp: int) -> float:
    split = whole = 0.0
    for projection in params.attention_projections(shape):
        if projection.name in WHOLE_ON_EVERY_RANK:
            whole += projection.num_params
        elif projection.name in ("k_proj", "v_proj"):
            # A rank has at least one key/value head; beyond their number they are copied.
            split += projection.num_params / min(tp, shape.num_kv_heads)
        else:
            split += projection.num_params / tp
    norms = params.attention_params(shape) - sum(p.num_params for p in params.attention_projections(shape))
    return split + whole + norms


def _uncounted(shape: ModelShape) -> float:
    return (shape.num_params - params.total_params(shape)) / shape.num_layers
