"""What a batch looks like in numbers: scores, rewards, advantages, lengths. Only columns that are there count.

Letters: S sequences, T padded response length. Per-token columns are read where `response_mask` is 1.
"""

from __future__ import annotations

from math import ceil

from torch import Tensor

from rlctl_train.batch import Batch

TOKEN_COLUMNS = ("advantages", "returns", "values")
TAIL = 0.05
"""Share of the sequences, those that end last."""


def batch_metrics(batch: Batch) -> dict[str, float]:
    """Return mean, max and min of each known column.

    Scores, rewards (summed over a response) and lengths are over S sequences; advantages, returns and values
    over the response tokens of all sequences; `response_length/clip_ratio` is the share of sequences that
    ended at the length limit; `perf/tail_share` is the share of generation in which at most `TAIL` of them go on.
    """
    metrics: dict[str, float] = {}
    if "score" in batch:
        metrics |= _spread("critic/score", batch["score"])
    if "rewards" in batch:
        metrics |= _spread("critic/rewards", (batch["rewards"] * batch["response_mask"]).sum(-1))
    for column in TOKEN_COLUMNS:
        if column in batch:
            metrics |= _spread(f"critic/{column}", _response_tokens(batch, column))
    if "teacher_logp" in batch and "old_logp" in batch:
        gaps = _response_tokens(batch, "old_logp") - _response_tokens(batch, "teacher_logp")
        metrics["teacher/reverse_kl"] = float(gaps.mean()) if gaps.numel() else 0.0
    if "values" in batch and "returns" in batch:
        metrics["critic/vf_explained_var"] = _explained_variance(batch)
    for side in ("prompt", "response"):
        if f"{side}_len" in batch:
            metrics |= _spread(f"{side}_length", batch[f"{side}_len"])
    if "truncated" in batch and len(batch):
        metrics["response_length/clip_ratio"] = float(batch["truncated"].float().mean())
    if "seconds" in batch and len(batch) and (longest := float(batch["seconds"].max())):
        most = batch["seconds"].kthvalue(ceil((1 - TAIL) * len(batch))).values
        metrics["perf/tail_share"] = 1.0 - float(most) / longest
    return metrics


def _spread(name: str, values: Tensor) -> dict[str, float]:
    """Return mean, max and min over all elements; nothing when there are none."""
    if not values.numel():
        return {}
    values = values.float()
    return {
        f"{name}/mean": float(values.mean()),
        f"{name}/max": float(values.max()),
        f"{name}/min": float(values.min()),
    }


def _response_tokens(batch: Batch, column: str) -> Tensor:
    return batch[column][batch["response_mask"].bool()]


def _explained_variance(batch: Batch) -> float:
    """Return 1 - var(returns - values) / var(returns) over response tokens; 0 when the returns are all equal."""
    returns, values = _response_tokens(batch, "returns"), _response_tokens(batch, "values")
    spread = float(returns.float().var(correction=0)) if returns.numel() else 0.0
    if spread == 0.0:
        return 0.0
    return 1.0 - float((returns - values).float().var(correction=0)) / spread
