"""What `agreement.py` compares, and on which random inputs. NumPy only: every peer's environment reads this file.

Letters: S sequences, T padded length. Options are in the words of rlctl's configuration; each runner translates them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

Arrays = dict[str, np.ndarray]
Call = Callable[[Any, dict[str, Any]], Mapping[str, Any]]
AGGREGATIONS = ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm")
LEAVES = {
    **dict.fromkeys(("loss", "pairs", "sppo", "kl"), "logp"),
    **dict.fromkeys(("top_k_kl", "full_kl"), "student_logits"),
    "value_loss": "new_values",
    "prime_reward_loss": "reward_logp",
}
"""The column by which a call's answer is differentiated."""
MEAN_OF_SEQUENCES = "seq-mean-token-mean"
VOCAB, TOP = 30, 6
SPIKE = 80.0
"""Largest size of a log-ratio in `extreme` inputs, in nats."""


@dataclass(frozen=True)
class Case:
    """One row: a published function under some options on some inputs, and why it may differ."""

    peer: str
    call: str
    name: str = ""
    options: tuple[dict[str, Any], ...] = ({},)
    inputs: str = "usual"
    reason: str = ""
    """Why the two differ; a case without one must agree, and a case with one must not."""


def draw(kind: str, seed: int) -> Arrays:
    """Return float32 columns of a step's batch: ragged responses with tool replies in between, groups in any order.

    `plain` has no tool replies, `alone` groups of one, `level` equal scores within a group, `empty` responses without
    a token, `extreme` log-ratios of up to 80 nats; `pairs` and `quads` are groups of two and four, in
    order, and `ties` pairs of which some have equal scores.
    """
    rng = np.random.default_rng([seed, *kind.encode()])
    ordered = {"pairs": 2, "ties": 2, "quads": 4}.get(kind)
    sizes = [ordered] * 4 if ordered else [*rng.integers(2, 7, rng.integers(2, 5)), *[1, 1] * (kind == "alone")]
    group = np.repeat(np.arange(len(sizes)), sizes)
    group = group if ordered else rng.permutation(group)
    shape = size, width = len(group), int(rng.integers(4, 40))
    lengths = rng.integers(1, width + 1, size)
    if kind == "empty":
        lengths[::3] = 0
    mask = np.arange(width) < lengths[:, None]
    whole = mask.copy()
    for row in np.flatnonzero(lengths >= 4) if kind not in ("plain", "quads") else ():
        start, end = np.sort(rng.integers(1, lengths[row], 2))
        mask[row, start:end] = False
    binary = kind == "ties" or (seed % 2 and kind != "pairs")
    scores = rng.integers(0, 2, size) if binary else rng.normal(size=size)
    if kind == "level":
        scores = rng.normal(size=len(sizes))[group]
    rewards = np.where(mask & (seed % 4 > 1) & (kind not in ("level", "ties")), rng.normal(size=shape), 0.0)
    has = lengths > 0
    rewards[has, lengths[has] - 1] = scores[has]
    old = -np.abs(rng.normal(size=shape)) - 1e-3
    moves = {"logp": 0.3, "rollout_logp": 0.1, "ref_logp": 0.5, "reward_logp": 0.5}
    near = {name: np.minimum(old + scale * rng.normal(size=shape), -1e-3) for name, scale in moves.items()}
    if kind == "extreme":
        spikes = {name: rng.uniform(-SPIKE, SPIKE, shape) * (rng.random(shape) < 0.2) for name in moves}
        old = old - SPIKE
        near = {name: np.minimum(near[name] - SPIKE + spikes[name], -1e-3) for name in moves}
    logits = {name: rng.normal(size=(*shape, VOCAB)) for name in ("student_logits", "teacher_logits")}
    columns: Arrays = {
        **near, **logits, "old_logp": old, "rewards": rewards, "advantages": rng.normal(size=shape),
        "values": rng.normal(size=shape), "new_values": rng.normal(size=shape), "returns": rng.normal(size=shape),
        "sum_pi_squared": np.exp(old) ** 2 + rng.random(shape) * (1 - np.exp(old)) ** 2,
        "baseline": rng.normal(size=size),
        "weights": rng.uniform(0, 2, shape), "part/a": rng.integers(0, 2, size), "part/b": rng.normal(size=size),
        "response_mask": mask, "whole_mask": whole,
    }  # fmt: skip
    return {name: column.astype(np.float32) for name, column in columns.items()} | {"group": group}


