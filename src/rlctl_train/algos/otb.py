"""The optimal token baseline and its multi-turn form (Li et al. 2026, arXiv:2602.07078). Letters as in `ops`."""

from __future__ import annotations

import torch
from torch import Tensor

from rlctl_train.algos.groups import Groups
from rlctl_train.algos.ops import Advantages, reward_to_go, select
from rlctl_train.batch import Batch
from rlctl_train.config.critic_free import OtbConfig

WEIGHT_EPS = 1e-8
"""Added to the sum of weights before something is divided by it."""


class Otb:
    """Advantage of a token: its return less the group's baseline of least variance at that token.

    The baseline weighs each response by the energy it has spent so far: the squared norm of the gradient of its
    log-probability in the logits, summed over its tokens up to this one.
    """

    def __init__(self, config: OtbConfig) -> None:
        self.config = config

    def advantages(self, batch: Batch) -> Advantages:
        """Return G - b and the returns G, [S, T] each.

        Reads `rewards`, `response_mask`, `group`, `old_logp` and `sum_pi_squared` [S, T], the sum over the vocabulary
        of squared probabilities. With G_t the sum of rewards from t on, and W_t the sum up to t of the energies
        1 - 2 pi(y_u) + sum_v pi(v)^2, b_t = sum_j G_jt W_jt / (sum_j W_jt + 1e-8) over the responses of the group
        that have a token t. Where the longest response goes on alone, beyond the second longest, b is 0. With
        `multi_turn` t counts sampled tokens only. Energies are times the square of `rollout_weights` [S, T], if any.
        A group of one gives 0.
        """
        mask, groups, dtype = batch["response_mask"], Groups.of(batch), batch["rewards"].dtype
        returns = reward_to_go(batch["rewards"], mask)
        energy = select(1 - 2 * batch["old_logp"].exp() + batch["sum_pi_squared"], mask).double()
        if "rollout_weights" in batch:
            energy = energy * select(batch["rollout_weights"], mask).square()
        order = _written_first(mask) if self.config.multi_turn else None
        baseline = _baseline(_take(returns, order), _take(energy, order), _take(mask, order).bool(), groups)
        advantages = select(returns - _put_back(baseline, order), mask)
        alone = (groups.sizes() == 1)[:, None]
        return Advantages(torch.where(alone, 0.0, advantages).to(dtype), returns.to(dtype))


def _baseline(returns: Tensor, energy: Tensor, written: Tensor, groups: Groups) -> Tensor:
    """Return b of each token [S, T]; what is beyond the group's second longest response is 0."""
    weights = torch.where(written, energy.cumsum(-1), 0.0)
    baseline = groups.sum(returns * weights) / (groups.sum(weights) + WEIGHT_EPS)
    places = torch.arange(1, written.shape[1] + 1, device=written.device, dtype=torch.float64)
    ends = (written * places).amax(-1)
    return torch.where(places <= groups.runner_up(ends)[:, None], baseline, 0.0)


def _written_first(mask: Tensor) -> Tensor:
    """Return places [S, T] in the order in which sampled tokens, as they come, precede everything else."""
    return (~mask.bool()).int().argsort(dim=1, stable=True)


def _take(values: Tensor, order: Tensor | None) -> Tensor:
    return values if order is None else values.gather(1, order)


def _put_back(values: Tensor, order: Tensor | None) -> Tensor:
    return values if order is None else torch.zeros_like(values).scatter(1, order, values)
