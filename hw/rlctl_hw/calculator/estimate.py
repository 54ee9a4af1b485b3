"""From a setup to four numbers with bands: the fullest stage, its fullest moment, and what lies on top."""

from __future__ import annotations

from dataclasses import replace

from rlctl_hw.calculator import forward, gathered, overheads, rollout, training
from rlctl_hw.calculator.legal import check
from rlctl_hw.calculator.path import path
from rlctl_hw.calculator.sizes import GIB
from rlctl_hw.calculator.stages import Stage, stages
from rlctl_hw.calculator.states import States, states
from rlctl_hw.calculator.terms import Moment, Term
from rlctl_hw.setup import Band, Estimate, Part, Setup

MOMENTS = {
    "sft": training.moments,
    "update": training.moments,
    "logprob": forward.moments,
    "rollout": rollout.moments,
}
COMES_AND_GOES = ("activations", "logits")


def estimate(setup: Setup) -> Estimate:
    """Return the memory of the fullest device; IllegalLayout where no framework runs the layout."""
    found = estimate_stages(setup)
    fullest = max(found, key=lambda stage: stage.device.gib)
    return replace(
        fullest,
        peak=max((stage.peak for stage in found), key=_middle),
        reserved=max((stage.reserved for stage in found), key=_middle),
        steady=max((stage.steady for stage in found), key=_middle),
        host_gib=max(stage.host_gib for stage in found),
    )


def estimate_stages(setup: Setup) -> tuple[Estimate, ...]:
    """Return the estimates of the first, second and last pipeline stage; of one stage where there is no pipeline."""
    check(setup)
    return tuple(_stage_estimate(setup, stage) for stage in stages(setup))


def _stage_estimate(setup: Setup, stage: Stage) -> Estimate:
    moments = MOMENTS[setup.task](setup, stage)
    moment = max(moments, key=lambda moment: moment.num_bytes)
    own = states(setup, stage)
    held = (*moment.terms, *_unused_blocks(setup, stage, moments, own))
    device = _parts((*held, overheads.communication(setup), overheads.context(setup)))
    return Estimate(
        peak=_band(_parts(moment.terms)),
        reserved=_band(_parts(held)),
        device=_band(device),
        steady=_band(_parts(_steady(setup, moment, own))),
        parts=tuple(part for part in device if part.gib > 0),
        host_gib=own.host_bytes / GIB,
        path=path(setup, moment.name),
    )


def _unused_blocks(setup: Setup, stage: Stage, moments: tuple[Moment, ...], own: States) -> tuple[Term, ...]:
    """Return what the allocator holds beyond the peak: a share of what passes, and gradients of another stream."""
    passing = max(sum(_size(moment, name) for name in COMES_AND_GOES) for moment in moments)
    peak = max(moment.num_bytes for moment in moments)
    pooled = max(moment.num_bytes + _other_stream(setup, stage, moment, own) for moment in moments)
    return (
        Term("gradients", pooled - peak, "those that come later, in blocks of a stream of their own"),
        Term("fragmentation", overheads.FRAGMENTATION * passing, "blocks freed too late or too small", "assumed"),
    )


def _other_stream(setup: Setup, stage: Stage, moment: Moment, own: States) -> float:
    """Return the gradients that a moment lacks. FSDP2 reduces on a stream of its own; blocks of one stream never serve
    another, so that gradients add to activations that are freed before they come."""
    if setup.engine == "megatron" or setup.task not in ("sft", "update"):
        return 0.0
    room = max(0.0, gathered.limit(setup, stage) - _size(moment, "buffers"))
    return min(own.gradients.num_bytes - _size(moment, "gradients"), room)


def _size(moment: Moment, name: str) -> float:
    return sum(term.num_bytes for term in moment.terms if term.name == name)


def _steady(setup: Setup, moment: Moment, own: States) -> tuple[Term, ...]:
    if setup.task == "rollout":
        return tuple(term for term in moment.terms if term.name in ("weights", "kv_cache", "cuda_graphs"))
    kept = (own.weights, own.optimizer, overheads.workspace(setup))
    return (*kept, own.gradients) if setup.engine == "megatron" else kept


def _parts(terms: tuple[Term, ...]) -> list[Part]:
    """Merge terms of one name; the origin is that of the largest."""
    merged: dict[str, Part] = {}
    for term in terms:
        part = Part(term.name, term.num_bytes / GIB, term.origin, term.why)
        if known := merged.get(term.name):
            bigger, smaller = (known, part) if known.gib >= part.gib else (part, known)
            why = f"{bigger.why}; {smaller.why}" if smaller.gib else bigger.why
            part = replace(bigger, gib=known.gib + part.gib, why=why)
        merged[term.name] = part
    return list(merged.values())


def _middle(band: Band) -> float:
    return band.gib


def _band(parts: list[Part]) -> Band:
    gib = sum(part.gib for part in parts)
    low = sum(part.gib * (1 - overheads.DOUBT[part.name][0]) for part in parts)
    high = sum(part.gib * (1 + overheads.DOUBT[part.name][1]) for part in parts)
    return Band(gib, low, high)
