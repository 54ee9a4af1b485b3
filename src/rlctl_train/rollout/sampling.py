"""From logits to tokens: one uniform number per (row, position), inverse distribution function.

n active rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from rlctl_train.rollout.base import Sampling

_WORD = (1 << 64) - 1


def uniforms(seed: int, rows: Sequence[int], num_positions: int) -> Tensor:
    """Return uniform numbers in [0, 1), [S, num_positions] float32.

    From Philox (Salmon et al. 2011), keyed by (seed, row): a row's numbers depend on the seed and the row number alone.
    """
    out = np.empty((len(rows), num_positions), dtype=np.float32)
    for i, row in enumerate(rows):
        key = np.array([seed & _WORD, row & _WORD], dtype=np.uint64)
        np.random.Generator(np.random.Philox(key=key)).random(dtype=np.float32, out=out[i])
    return torch.from_numpy(out)


def pick(logits: Tensor, uniform: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Return sampled tokens [n] and their log-probabilities [n], for logits [n, V] and uniform numbers [n].

    Log-probabilities are the log-softmax of logits / temperature before top-k and top-p (temperature 1 when greedy).
    """
    scaled = logits.float()
    if sampling.temperature not in (0.0, 1.0):
        scaled = scaled / sampling.temperature
    logp = scaled.log_softmax(-1)
    if sampling.temperature == 0.0:
        tokens = logp.argmax(-1)
    elif sampling.top_k or sampling.top_p < 1.0:
        tokens = _pick_truncated(logp, uniform, sampling)
    else:
        tokens = _invert(logp.exp(), uniform)
    return tokens, logp.gather(-1, tokens[:, None])[:, 0]


def _pick_truncated(logp: Tensor, uniform: Tensor, sampling: Sampling) -> Tensor:
    """Sample among the top k tokens, and of these among the smallest set that holds top_p of their probability."""
    num_kept = min(sampling.top_k or logp.shape[-1], logp.shape[-1])
    kept, ids = logp.topk(num_kept, dim=-1)
    probs = kept.softmax(-1)
    # A token stays when those before it hold less than top_p: the first always does.
    probs = probs * (probs.cumsum(-1) - probs < sampling.top_p)
    return ids.gather(-1, _invert(probs, uniform)[:, None])[:, 0]


def _invert(probs: Tensor, uniform: Tensor) -> Tensor:
    """Return for each row the first index whose cumulated probability exceeds uniform times the total.

    Strictly exceeds, so a token of probability zero is never taken.
    """
    cumulated = probs.cumsum(-1)
    target = uniform[:, None] * cumulated[:, -1:]
    # A row of NaN finds no index: the clamp keeps it legal, its log-probability tells.
    return torch.searchsorted(cumulated, target, right=True)[:, 0].clamp_(max=probs.shape[-1] - 1)
