"""Objectives: from what a model says about one micro-batch to the loss that is differentiated.

Each is a callable `(outputs, micro, counts) -> (loss, metrics)`. Loss and metrics are shares: their sum over
micro-batches and ranks is the value for the mini-batch. Letters as in `ops`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from rlctl_train.algos.correction import bypassed
from rlctl_train.algos.distill import top_k_kl
from rlctl_train.algos.mismatch import token_mismatch
from rlctl_train.algos.ops import Counts, TokenOutputs, aggregate, kl_estimate, select
from rlctl_train.batch import Batch
from rlctl_train.config.actor_critic import VapoConfig
from rlctl_train.config.algo import RlConfig
from rlctl_train.config.distill import DistillConfig
from rlctl_train.config.policy import ActorCritic

Shares = tuple[Tensor, dict[str, Tensor]]
Gather = Callable[[Tensor], Tensor]
"""Returns the rows [n, K] that each rank gives, one below the other, [sum of n, K]."""
NO_ROWS = Batch(
    {name: torch.zeros(0, 1) for name in ("response_mask", "old_logp", "ref_logp", "advantages")}
    | {name: torch.zeros(0, dtype=torch.long) for name in ("group", "row", "policy_version")}
)
"""What a rank without rows brings to statistics."""


class PolicyLoss(Protocol):
    """A policy loss, before it is aggregated."""

    def __call__(self, logp: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return loss and metrics of each token, [S, T]."""
        ...


