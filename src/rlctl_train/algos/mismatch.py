"""How far trainer and rollout disagree on the same tokens, in numbers. Letters as in `ops`.

x is the log-ratio log pi_trainer - log pi_rollout of a sampled token, as in `correction`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlctl_train.algos.correction import correct, importance_weights, level_ratio
from rlctl_train.algos.ops import MAX_LOG_RATIO, select
from rlctl_train.batch import Batch
from rlctl_train.config.correction import ImportanceWeights, RolloutCorrection

Metrics = dict[str, float]


def rollout_correction(batch: Batch, config: RolloutCorrection | None) -> tuple[dict[str, Tensor], Metrics]:
    """Return the columns by which an update is corrected, and how far trainer and rollout are apart.

    Reads `old_logp`, `rollout_logp` and `response_mask` of the step's whole batch; without `old_logp` there is nothing
    to compare. A bypass corrects itself in the update. Without weights, those of plain truncation are described.
    """
    if "old_logp" not in batch:
        return {}, {}
    old, rollout, mask = batch["old_logp"], batch["rollout_logp"], batch["response_mask"]
    weights = ImportanceWeights() if config is None or config.weights is None else config.weights
    metrics = mismatch(old, rollout, mask) | weight_metrics(old, rollout, mask, weights)
    if config is None or config.mode == "bypass":
        return {}, metrics
    made = correct(old, rollout, mask, config)
    columns = {"kept_mask": made.mask} | ({} if made.weights is None else {"rollout_weights": made.weights})
    return columns, metrics | made.metrics


def mismatch(logp: Tensor, rollout_logp: Tensor, mask: Tensor) -> Metrics:
    """Compare the trainer's and the rollout engine's log-probabilities [S, T] over a step's whole batch.

    Means are over the N unmasked tokens, those of perplexities and `chi2_seq` over the B sequences that have any; a
    sequence's perplexity is exp of the mean of its tokens' negative log-probabilities. Nothing unmasked gives nothing.
    """
    held = mask.bool()
    if not bool(held.any()):
        return {}
    ours, theirs = select(logp, mask).double(), select(rollout_logp, mask).double()
    return _gaps(ours[held], theirs[held]) | _perplexities(ours, theirs, held) | _divergences(ours - theirs, held)


def token_mismatch(logp: Tensor, rollout_logp: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Return the parts of `mismatch` that are means over tokens, before the mean: [S, T] each."""
    x = select((logp - rollout_logp).detach(), mask)
    ratio = x.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    return {
        "health/logprob_gap_mean": x.abs(),
        "training/rollout_probs_diff_mean": (logp.detach().exp() - rollout_logp.exp()).abs(),
        "rollout_corr/kl": -x,
        "rollout_corr/k3_kl": ratio - 1 - x,
        "rollout_corr/chi2_token": ratio.square() - 1,
    }


def weight_metrics(logp: Tensor, rollout_logp: Tensor, mask: Tensor, config: ImportanceWeights) -> Metrics:
    """Describe importance weights, before they are normalised, over the unmasked tokens; none gives nothing.

    The effective sample size is 1 / mean((w / mean w)^2), a share of the tokens. The shares beyond the bounds are of
    the ratios before they were bounded; without a lower bound they are compared with 1 / upper.
    """
    held = mask.bool()
    if not bool(held.any()):
        return {}
    x = select(logp - rollout_logp, mask)
    w = importance_weights(x, mask, config)[held].double()
    raw = level_ratio(x, mask, config)[held]
    lower = 1 / config.upper if config.lower is None else config.lower
    square = w.square().mean()
    values = {
        "rollout_corr/rollout_is_mean": w.mean(),
        "rollout_corr/rollout_is_std": w.std(correction=0),
        "rollout_corr/rollout_is_min": w.min(),
        "rollout_corr/rollout_is_max": w.max(),
        "rollout_corr/rollout_is_eff_sample_size": w.mean().square() / square if square > 0 else square,
        "rollout_corr/rollout_is_ratio_fraction_high": (raw > config.upper).double().mean(),
        "rollout_corr/rollout_is_ratio_fraction_low": (raw < lower).double().mean(),
    }
    return {name: float(value) for name, value in values.items()}


def _gaps(ours: Tensor, theirs: Tensor) -> Metrics:
    """Compare log-probabilities [N] in nats, and probabilities."""
    gap, apart = (ours - theirs).abs(), (ours.exp() - theirs.exp()).abs()
    metrics = {
        "health/logprob_gap": gap.max(),
        "health/logprob_gap_mean": gap.mean(),
        "training/rollout_probs_diff_mean": apart.mean(),
        "training/rollout_probs_diff_max": apart.max(),
        "training/rollout_probs_diff_std": apart.std(correction=0),
        "training/rollout_actor_probs_pearson_corr": _correlation(ours.exp(), theirs.exp()),
    }
    return {name: float(value) for name, value in metrics.items()}


def _correlation(a: Tensor, b: Tensor) -> Tensor:
    """Return Pearson's correlation of two vectors [N]; 1 where either is constant."""
    a, b = a - a.mean(), b - b.mean()
    scale = a.norm() * b.norm()
    return torch.where(scale > 0, (a * b).sum() / scale.clamp(min=1e-300), 1.0)


def _perplexities(ours: Tensor, theirs: Tensor, held: Tensor) -> Metrics:
    lengths = held.sum(-1)
    rows = lengths > 0
    training, rollout = (-(v[rows].sum(-1) / lengths[rows]).clamp(min=-MAX_LOG_RATIO) for v in (ours, theirs))
    apart = training - rollout
    metrics = {
        "rollout_corr/training_ppl": training.exp().mean(),
        "rollout_corr/rollout_ppl": rollout.exp().mean(),
        "rollout_corr/log_ppl_diff": apart.mean(),
        "rollout_corr/log_ppl_abs_diff": apart.abs().mean(),
        "rollout_corr/log_ppl_diff_max": apart.max(),
        "rollout_corr/log_ppl_diff_min": apart.min(),
        "rollout_corr/ppl_ratio": apart.exp().mean(),
    }
    return {name: float(value) for name, value in metrics.items()}


def _divergences(x: Tensor, held: Tensor) -> Metrics:
    """Estimate KL(pi_rollout || pi_trainer) in nats and the chi-square divergence, from tokens of pi_rollout."""
    near = x.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    whole = x.sum(-1)[held.any(-1)].clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    metrics = {
        "rollout_corr/kl": -x[held].mean(),
        "rollout_corr/k3_kl": (near.exp() - 1 - near)[held].mean(),
        "rollout_corr/chi2_token": near[held].mul(2).exp().mean() - 1,
        "rollout_corr/chi2_seq": whole.mul(2).exp().mean() - 1,
    }
    return {name: float(value) for name, value in metrics.items()}
