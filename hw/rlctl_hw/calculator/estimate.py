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
PARTS = ("weights", "gradients", "optimizer", "activations", "logits", "buffers", "kv_cache", "cuda_graphs")
COMES_AND_GOES = ("activations", "logits")


def estimate(setup: Setup) -> Estimate:
    """Return the memory of the fullest device; IllegalLayout where no framework runs the layout."""
    return max(estimate_stages(setup), key=lambda found: found.device.gib)


def estimate_stages(setup: Setup) -> tuple[Estimate, ...]:
    """Return the estimates of the first, second and last pipeline stage; of one stage where there is no pipeline."""
    check(setup)
    return tuple(_stage_estimate(setup, stage) for stage in stages(setup))


def _stage_estimate(setup: Setup, stage: Stage) -> Estimate:
    moment = max(MOMENTS[setup.task](setup, stage), key=lambda moment: moment.num_bytes)
    own = states(setup, stage)
    peak = _parts(moment.terms)
    reserved = [*peak, *_parts(_allocator(setup, stage, moment, own))]
    device = [*reserved, *_parts((overheads.communication(setup), overheads.context(setup)))]
    return Estimate(
        peak=_band(peak),
        reserved=_band(reserved),
        device=_band(device),
        steady=_band(_parts(_steady(setup, moment, own))),
        parts=tuple(part for part in device if part.gib > 0),
        host_gib=own.host_bytes / GIB,
        path=path(setup, moment.name),
    )


def _allocator(setup: Setup, stage: Stage, moment: Moment, own: States) -> tuple[Term, ...]:
    """Return what the allocator holds beyond the peak.

    FSDP2 reduces gradients on a stream of its own, whose blocks no other stream reuses, so that they add up with a
    peak that comes before them.
    """
    sizes = {name: sum(term.num_bytes for term in moment.terms if term.name == name) for name in PARTS}
    waste = overheads.FRAGMENTATION * sum(sizes[name] for name in COMES_AND_GOES)
    if setup.engine == "fsdp2" and setup.task in ("sft", "update"):
        room = max(0.0, gathered.limit(setup, stage) - sizes["buffers"])
        waste += min(own.gradients.num_bytes - sizes["gradients"], room)
    return (Term("fragmentation", waste, "blocks freed too late, too small or on another stream", "assumed"),)


def _steady(setup: Setup, moment: Moment, own: States) -> tuple[Term, ...]:
    if setup.task == "rollout":
        return tuple(term for term in moment.terms if term.name in ("weights", "kv_cache", "cuda_graphs"))
    kept = (own.weights, own.optimizer, overheads.workspace(setup))
    return (*kept, own.gradients) if setup.engine == "megatron" else kept


def _parts(terms: tuple[Term, ...]) -> list[Part]:
    """Merge terms of one name; a merged part is no surer than its least sure term."""
    merged: dict[str, Part] = {}
    for term in terms:
        part = Part(term.name, term.num_bytes / GIB, term.origin, term.why)
        if known := merged.get(term.name):
            bigger, smaller = (known, part) if known.gib >= part.gib else (part, known)
            part = replace(bigger, gib=known.gib + part.gib, why=f"{bigger.why}; {smaller.why}" if smaller.gib else bigger.why)
        merged[term.name] = part
    return list(merged.values())


def _band(parts: list[Part]) -> Band:
    gib = sum(part.gib for part in parts)
    low = sum(part.gib * (1 - overheads.DOUBT[part.name][0]) for part in parts)
    high = sum(part.gib * (1 + overheads.DOUBT[part.name][1]) for part in parts)
    return Band(gib, low, high)
