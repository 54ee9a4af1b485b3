"""The software path the numbers hold for, in words: frameworks, and versions of one framework, differ in these."""

from __future__ import annotations

from collections.abc import Iterator

from rlctl_hw.calculator.states import has_master
from rlctl_hw.setup import Setup


def path(setup: Setup, moment: str) -> str:
    """Return the path, and the moment of the peak."""
    return "; ".join((*_words(setup), f"peak at: {moment}"))


def _words(setup: Setup) -> Iterator[str]:
    if setup.task == "rollout":
        yield "paged KV cache as in vLLM, CUDA graphs on"
        return
    yield f"{setup.engine}, {setup.attention} attention, compute in {setup.compute_dtype}"
    yield _loss(setup)
    if setup.task == "logprob":
        return
    yield f"recompute {setup.recompute}"
    if setup.engine == "fsdp2":
        yield "next layer gathered ahead" if setup.reshard_after_forward else "parameters stay gathered"
    if has_master(setup):
        yield "optimizer with fp32 master weights"
    if setup.mesh.uneven_stages and setup.shape.num_layers % setup.mesh.pp:
        yield "last pipeline stage with fewer layers"


def _loss(setup: Setup) -> str:
    if setup.critic:
        return "values in place of logits"
    if setup.loss == "chunked":
        return f"logits in chunks of {setup.logits_chunk_tokens} tokens, computed again in backward"
    if setup.engine == "megatron":
        return "whole logits, vocabulary-parallel cross entropy"
    if setup.loss == "fused":
        return "loss fused with the head, logits never whole"
    if setup.compiled_loss:
        return "whole logits, compiled cross entropy"
    copy = "not known to be held or dropped" if setup.fp32_logits is None else setup.fp32_logits
    return f"whole logits, cross entropy in PyTorch, fp32 copy {copy}"
