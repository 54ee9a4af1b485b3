"""Covariance of advantage and log-probability, which drives entropy down (Cui et al. 2025, arXiv:2505.22617).

What clip-cov and kl-cov share. Means, counts and choices are over the mini-batch of all ranks, so that they depend
neither on the cut into micro-batches nor on the number of ranks. Letters as in `ops`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlctl_train.algos.objective import Gather
from rlctl_train.algos.ops import select
from rlctl_train.batch import Batch

BITS = 53
"""A draw has as many random bits as float64 holds."""


def alone(values: Tensor) -> Tensor:
    """Gather from one rank that holds everything."""
    return values


def covariances(logp: Tensor, batch: Batch, gather: Gather) -> tuple[Tensor, int]:
    """Return (A - mean A) (logp - mean logp) of each token [S, T], and the number of tokens.

    Both means, and the number, are over the unmasked tokens of all ranks.
    """
    mask = batch["response_mask"]
    advantages, logp = select(batch["advantages"], mask), select(logp, mask)
    own = [values.sum(dtype=torch.float64) for values in (advantages, logp, mask.bool())]
    advantage_sum, logp_sum, num_tokens = gather(torch.stack(own)[None]).sum(0).tolist()
    count = max(num_tokens, 1.0)
    return (advantages - advantage_sum / count) * (logp - logp_sum / count), int(num_tokens)


def highest(scores: Tensor, candidates: Tensor, num: int, batch: Batch, gather: Gather) -> Tensor:
    """Return [S, T], true at the `num` candidates of all ranks with the highest scores; chance parts equal scores."""
    kept = scores[candidates]
    places = candidates.nonzero()
    if len(kept) > num:
        enough = kept >= kept.topk(num).values[-1]
        kept, places = kept[enough], places[enough]
    pairs = torch.stack([kept.double(), random_draws(batch, places)], -1)
    everyone = _first(gather(_first(pairs, num)), num)
    chosen = torch.zeros_like(candidates)
    if len(everyone):
        score, draw = everyone[-1]
        within = (pairs[:, 0] > score) | ((pairs[:, 0] == score) & (pairs[:, 1] >= draw))
        chosen[tuple(places[within].T)] = True
    return chosen


def random_draws(batch: Batch, places: Tensor) -> Tensor:
    """Return a random number in [0, 1) for each of the places (row, token) [N, 2], in float64.

    It follows from the weights that sampled the sequence (`policy_version`), its number in the step (`row`) and the
    token's place alone. A batch without these columns is taken for a whole mini-batch, numbered as it comes.
    """
    rows, tokens = places.T
    if "row" in batch:
        rows = _mix(batch["policy_version"].long()[rows]) ^ batch["row"].long()[rows]
    return _shift(_mix(_mix(rows) + tokens), 64 - BITS).double() / 2**BITS


def _first(pairs: Tensor, num: int) -> Tensor:
    """Return the `num` largest pairs (score, draw) [N, 2], largest first."""
    pairs = pairs[pairs[:, 1].argsort(descending=True)]
    return pairs[pairs[:, 0].argsort(descending=True, stable=True)][:num]


def _mix(numbers: Tensor) -> Tensor:
    """Return well-mixed 64 bits for each integer: a step of SplitMix64 (doi:10.1145/2660193.2660195)."""
    numbers = numbers + _signed(0x9E3779B97F4A7C15)
    numbers = (numbers ^ _shift(numbers, 30)) * _signed(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ _shift(numbers, 27)) * _signed(0x94D049BB133111EB)
    return numbers ^ _shift(numbers, 31)


def _shift(numbers: Tensor, bits: int) -> Tensor:
    """Shift right as if int64 were unsigned."""
    return (numbers >> bits) & ((1 << (64 - bits)) - 1)


def _signed(number: int) -> int:
    """Return the int64 of the same 64 bits."""
    return number - (1 << 64)