def serve(peer: str, calls: Mapping[str, Call], folder: Path, wrap: Callable[[np.ndarray], Any]) -> None:
    """Answer the cases of `folder` that ask `peer`, or all of them as rlctl, into `PEER.npz`.

    A call that has a leaf answers with what is differentiated first; the gradient of its sum is answered too.
    """
    with np.load(folder / "inputs.npz") as stored:
        inputs = dict(stored)
    answers: dict[str, Any] = {}
    for case in json.loads((folder / "cases.json").read_text()):
        if peer not in ("rlctl", case["peer"]):
            continue
        prefix, leaf = case["inputs"] + ":", LEAVES.get(case["call"])
        x = {name.removeprefix(prefix): wrap(c.copy()) for name, c in inputs.items() if name.startswith(prefix)}
        kept = x[leaf].requires_grad_() if leaf else None
        found = dict(calls[case["call"]](x, case["options"]))
        if kept is not None:
            next(iter(found.values())).sum().backward()
            found["grad"] = kept.grad
        for name, value in found.items():
            array = value.detach() if hasattr(value, "detach") else value
            answers[f"{case['id']}:{name}"] = np.asarray(array, dtype=np.float64)
    np.savez(folder / f"{peer}.npz", **answers)


PUBLISHED = {
    "gae": "compute_gae_advantage_return",
    "grpo_vectorized": "compute_grpo_vectorized_outcome_advantage",
    "passk_grpo": "compute_grpo_passk_outcome_advantage",
    "rloo_vectorized": "compute_rloo_vectorized_outcome_advantage",
    "reinforce_pp": "compute_reinforce_plus_plus_outcome_advantage",
    "reinforce_pp_baseline": "compute_reinforce_plus_plus_baseline_outcome_advantage",
    "otb": "compute_optimal_token_baseline_advantage",
    "otb multi-turn": "compute_multi_turn_optimal_token_baseline_advantage",
    "kl": "kl_penalty",
    "aggregate": "agg_loss",
    "value_loss": "compute_value_loss",
    "kl_controller": "AdaptiveKLController",
    "kl_in_reward": "apply_kl_penalty",
    "correction": "compute_rollout_correction_and_rejection_mask",
    "diagnostics": "compute_offpolicy_metrics",
    "weight_diagnostics": "compute_is_metrics",
    "overlong": "DAPORewardManager",
    "resample": "compute_pf_ppo_reweight_data",
    "top_k_kl": "compute_forward_kl_topk",
    "full_kl": "GKDTrainer.generalized_jsd_loss",
    "prime": "compute_rloo_advantage_return",
    "prime_reward_loss": "compute_ce_dpo_loss_rm",
    "sppo": "compute_sppo_loss",
    "pairs": "compute_online_dpo_loss",
}
VERL_LOSSES = {
    "clip": "vanilla",
    "gmpo": "geo_mean",
    "dppo tv": "dppo_tv",
    "dppo kl": "dppo_kl",
    "bypass": "bypass_mode",
}
OVERFLOW = "the peer takes exp of an unbounded log-ratio; rlctl holds it within 20 nats, as both do elsewhere"
ALONE = "a group of one has nothing to be compared with: 0 in rlctl for every algorithm; the peer gives the raw score"
LEVEL = "equal scores differ from their mean by nothing; the peer's float32 mean is a digit off, magnified by 1 / 1e-6"
NORM = ({"normalize_std": True}, {"normalize_std": False})
GROUPED: dict[str, tuple[dict[str, Any], ...]] = {
    "grpo": NORM,
    "grpo_vectorized": NORM,
    "rloo": ({},),
    "rloo_vectorized": ({},),
    "opo": ({},),
    "gpg": ({"f_norm": 1.0}, {"f_norm": 2.0}),
    "reinforce_pp_baseline": ({},),
    "gdpo": ({"parts": {"a": 1.0, "b": 0.5}},),
}
CLIP = {"clip_low": 0.2, "clip_high": 0.28}
LOSSES: dict[str, tuple[dict[str, Any], str]] = {
    "clip": ({**CLIP, "dual_clip": 3.0}, ""),
    "gspo": ({"clip_low": 3e-2, "clip_high": 4e-2}, ""),
    "cispo": (CLIP, ""),
    "gpg": ({}, ""),
    "dppo tv": ({"variant": "tv", "threshold_low": 0.05, "threshold_high": 0.04, "max_ratio": 20.0}, ""),
    "dppo kl": ({"variant": "kl", "threshold_low": 0.02, "threshold_high": 0.01, "max_ratio": 20.0}, ""),
    "dro": ({"beta": 0.4}, ""),
    # All candidates are left out, so that chance decides nothing.
    "clip_cov": ({**CLIP, "token_share": 1.0, "cov_low": 0.3, "cov_high": 2.0}, OVERFLOW),
    "kl_cov": ({"token_share": 0.1, "coef": 0.7}, OVERFLOW),
}
MEAN_OF_MEANS: dict[str, tuple[dict[str, Any], str]] = {
    "sapo": ({"tau_pos": 1.0, "tau_neg": 1.05}, ""),
    "gmpo": ({"clip_low": 0.4, "clip_high": 0.3}, OVERFLOW),
}
RULES = [
    {"type": kind, "level": level, "upper": upper}
    for kind, upper in (("k1", 1.1), ("k2", 0.01), ("k3", 0.01))
    for level in ("token", "sequence", "geometric", "max")
    if (kind, level) != ("k1", "max")
]
WEIGHTS = [
    {"weights": {"level": level, "upper": 2.0, **more, "normalize": normalize}}
    for level in ("token", "sequence")
    for more in ({}, {"lower": 0.2})
    for normalize in (False, True)
]


