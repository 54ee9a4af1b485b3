"""Which splits a framework can run with a model: everything that has to divide, and by what."""

from __future__ import annotations

from collections.abc import Iterator

from rlctl_hw.setup import IllegalLayout, Setup


def check(setup: Setup) -> None:
    """Raise IllegalLayout, with every size that does not divide, for a layout no framework runs."""
    problems = list(_problems(setup))
    if problems:
        raise IllegalLayout("; ".join(problems))


def _problems(setup: Setup) -> Iterator[str]:
    mesh = setup.mesh
    degrees = (mesh.dp_replicate, mesh.dp_shard, mesh.tp, mesh.pp, mesh.cp, mesh.ep, mesh.etp, mesh.virtual_stages)
    if min(*degrees, setup.seq_len, setup.micro_batch, setup.num_micro_batches) < 1:
        yield "every degree, the sequence length and the micro-batch are at least 1"
        return
    yield from _tensor(setup)
    yield from _pipeline(setup)
    yield from _experts(setup)
    if setup.seq_len % mesh.cp:
        yield f"seq_len {setup.seq_len} does not divide by cp {mesh.cp}"
    if setup.task == "rollout" and mesh.cp > 1:
        yield f"a rollout engine has no context parallelism (cp {mesh.cp})"
    if setup.gpu_memory_share is not None and setup.catalogue is None:
        yield "a share of the device needs the device's name"
    if setup.lora_rank and setup.task == "rollout":
        yield f"a rollout engine has merged weights, not LoRA (lora_rank {setup.lora_rank})"


def _tensor(setup: Setup) -> Iterator[str]:
    shape, tp = setup.shape, setup.mesh.tp
    if shape.num_heads % tp:
        yield f"num_heads {shape.num_heads} does not divide by tp {tp}"
    if shape.latent is None and shape.num_kv_heads % tp:
        # vLLM copies key/value heads where there are fewer than ranks; training engines do not.
        copied = setup.task == "rollout" and tp % shape.num_kv_heads == 0
        if not copied:
            yield f"num_kv_heads {shape.num_kv_heads} does not divide by tp {tp}"
    for name, size in (("intermediate_size", shape.intermediate_size), ("hidden_size", shape.hidden_size)):
        if size % tp:
            yield f"{name} {size} does not divide by tp {tp}"


def _pipeline(setup: Setup) -> Iterator[str]:
    mesh, num_layers = setup.mesh, setup.shape.num_layers
    chunks = mesh.pp * mesh.virtual_stages
    if mesh.virtual_stages > 1 and mesh.pp == 1:
        yield "virtual stages need a pipeline (pp above 1)"
    if num_layers % chunks == 0:
        return
    per_stage = -(-num_layers // mesh.pp)
    if not mesh.uneven_stages:
        yield f"num_layers {num_layers} does not divide by pp * virtual_stages {chunks}"
    elif per_stage * (mesh.pp - 1) >= num_layers:
        yield f"num_layers {num_layers} leaves no layer to the last of {mesh.pp} stages"


def _experts(setup: Setup) -> Iterator[str]:
    mesh, experts = setup.mesh, setup.shape.experts
    if mesh.ep == 1 and mesh.etp == 1:
        return
    if experts is None:
        yield f"ep {mesh.ep} needs a model with experts"
        return
    if experts.num_experts % mesh.ep:
        yield f"num_experts {experts.num_experts} does not divide by ep {mesh.ep}"
    if experts.expert_size % mesh.etp:
        yield f"expert_size {experts.expert_size} does not divide by etp {mesh.etp}"
    ranks = mesh.dp_replicate * mesh.dp_shard * mesh.cp * mesh.tp
    if ranks % (mesh.ep * mesh.etp):
        yield f"{ranks} ranks of a stage do not divide by ep * etp {mesh.ep * mesh.etp}"
