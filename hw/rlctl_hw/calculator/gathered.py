"""FSDP2's buffers: gathered parameters and unsharded gradients of the layers at work. [torch.distributed.fsdp]"""

from __future__ import annotations

import math
from dataclasses import replace

from rlctl_hw.calculator.sizes import BYTES, layer_params, table_params
from rlctl_hw.calculator.stages import Stage
from rlctl_hw.calculator.states import held_params, states, tables
from rlctl_hw.calculator.terms import Term
from rlctl_hw.setup import Setup

PREFETCHED_LAYERS = 2
"""The layer at work and the next one, whose gather overlaps."""


def parameters(setup: Setup, stage: Stage) -> Term:
    """Return the gathered parameters: the layer at work, the prefetched one, embedding and head."""
    width = BYTES[setup.compute_dtype]
    if not setup.reshard_after_forward:
        whole = held_params(setup, stage).total
        return Term("buffers", width * whole, f"all parameters of the stage, {width:g} B each")
    count = min(PREFETCHED_LAYERS, stage.num_layers) * largest_layer(setup, stage) + root_params(setup, stage)
    return Term("buffers", width * count, f"two layers, embedding and head gathered, {width:g} B a parameter")


def root_gradients(setup: Setup, stage: Stage) -> float:
    """Return the whole gradient of embedding and head in the compute type: it waits for the end of backward."""
    return 0.0 if setup.lora_rank else BYTES[setup.compute_dtype] * root_params(setup, stage)


def reduced_gradients(setup: Setup, params: float) -> float:
    """Return the bytes of gradients on their way: whole in the compute type, and whole in fp32 as they are reduced."""
    if setup.lora_rank:
        return 0.0
    reduce_width = BYTES[setup.grad_dtype]
    copy = reduce_width if reduce_width != BYTES[setup.compute_dtype] else 0.0
    return (BYTES[setup.compute_dtype] + copy) * params


def accumulated_gradients(setup: Setup, stage: Stage) -> float:
    """Return whole gradients that wait for the last micro-batch where parameters are not resharded."""
    if setup.reshard_after_forward or setup.lora_rank:
        return 0.0
    return BYTES[setup.grad_dtype] * held_params(setup, stage).total


def largest_layer(setup: Setup, stage: Stage) -> float:
    """Return the parameters of the largest layer of a stage on a rank; experts are gathered together."""
    layers = (layer_params(setup, moe=moe) for moe in stage.kinds)
    return max(layer.dense + layer.routed / setup.mesh.ep for layer in layers)


def root_params(setup: Setup, stage: Stage) -> float:
    """Return embedding, head and final norm of a stage on a rank."""
    return tables(setup, stage) * table_params(setup) + stage.last * setup.shape.hidden_size


def limit(setup: Setup, stage: Stage) -> float:
    """Return the most that buffers may take: what sharding saves, where one rank alone would need no copies.

    Gathering more than that is for models of a few layers; their engine is better left unsharded.
    """
    base = setup.base_dtype or setup.param_dtype
    if base != setup.compute_dtype or setup.param_offload:
        return math.inf
    alone = replace(setup, mesh=replace(setup.mesh, dp_shard=1, cp=1, ep=1))
    return _kept_bytes(alone, stage) - _kept_bytes(setup, stage)


def _kept_bytes(setup: Setup, stage: Stage) -> float:
    own = states(setup, stage)
    gradients = own.gradients.num_bytes if setup.num_micro_batches > 1 else 0.0
    return own.weights.num_bytes + own.optimizer.num_bytes + gradients
