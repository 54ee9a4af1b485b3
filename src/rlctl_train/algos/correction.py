"""Rollout correction: importance weights and rejection by the gap between trainer and rollout. Letters as in `ops`.

Truncated importance sampling (TIS) keeps the gradient from tokens the rollout engine made too likely, IcePop
(arXiv:2510.18855) drops those outside an interval, and rejection leaves tokens or sequences out altogether. Here x is
the log-ratio log pi_trainer - log pi_rollout of a sampled token, and every bound on a ratio bounds exp(x).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from rlctl_train.algos.ops import MAX_LOG_RATIO, masked_mean, select
from rlctl_train.batch import Batch
from rlctl_train.config.correction import ImportanceWeights, RatioRejection, Rejection, RolloutCorrection

Metrics = dict[str, float]


@dataclass(frozen=True)
class Correction:
    """What corrects a step's batch: `weights` [S, T], finite and without gradient, and the kept `mask` [S, T]."""

    weights: Tensor | None
    mask: Tensor
    metrics: Metrics


def correct(logp: Tensor, rollout_logp: Tensor, mask: Tensor, config: RolloutCorrection) -> Correction:
    """Correct the step's whole batch by the trainer's and the rollout engine's log-probabilities [S, T].

    Weights and their mean are over what `mask` [S, T] selects, before anything is rejected.
    """
    x = select((logp - rollout_logp).detach(), mask)
    weights = None
    if config.weights is not None:
        weights = importance_weights(x, mask, config.weights)
        if config.weights.normalize:
            weights = _normalized(weights, mask, config.weights)
    kept = kept_mask(x, mask, config)
    return Correction(weights, kept, _rejection_metrics(x, mask, kept, config))


def importance_weights(x: Tensor, mask: Tensor, config: ImportanceWeights) -> Tensor:
    """Return the bounded ratio of each token [S, T] from log-ratios x, 0 where masked; not normalised."""
    ratio = level_ratio(x, mask, config)
    if config.lower is None:
        return select(ratio.clamp(max=config.upper), mask)
    return select(torch.where((ratio >= config.lower) & (ratio <= config.upper), ratio, 0.0), mask)


def level_ratio(x: Tensor, mask: Tensor, config: ImportanceWeights) -> Tensor:
    """Return exp(x) [S, T], or the product over the sequence at each of its tokens; the exponent is within +-20."""
    exponent = x if config.level == "token" else select(x, mask).sum(-1, keepdim=True).expand_as(x)
    return select(exponent, mask).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def kept_mask(x: Tensor, mask: Tensor, config: RolloutCorrection) -> Tensor:
    """Return `mask` [S, T] less the tokens that a rule rejects and the sequences that the veto does."""
    keep = mask.bool()
    for rule in config.rejections:
        keep = keep & passes(x, mask, rule)
    if config.veto is not None:
        keep = keep & ~vetoed(x, mask, config.veto)[:, None]
    return keep.to(mask.dtype)


def passes(x: Tensor, mask: Tensor, rule: Rejection) -> Tensor:
    """Return whether each token [S, T] passes the rule; at all levels but `token` alike for all of a sequence.

    Per token k1 is x, k2 is x^2 / 2 and k3 is exp(x) - 1 - x, with x held within +-20. Over the sampled tokens of a
    sequence `sequence` is the sum, `geometric` the mean and `max` the largest. k1 is compared with the logarithms of
    its bounds.
    """
    x = select(x, mask).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    per_token = {"k1": x, "k2": 0.5 * x.square(), "k3": x.exp() - 1 - x}[rule.type]
    value = _at_level(per_token, mask, rule.level).expand_as(x)
    if isinstance(rule, RatioRejection):
        lower = 1 / rule.upper if rule.lower is None else rule.lower
        return (value >= math.log(lower)) & (value <= math.log(rule.upper))
    return value <= rule.upper


def vetoed(x: Tensor, mask: Tensor, veto: float) -> Tensor:
    """Return whether each sequence [S] has a sampled token of which the ratio is below `veto`."""
    return (select(x, mask) < math.log(veto)).any(-1)


def bypassed(logp: Tensor, batch: Batch, config: RolloutCorrection) -> Batch:
    """Return the batch with the rollout engine as the old policy, corrected by the current one's `logp` [S, T].

    Weights and rejection are those of each sequence by itself, so it does not matter how a batch is cut.
    """
    mask, old = batch["response_mask"], batch["rollout_logp"]
    x = select((logp - old).detach(), mask)
    batch = batch.with_columns(old_logp=old, response_mask=kept_mask(x, mask, config))
    if config.weights is None:
        return batch
    return batch.with_columns(rollout_weights=importance_weights(x, mask, config.weights))


def corrected(batch: Batch) -> Batch:
    """Return the batch as an update reads it: what was rejected is masked."""
    return batch.with_columns(response_mask=batch["kept_mask"]) if "kept_mask" in batch else batch


def _at_level(per_token: Tensor, mask: Tensor, level: str) -> Tensor:
    if level == "token":
        return per_token
    if level == "max":
        return per_token.amax(-1, keepdim=True)
    total = per_token.sum(-1, keepdim=True)
    return total if level == "sequence" else total / mask.bool().sum(-1, keepdim=True).clamp(min=1)


def _normalized(weights: Tensor, mask: Tensor, config: ImportanceWeights) -> Tensor:
    """Divide by the mean weight of all tokens, or of all sequences; weights that are all 0 stay so."""
    if config.level == "token":
        mean = masked_mean(weights, mask)
    else:
        mean = weights.amax(-1).sum() / mask.bool().any(-1).sum().clamp(min=1)
    return torch.where(mean > 0, weights / mean, weights)


def _rejection_metrics(x: Tensor, mask: Tensor, kept: Tensor, config: RolloutCorrection) -> Metrics:
    """Return the shares of tokens and of sequences that something rejects, altogether and by each rule."""
    metrics: Metrics = {}
    if config.rejections or config.veto is not None:
        metrics["rollout_corr/rollout_rs_masked_fraction"] = _token_share(~kept.bool(), mask)
        metrics["rollout_corr/rollout_rs_seq_masked_fraction"] = _sequence_share(~kept.bool(), mask)
    for rule in config.rejections:
        out = ~passes(x, mask, rule)
        metrics[f"rollout_corr/rollout_rs_{rule.level}_{rule.type}_masked_fraction"] = _token_share(out, mask)
        metrics[f"rollout_corr/rollout_rs_{rule.level}_{rule.type}_seq_masked_fraction"] = _sequence_share(out, mask)
    if config.veto is not None:
        low = select(x, mask) < math.log(config.veto)
        metrics["rollout_corr/rollout_is_veto_fraction"] = _sequence_share(low, mask)
        metrics["rollout_corr/rollout_is_catastrophic_token_fraction"] = _token_share(low, mask)
    return metrics


def _token_share(chosen: Tensor, mask: Tensor) -> float:
    """Return the share of the unmasked tokens that are chosen."""
    return float(masked_mean(chosen.double(), mask))


def _sequence_share(chosen: Tensor, mask: Tensor) -> float:
    """Return the share, among sequences with any token, of those with a chosen one."""
    held = mask.bool()
    return float((chosen & held).any(-1).sum() / held.any(-1).sum().clamp(min=1))
