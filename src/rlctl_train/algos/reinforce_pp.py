"""REINFORCE++ and its form with a group baseline (Hu et al. 2025, arXiv:2501.03262). Letters as in `ops`."""

from __future__ import annotations

from rlctl_train.algos.groups import Groups, scores
from rlctl_train.algos.ops import Advantages, reward_to_go, whiten
from rlctl_train.batch import Batch
from rlctl_train.config.critic_free import ReinforcePpBaselineConfig, ReinforcePpConfig


class ReinforcePp:
    """Advantage of a token: its return against those of the whole batch."""

    def __init__(self, config: ReinforcePpConfig) -> None:
        self.config = config

    def advantages(self, batch: Batch) -> Advantages:
        """Return whiten(G) with G_t = r_t + gamma G_next, and G itself, [S, T] each.

        Reads `rewards` and `response_mask`. "Next" is the next token the model wrote; the return passes through a
        tool's reply in between. Whitening is over all sampled tokens of the batch.
        """
        mask = batch["response_mask"]
        returns = reward_to_go(batch["rewards"], mask, self.config.gamma)
        dtype = batch["rewards"].dtype
        return Advantages(whiten(returns, mask).to(dtype), returns.to(dtype))


class ReinforcePpBaseline:
    """Advantage of a response: its score less its group's mean, against those of the whole batch."""

    def __init__(self, config: ReinforcePpBaselineConfig) -> None:
        self.config = config

    def advantages(self, batch: Batch) -> Advantages:
        """Return, on every token [S, T], whiten(score - group mean) over all sampled tokens of the batch.

        Reads `rewards`, `response_mask` and `group`. A group of one gives 0 before whitening.
        """
        mask, values = batch["response_mask"], scores(batch)
        centred = values - Groups.of(batch).mean(values)
        whitened = whiten(centred[:, None].expand(mask.shape), mask)
        return Advantages(whitened.to(batch["rewards"].dtype))
