"""KL penalty inside the reward, with a fixed or an adaptive coefficient. Letters as in `ops`."""

from __future__ import annotations

from torch import Tensor

from rlctl_train.algos.ops import kl_estimate, select
from rlctl_train.batch import Batch
from rlctl_train.config.policy import AdaptiveKl, FixedKl

MAX_ERROR = 0.2
"""The adaptive controller reacts to at most this relative error."""


class KlController:
    """Holds the coefficient of the penalty; `coef` is the current one."""

    def __init__(self, config: FixedKl | AdaptiveKl) -> None:
        self.config = config
        self.coef = config.coef

    def apply(self, batch: Batch) -> tuple[Tensor, float]:
        """Return rewards [S, T] less coef times KL, and the mean KL of a sequence in nats.

        Reads `rewards`, `old_logp`, `ref_logp`, `response_mask`. A sequence's KL is the sum over its
        sampled tokens; the mean is over the sequences that have any.
        """
        mask = batch["response_mask"]
        kl = select(kl_estimate(batch["old_logp"], batch["ref_logp"], self.config.estimator), mask)
        num_sequences = max(int(mask.bool().any(-1).sum()), 1)
        return select(batch["rewards"], mask) - self.coef * kl, float(kl.sum()) / num_sequences

    def update(self, kl: float, num_sequences: int) -> None:
        """Move an adaptive coefficient after a step of mean sequence KL `kl` (arXiv:1909.08593, 2.2)."""
        if isinstance(self.config, AdaptiveKl):
            error = min(max(kl / self.config.target - 1, -MAX_ERROR), MAX_ERROR)
            self.coef *= 1 + error * num_sequences / self.config.horizon

    def state(self) -> dict[str, float]:
        """Return what a checkpoint must hold."""
        return {"coef": self.coef}

    def load_state(self, state: dict[str, float]) -> None:
        """Continue from a checkpoint's state."""
        self.coef = state["coef"]