def published(peer: str, call: str, name: str) -> str:
    """Return what the peer calls the function."""
    kind = name.split(",")[0]
    if call == "loss" and peer == "trl":
        return f"{'GMPOTrainer' if kind == 'gmpo' else 'GRPOTrainer'}._compute_loss"
    if call == "loss":
        return f"compute_policy_loss_{VERL_LOSSES.get(kind, kind)}"
    return PUBLISHED.get(f"{call} {name}", PUBLISHED.get(call, f"compute_{call}_outcome_advantage"))


def _loss(kind: str, loss: dict[str, Any], modes: tuple[str, ...], **more: Any) -> tuple[dict[str, Any], ...]:
    return tuple({"loss": {"type": kind.split()[0], **loss}, "aggregation": mode, **more} for mode in modes)


def _verl() -> Iterator[Case]:
    case = partial(Case, "verl")
    yield case("gae", options=({"gamma": 1.0, "lam": 1.0}, {"gamma": 0.97, "lam": 0.9}))
    for call, options in GROUPED.items():
        yield case(call, options=options)
        yield case(call, options=options, inputs="alone", reason="" if call == "rloo_vectorized" else ALONE)
        if call in ("grpo", "grpo_vectorized"):
            yield case(call, options=NORM[:1], inputs="level", reason=LEVEL)
    yield case("passk_grpo", options=NORM)
    yield case("reinforce_pp", options=({"gamma": 1.0}, {"gamma": 0.95}))
    yield case("remax")
    yield case("otb", options=({}, {"weights": True}), inputs="plain")
    yield case("otb", options=({}, {"weights": True}), reason=OTB_TAIL)
    yield case("otb", inputs="alone", reason=ALONE)
    yield case("otb", "multi-turn", options=({"multi_turn": True}, {"multi_turn": True, "weights": True}))
    for name, (loss, reason) in LOSSES.items():
        options = _loss(name, loss, AGGREGATIONS)
        yield case("loss", name, options=(*options, *_loss(name, loss, AGGREGATIONS[:1], weights=True)))
        yield case("loss", name, options=options, inputs="extreme", reason=reason)
        yield case("loss", name, options=options, inputs="empty")
    for name, (loss, reason) in MEAN_OF_MEANS.items():
        options = _loss(name, loss, (MEAN_OF_SEQUENCES,))
        yield case("loss", f"{name}, {MEAN_OF_SEQUENCES}", options=options)
        yield case("loss", f"{name}, {MEAN_OF_SEQUENCES}", options=options, inputs="extreme", reason=reason)
    yield case(
        "loss",
        f"gmpo, {MEAN_OF_SEQUENCES}",
        options=_loss("gmpo", MEAN_OF_MEANS["gmpo"][0], (MEAN_OF_SEQUENCES,)),
        inputs="empty",
        reason=GMPO_EMPTY,
    )
    yield case("loss", "gmpo, token-mean", options=_loss("gmpo", {}, AGGREGATIONS[:1]), reason=GMPO_MODE)
    weighted = _loss("gmpo", {}, (MEAN_OF_SEQUENCES,), weights=True)
    yield case("loss", "gmpo, seq-mean-token-mean with weights", options=weighted, reason=GMPO_WEIGHTS)
    yield case("loss", "sapo, token-mean", options=_loss("sapo", {}, AGGREGATIONS[:1]), reason=SAPO_MODE)
    for inputs in ("usual", "extreme"):
        yield case(
            "kl", options=tuple({"estimator": e} for e in ("k1", "k2", "k3", "abs", "k1+", "k3+")), inputs=inputs
        )
    for inputs in ("usual", "empty"):
        yield case("aggregate", options=tuple({"aggregation": mode} for mode in AGGREGATIONS), inputs=inputs)
    yield case("value_loss", options=({"value_clip": 0.5}, {"value_clip": 0.1}))
    yield case("kl_controller", options=({"coef": 0.1, "target": 0.5, "horizon": 1000},))
    yield case("kl_in_reward", options=({"coef": 0.1, "estimator": "k1"}, {"coef": 0.1, "estimator": "k3"}))
    yield case(
        "kl_in_reward", "adaptive", options=({"coef": 0.1, "target": 0.5, "horizon": 100},), reason=KL_OF_SEQUENCE
    )
    for inputs in ("usual", "extreme"):
        yield case("correction", "TIS", options=tuple(WEIGHTS[:2] + WEIGHTS[4:6]), inputs=inputs)
        yield case("correction", "rejection", options=tuple({"rejections": [rule]} for rule in RULES), inputs=inputs)
    icepop = tuple(WEIGHTS[2:4] + WEIGHTS[6:])
    yield case("correction", "IcePop", options=icepop)
    yield case("correction", "IcePop", options=icepop, inputs="extreme", reason=NO_WEIGHT)
    yield case("correction", "rejection, all rules at once", options=({"rejections": RULES[2:6]},))
    uneven = {"rejections": [{"type": "k1", "level": "token", "lower": 0.9, "upper": 1.05}]}
    yield case("correction", "k1, bounds of the inverse ratio", options=({**uneven, "inverse": True},))
    yield case("correction", "k1, bounds as written", options=(uneven,), reason=K1_SIDE)
    yield case("diagnostics")
    yield case("diagnostics", inputs="empty", reason=EMPTY_MEANS)
    yield case(
        "weight_diagnostics", options=({"level": "token", "upper": 1.2}, {"level": "token", "upper": 1.2, "lower": 0.8})
    )
    yield case(
        "weight_diagnostics", "sequence", options=({"level": "sequence", "upper": 1.2},), reason=SEQUENCE_WEIGHTS
    )
    bypass = {"rejections": RULES[2:3]}
    yield case("loss", "bypass, clip", options=_loss("clip", {**CLIP, "dual_clip": 3.0}, AGGREGATIONS, bypass=bypass))
    yield case(
        "loss",
        "bypass, policy gradient",
        options=_loss("gpg", {}, AGGREGATIONS, bypass={**bypass, "weights": {"upper": 1.2}}),
    )
    yield case("overlong", options=({"max_tokens": 45, "buffer_tokens": 30, "penalty": 0.7},))
    yield case("resample", options=({"type": "pow", "power": 2.0}, {"type": "max_min"}, {"type": "max_random"}))
    yield case("top_k_kl", options=({"k": TOP},))


