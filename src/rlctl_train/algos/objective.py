"""Objectives: from what a model says about one micro-batch to the loss that is differentiated.

Each is a callable `(outputs, micro, counts) -> (loss, metrics)`. Loss and metrics are shares: their sum over
micro-batches and ranks is the value for the mini-batch. Letters as in `ops`.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from rlctl_train.algos.ops import Counts, TokenOutputs, aggregate, kl_estimate, select
from rlctl_train.batch import Batch
from rlctl_train.config.algo import RlConfig
from rlctl_train.config.policy import ActorCritic

Shares = tuple[Tensor, dict[str, Tensor]]


class PolicyLoss(Protocol):
    """A policy loss, before it is aggregated."""

    def __call__(self, logp: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return loss and metrics of each token, [S, T]."""
        ...


class PolicyObjective:
    """Policy loss, less the entropy bonus, plus the KL loss, each aggregated by `algo.aggregation`.

    Metrics are means over tokens, except `actor/pg_loss` and `actor/kl_loss`, which are aggregated as the
    loss is.
    """

    def __init__(self, loss: PolicyLoss, config: RlConfig, max_response_tokens: int) -> None:
        self.loss = loss
        self.config = config
        self.norm = config.aggregation_norm or float(max_response_tokens)
        self.needs_entropy = config.entropy_coef != 0

    def __call__(self, outputs: TokenOutputs, micro: Batch, counts: Counts) -> Shares:
        """Read `old_logp`, `advantages`, `response_mask` and, for the KL loss, `ref_logp`.

        A batch without `old_logp` is on-policy: the old policy is the one that is differentiated.
        """
        config, mask = self.config, micro["response_mask"]
        assert outputs.logp is not None, "a policy objective needs log-probabilities"
        on_policy = "old_logp" not in micro
        if on_policy:
            micro = micro.with_columns(old_logp=outputs.logp.detach())

        def total(values: Tensor) -> Tensor:
            return aggregate(values, mask, config.aggregation, counts, self.norm)

        token_loss, token_metrics = self.loss(outputs.logp, micro)
        loss = total(token_loss)
        metrics = {"actor/pg_loss": loss.detach(), **_token_means(token_metrics, mask, counts)}
        if self.needs_entropy:
            assert outputs.entropy is not None, "an entropy bonus needs entropies"
            loss = loss - config.entropy_coef * total(outputs.entropy)
        if on_policy and "rollout_logp" in micro:
            gap = (outputs.logp - micro["rollout_logp"]).abs()
            metrics |= _token_means({"health/logprob_gap_mean": gap}, mask, counts)
        if outputs.entropy is not None:
            metrics |= _token_means({"actor/entropy": outputs.entropy}, mask, counts)
        if config.kl_loss_coef > 0:
            kl = total(self._kl(outputs.logp, micro))
            loss = loss + config.kl_loss_coef * kl
            metrics["actor/kl_loss"] = kl.detach()
        return loss, metrics

    def _kl(self, logp: Tensor, micro: Batch) -> Tensor:
        mask = micro["response_mask"]
        return kl_estimate(select(logp, mask), select(micro["ref_logp"], mask), self.config.kl_loss_estimator)


class ValueObjective:
    """Clipped squared error of the critic against `returns`; always the mean over tokens.

    With V_clip = V held within `value_clip` of the rollout's value, the loss is half of max((V - R)^2,
    (V_clip - R)^2).
    """

    def __init__(self, config: ActorCritic) -> None:
        self.value_clip = config.value_clip

    def __call__(self, outputs: TokenOutputs, micro: Batch, counts: Counts) -> Shares:
        """Read `values` (those of the rollout), `returns` and `response_mask`."""
        assert outputs.values is not None, "a value objective needs values"
        mask = micro["response_mask"]
        values, old, returns = (select(v, mask) for v in (outputs.values, micro["values"], micro["returns"]))
        near = values.clamp(old - self.value_clip, old + self.value_clip)
        free, clipped = (values - returns).square(), (near - returns).square()
        loss = aggregate(0.5 * torch.maximum(free, clipped), mask, "token-mean", counts)
        metrics = {"critic/vf_clipfrac": (clipped > free).to(values.dtype), "critic/vpred_mean": values}
        return loss, {"critic/vf_loss": loss.detach(), **_token_means(metrics, mask, counts)}


class SupervisedObjective:
    """Cross-entropy, the mean over completion tokens."""

    needs_entropy = False

    def __call__(self, outputs: TokenOutputs, micro: Batch, counts: Counts) -> Shares:
        """Read `response_mask`."""
        assert outputs.logp is not None, "a supervised objective needs log-probabilities"
        loss = aggregate(-outputs.logp, micro["response_mask"], "token-mean", counts)
        return loss, {"train/loss": loss.detach()}


def _token_means(metrics: dict[str, Tensor], mask: Tensor, counts: Counts) -> dict[str, Tensor]:
    """Return each metric's share of its mean over the unmasked tokens."""
    return {name: aggregate(value.detach(), mask, "token-mean", counts) for name, value in metrics.items()}
