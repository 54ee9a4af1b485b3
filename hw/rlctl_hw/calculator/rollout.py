"""A rollout engine that owns its device's memory: weights, KV cache, CUDA graphs, prefill. [vLLM's memory profile]"""

from __future__ import annotations

from rlctl_hw import params
from rlctl_hw.calculator import activations, overheads
from rlctl_hw.calculator.sizes import BYTES, GIB, vocabulary
from rlctl_hw.calculator.stages import Stage
from rlctl_hw.calculator.states import held_params
from rlctl_hw.calculator.terms import Moment, Term
from rlctl_hw.devices import by_key
from rlctl_hw.setup import Setup

PREFILL_TOKENS = 8192
"""Tokens that vLLM computes together by default (max_num_batched_tokens on large devices)."""
SAMPLED_ROWS = 256
"""Sequences whose logits vLLM samples together by default (max_num_seqs)."""
GRAPHS_GIB = 1.0
"""CUDA graphs of the default capture sizes; a few GiB are published."""


def moments(setup: Setup, stage: Stage) -> tuple[Moment, ...]:
    """Return the one moment: a full batch in decoding while a prompt is computed."""
    others = (_weights(setup, stage), _graphs(), *_prefill(setup, stage))
    cache = _cache(setup, stage) if setup.gpu_memory_share is None else _rest(setup, others)
    return (Moment("generation", (cache, *others)),)


def _weights(setup: Setup, stage: Stage) -> Term:
    width = weight_bytes(setup)
    return Term("weights", width * held_params(setup, stage).total, f"{width:g} B a parameter over tp, pp and ep ranks")


def weight_bytes(setup: Setup) -> float:
    """Return bytes per weight: the compute type's, or less where the parameters are quantised."""
    return min(BYTES[setup.param_dtype], BYTES[setup.compute_dtype])


def _cache(setup: Setup, stage: Stage) -> Term:
    shape, width = setup.shape, BYTES[setup.compute_dtype]
    # Ranks beyond the number of key/value heads keep copies; every rank keeps the whole latent.
    split = 1 if shape.latent else min(setup.mesh.tp, shape.num_kv_heads)
    share = stage.num_layers / shape.num_layers / split
    whole = params.kv_bytes(shape, setup.seq_len, width) * share
    return Term("kv_cache", setup.micro_batch * whole, f"{setup.micro_batch} sequences x {setup.seq_len} tokens")


def _rest(setup: Setup, others: tuple[Term, ...]) -> Term:
    """Return the cache of an engine that takes a share of the device: what weights and all else leave of it."""
    share = setup.gpu_memory_share or 0.0
    taken = share * by_key(setup.catalogue or "").memory_gib * GIB
    outside = overheads.communication(setup).num_bytes + overheads.context(setup).num_bytes
    left = taken - outside - sum(term.num_bytes for term in others)
    return Term("kv_cache", max(0.0, left), f"what is left of {share:g} of the device")


def _graphs() -> Term:
    return Term("cuda_graphs", GRAPHS_GIB * GIB, "graphs of the default capture sizes", "assumed")


def _prefill(setup: Setup, stage: Stage) -> tuple[Term, ...]:
    rows = min(PREFILL_TOKENS, setup.micro_batch * setup.seq_len)
    moe = stage.num_moe > 0
    working = rows * activations.forward_only(setup, moe=moe)
    columns = vocabulary(setup) * setup.mesh.tp if stage.last else 0
    sampled = min(SAMPLED_ROWS, setup.micro_batch) * columns * (BYTES[setup.compute_dtype] + 8)
    return (
        Term("activations", working, f"one layer over {rows} tokens of prefill"),
        Term("logits", sampled, "sampled rows over the whole vocabulary, with fp32 copies"),
    )