def _trl() -> Iterator[Case]:
    case, loss_of = partial(Case, "trl"), partial(_loss, per_sequence=True)
    clip = {**CLIP, "dual_clip": 3.0}
    for mode in AGGREGATIONS:
        if mode not in ("token-sum", "seq-mean-token-sum"):
            yield case("loss", f"clip, {mode}", options=loss_of("clip", clip, (mode,)))
    yield case("loss", "clip with KL, token-mean", options=loss_of("clip", clip, AGGREGATIONS[:1], kl_loss_coef=0.3))
    yield case("loss", f"gspo, {MEAN_OF_SEQUENCES}", options=loss_of("gspo", LOSSES["gspo"][0], (MEAN_OF_SEQUENCES,)))
    yield case(
        "loss", "cispo, token-mean", options=loss_of("cispo", {"clip_low": 1.0, "clip_high": 0.2}, AGGREGATIONS[:1])
    )
    for name, (loss, _) in MEAN_OF_MEANS.items():
        yield case("loss", f"{name}, {MEAN_OF_SEQUENCES}", options=loss_of(name, loss, (MEAN_OF_SEQUENCES,)))
    yield case("full_kl")


def _recipe() -> Iterator[Case]:
    case = partial(Case, "recipe")
    yield case("prime", options=({"process_coef": 5.0, "outcome_coef": 5.0},), inputs="quads")
    yield case("prime_reward_loss", options=({"beta": 0.05},), inputs="quads")
    for eta in (1.0, 0.5):
        yield case("sppo", f"eta {eta}", options=({"eta": eta},), inputs="quads")
    smooth = ({"type": "dpo", "beta": 0.1}, {"type": "dpo", "beta": 0.5, "label_smoothing": 0.1})
    yield case("pairs", "dpo", options=smooth, inputs="pairs")
    yield case("pairs", "ipo", options=({"type": "ipo", "beta": 0.5},), inputs="pairs")
    yield case("pairs", "dpo", options=smooth, inputs="ties", reason=TIES)


OTB_TAIL = "the peer ends the common part at a number of tokens and not at a place, which tool replies move"
GMPO_EMPTY = "a response without tokens has no part in the mean; the peer divides by all rows"
GMPO_MODE = "the peer ignores the aggregation mode"
GMPO_WEIGHTS = "importance weights multiply each token's loss, as in every other; the peer takes their geometric mean"
SAPO_MODE = "the peer ignores the aggregation mode"
KL_OF_SEQUENCE = "the controller's KL is of a sequence, as in arXiv:1909.08593; the peer's is the mean over its tokens"
K1_SIDE = "bounds are of trainer over rollout, as those of the weights are; the peer's of rollout over trainer"
NO_WEIGHT = "where no weight is left, the peer's diagnostics divide by 0 and end the run"
TIES = "a pair of equal scores tells nothing and is left out; the peer takes its first response for the better one"
EMPTY_MEANS = "means over sequences leave out those without tokens; the peer counts them as perplexity 1"
SEQUENCE_WEIGHTS = (
    "all are of the bounded weights, over tokens; the peer's extremes and shares are unbounded, over sequences"
)
CASES: tuple[Case, ...] = (*_verl(), *_trl(), *_recipe())
