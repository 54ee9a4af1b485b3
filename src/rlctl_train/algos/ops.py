"""Operations every algorithm shares: masks, aggregation to a scalar, whitening, KL estimates, safe ratios.

Letters: S sequences, T padded response length. A mask [S, T] is 1 on tokens the model sampled and 0 on
padding and on tokens it did not write. Whatever lies where the mask is 0, NaN included, changes no value
and no gradient.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rlctl_train.config.policy import Aggregation, KlEstimator

MAX_LOG_RATIO = 20.0
"""Log-ratios are held within +-20 nats before `exp`, so that no value and no gradient overflows float32."""
MAX_K3 = 10.0
"""Largest value of the k3 estimate, in nats."""
WHITEN_EPS = 1e-8
"""Added to the variance when values are whitened."""


@dataclass(frozen=True)
class TokenOutputs:
    """What a model says about the response tokens, [S, T] or [S, T, K] each; None where nobody asked."""

    logp: Tensor | None = None
    entropy: Tensor | None = None
    values: Tensor | None = None
    sum_pi_squared: Tensor | None = None
    ref_kl: Tensor | None = None
    """KL(pi || pi_ref) over the whole vocabulary, where the batch has `ref_full_logp` [S, T, V]."""
    full_logp: Tensor | None = None
    """Log-probabilities of the whole vocabulary, [S, T, V]."""
    top_ids: Tensor | None = None
    """The K likeliest tokens."""
    top_logp: Tensor | None = None
    """Log-probabilities of the K likeliest tokens or, where the batch has `teacher_ids` [S, T, K], of those."""


@dataclass(frozen=True)
class Counts:
    """Denominators of one optimizer step, over the whole mini-batch and all ranks."""

    tokens: float
    """Unmasked tokens."""
    sequences: float
    """Sequences with at least one unmasked token."""
    correct_tokens: float = 0.0
    """Unmasked tokens of right responses."""


@dataclass(frozen=True)
class Advantages:
    """What an algorithm computes once a step: advantages [S, T] and, with a critic, its targets [S, T]."""

    advantages: Tensor
    returns: Tensor | None = None


def count(mask: Tensor, correct: Tensor | None = None) -> Counts:
    """Count the unmasked tokens, the sequences that have any, and the tokens of right responses.

    `mask` is [S, T]; `correct` [S] is 1 for right responses and 0 for others, or unset where nobody asks.
    """
    lengths = mask.bool().sum(-1)
    right = 0.0 if correct is None else float(lengths[correct.bool()].sum())
    return Counts(tokens=float(lengths.sum()), sequences=float((lengths > 0).sum()), correct_tokens=right)


def aggregate(values: Tensor, mask: Tensor, mode: Aggregation, counts: Counts, norm: float | None = None) -> Tensor:
    """Reduce per-token values [S, T] of one micro-batch to its share of the step's scalar.

    The sum of the shares over micro-batches and ranks is the result, however the rows were cut. With N
    tokens and B sequences from `counts`, and n_i unmasked tokens in sequence i:

        token-mean               sum / N
        token-sum                sum
        seq-mean-token-sum       sum / B
        seq-mean-token-mean      sum_i (sum_t / n_i) / B
        seq-mean-token-sum-norm  sum / (B * norm), `norm` a constant in tokens (Dr.GRPO, arXiv:2503.20783):
                                 every token weighs the same whatever the length of its response

    A step without any unmasked token gives 0.
    """
    values = select(values, mask)
    num_tokens, num_sequences = max(counts.tokens, 1.0), max(counts.sequences, 1.0)
    match mode:
        case "token-mean":
            return values.sum() / num_tokens
        case "token-sum":
            return values.sum()
        case "seq-mean-token-sum":
            return values.sum() / num_sequences
        case "seq-mean-token-mean":
            lengths = mask.bool().sum(-1).clamp(min=1)
            return (values.sum(-1) / lengths).sum() / num_sequences
        case "seq-mean-token-sum-norm":
            assert norm is not None and norm > 0, "this mode divides by a constant number of tokens"
            return values.sum() / (num_sequences * norm)


def select(values: Tensor, mask: Tensor) -> Tensor:
    """Return values [S, T] where the mask is 1 and 0 elsewhere; elsewhere the gradient is exactly 0 too."""
    return torch.where(mask.bool(), values, torch.zeros((), dtype=values.dtype, device=values.device))


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Average values [S, T] over the unmasked tokens of all sequences."""
    return select(values, mask).sum() / mask.bool().sum().clamp(min=1)


def whiten(values: Tensor, mask: Tensor) -> Tensor:
    """Give values [S, T] mean 0 and variance 1 over all unmasked tokens of the batch; 0 elsewhere.

    The variance divides by the number of tokens less one. Give it the step's whole batch: the statistics of
    a part of it are others.
    """
    centred = select(values - masked_mean(values, mask), mask)
    variance = centred.square().sum() / (mask.bool().sum() - 1).clamp(min=1)
    return centred * torch.rsqrt(variance + WHITEN_EPS)


def reward_to_go(rewards: Tensor, mask: Tensor, gamma: float = 1.0) -> Tensor:
    """Return G_t = r_t + gamma G_next of each token [S, T] in float64, 0 where the mask is 0.

    "Next" is the next token the model wrote: a tool's reply in between is carried over and costs no discount.
    """
    rewards = select(rewards, mask).double()
    if gamma == 1:
        return select(rewards.flip(-1).cumsum(-1).flip(-1), mask)
    columns, written = rewards.t().contiguous(), mask.bool().t().contiguous()
    returns, following = torch.zeros_like(columns), torch.zeros_like(columns[0])
    for t in reversed(range(len(columns))):
        following = returns[t] = torch.where(written[t], columns[t] + gamma * following, following)
    return select(returns.t(), mask)


def log_ratio(logp: Tensor, old_logp: Tensor, mask: Tensor) -> Tensor:
    """Return log pi - log pi_old [S, T] in nats, clamped before anyone takes its `exp`; 0 where masked."""
    return select(logp - old_logp, mask).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def kl_estimate(logp: Tensor, ref_logp: Tensor, estimator: KlEstimator) -> Tensor:
    """Estimate KL(pi || pi_ref) at each sampled token, [S, T] in nats.

    k1, k2 and k3 are those of http://joschu.net/blog/kl-approx.html; a trailing `+` keeps the value and
    takes the gradient of k2, which is the unbiased gradient of the reverse KL.
    """
    if estimator.endswith("+"):
        squared = _estimate(logp, ref_logp, "k2")
        return squared - squared.detach() + _estimate(logp, ref_logp, estimator.removesuffix("+")).detach()
    return _estimate(logp, ref_logp, estimator)


def _estimate(logp: Tensor, ref_logp: Tensor, name: str) -> Tensor:
    difference = logp - ref_logp
    match name:
        case "k1":
            return difference
        case "abs":
            return difference.abs()
        case "k2":
            return 0.5 * difference.square()
        case "k3":
            inverse = (-difference).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
            return (inverse.exp() - inverse - 1).clamp(-MAX_K3, MAX_K3)
    raise AssertionError(f"no KL estimator {name!r}")