class WholeBatchLoss(ABC):
    """A policy loss that must know the mini-batch of all ranks before it can judge a part of it.

    The engine makes a pass without gradients over the mini-batch, gives the log-probabilities to `statistics`, and adds
    the columns that come back to the batch before it is cut into micro-batches.
    """

    columns: ClassVar[tuple[str, ...]]
    """What `statistics` returns."""

    @abstractmethod
    def statistics(self, logp: Tensor, batch: Batch, gather: Gather) -> dict[str, Tensor]:
        """Return further columns for this rank's rows, from their logp [S, T] and what `gather` brings from others."""

    @abstractmethod
    def __call__(self, logp: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return loss and metrics of each token, [S, T]."""


class PolicyObjective:
    """Policy loss, less the entropy bonus, plus the KL loss, each aggregated by `algo.aggregation`.

    VAPO adds the loss on right responses, distillation by a teacher's likeliest tokens their KL. Metrics are means over
    tokens, except `actor/pg_loss`, `actor/kl_loss` and `actor/teacher_kl`, which are aggregated as the loss is.
    """

    def __init__(
        self, loss: PolicyLoss, config: RlConfig, max_response_tokens: int, entropy_coef: float | None = None
    ) -> None:
        """`entropy_coef` is the factor on the entropy bonus now; unset takes that of the configuration."""
        self.loss = loss
        self.config = config
        self.norm = config.aggregation_norm or float(max_response_tokens)
        self.entropy_coef = config.entropy_coef if entropy_coef is None else entropy_coef
        self.needs_entropy = self.entropy_coef != 0
        self.needs_statistics = isinstance(loss, WholeBatchLoss)

    def statistics(self, logp: Tensor, batch: Batch, gather: Gather) -> dict[str, Tensor]:
        """Return the columns that the loss asks to know about the whole mini-batch; collective, also without rows."""
        assert isinstance(self.loss, WholeBatchLoss), "this loss asks for no statistics"
        if not len(batch):
            return self.loss.statistics(NO_ROWS["old_logp"], NO_ROWS, gather)
        assert "row" in batch, "chance must know which sequence a row is"
        if self.config.correction is not None and self._is_bypass:
            batch = bypassed(logp, batch, self.config.correction)
        elif "old_logp" not in batch:
            batch = batch.with_columns(old_logp=logp)
        return self.loss.statistics(logp, batch, gather)

    def __call__(self, outputs: TokenOutputs, micro: Batch, counts: Counts) -> Shares:
        """Read `old_logp`, `advantages`, `response_mask`, for an estimated KL loss `ref_logp`, and `rollout_weights` if
        any.

        A batch without `old_logp` is on-policy: the old policy is the one that is differentiated.
        """
        assert outputs.logp is not None, "a policy objective needs log-probabilities"
        if isinstance(self.loss, WholeBatchLoss):
            assert set(self.loss.columns) <= set(micro.columns), "the loss was not told of the whole mini-batch"
        config, gaps = self.config, {}
        if "old_logp" not in micro or self._is_bypass:
            micro, gaps = self._against_rollout(outputs.logp.detach(), micro, counts)
        mask = micro["response_mask"]

        def total(values: Tensor) -> Tensor:
            return aggregate(values, mask, config.aggregation, counts, self.norm)

        token_loss, token_metrics = self.loss(outputs.logp, micro)
        if "rollout_weights" in micro:
            token_loss = token_loss * micro["rollout_weights"]
        loss = total(token_loss)
        metrics = gaps | {"actor/pg_loss": loss.detach(), **_token_means(token_metrics, mask, counts)}
        if self.needs_entropy:
            assert outputs.entropy is not None, "an entropy bonus needs entropies"
            loss = loss - self.entropy_coef * total(outputs.entropy)
        if outputs.entropy is not None:
            metrics |= _token_means({"actor/entropy": outputs.entropy}, mask, counts)
        if config.kl_loss_coef > 0:
            kl = total(self._kl(outputs, micro))
            loss = loss + config.kl_loss_coef * kl
            metrics["actor/kl_loss"] = kl.detach()
        if isinstance(config, VapoConfig) and config.lm_coef > 0:
            lm = _right_responses_loss(outputs.logp, micro, counts)
            loss = loss + config.lm_coef * lm
            metrics["actor/lm_loss"] = lm.detach()
        if isinstance(config, DistillConfig) and outputs.top_logp is not None:
            kl, mass = top_k_kl(outputs.top_logp, micro["teacher_top_logp"], mask)
            taught = total(kl)
            loss = loss + config.coef * taught
            metrics |= {"actor/teacher_kl": taught.detach(), **_token_means({"actor/teacher_mass": mass}, mask, counts)}
        return loss, metrics

    def _against_rollout(self, logp: Tensor, micro: Batch, counts: Counts) -> tuple[Batch, dict[str, Tensor]]:
        """Return what the loss reads where no log-probabilities were computed before the update, and their gaps.

        The old policy is then this very one or, with `algo.correction.mode=bypass`, the rollout engine's. What a
        bypass rejects leaves every loss but not the counts, which are fixed before.
        """
        mask, metrics = micro["response_mask"], {}
        if "rollout_logp" in micro:
            metrics = token_mismatch(logp, micro["rollout_logp"], mask)
        if self.config.correction is None or not self._is_bypass:
            micro = micro.with_columns(old_logp=logp)
        else:
            micro = bypassed(logp, micro, self.config.correction)
            metrics["rollout_corr/rollout_rs_masked_fraction"] = mask - micro["response_mask"]
            if "rollout_weights" in micro:
                metrics["rollout_corr/rollout_is_mean"] = micro["rollout_weights"]
        return micro, _token_means(metrics, mask, counts)

    @property
    def _is_bypass(self) -> bool:
        return self.config.correction is not None and self.config.correction.mode == "bypass"

    def _kl(self, outputs: TokenOutputs, micro: Batch) -> Tensor:
        """Return the KL of each token to the reference, [S, T] in nats, at the states that were sampled."""
        estimator, mask = self.config.kl_loss_estimator, micro["response_mask"]
        if estimator == "full":
            assert outputs.ref_kl is not None, "the whole KL is the engine's to compute"
            return outputs.ref_kl
        assert outputs.logp is not None
        return kl_estimate(select(outputs.logp, mask), select(micro["ref_logp"], mask), estimator)


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


def _right_responses_loss(logp: Tensor, micro: Batch, counts: Counts) -> Tensor:
    """Return the share of the mean negative log-likelihood over the tokens of right responses (arXiv:2504.05118).

    Reads `correct` [S], 1 or 0, and `response_mask`.
    """
    right = micro["response_mask"] * micro["correct"][:, None]
    return aggregate(-logp, right, "token-mean", Counts(counts.correct_tokens, counts.sequences))


def _token_means(metrics: dict[str, Tensor], mask: Tensor, counts: Counts) -> dict[str, Tensor]:
    """Return each metric's share of its mean over the unmasked tokens."""
    return {name: aggregate(value.detach(), mask, "token-mean", counts) for name, value in metrics.items()}
