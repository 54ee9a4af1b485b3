"""PRIME, process reinforcement through implicit rewards (Cui et al. 2025, arXiv:2502.01456). Letters as in `ops`.

A language model trained to tell right responses from wrong ones by sum_t q_t, with q_t = beta (log pi_rm - log pi_ref),
thereby learns a reward q_t of every token; nobody labels steps. Its training and the sampling are in
`rlctl_train.flows.prime`.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import softplus

from rlctl_train.algos.groups import Groups, scores
from rlctl_train.algos.ops import Advantages, Counts, TokenOutputs, reward_to_go, select, whiten
from rlctl_train.batch import Batch
from rlctl_train.config.prime import PrimeConfig


class Prime:
    """Advantage of a token: what it and those after it earn, from the reward model and from the task."""

    def __init__(self, config: PrimeConfig) -> None:
        self.config = config

    def advantages(self, batch: Batch) -> Advantages:
        """Return whitened returns and the returns, sum_{u >= t} process_coef q'_u + outcome_coef s'_u, [S, T] each.

        In a group of n, q'_t = (n q_t - sum_j q_j) / (n - 1) with q_j the mean of q over the tokens of response j, and
        s' = (n s - sum_j s_j) / (n - 1) on the last token, 0 before it: the score less the mean of the others'. Reads
        `reward_logp`, `ref_logp`, `rewards`, whose sum is the score s, `response_mask` and `group`. Whitening is over
        all sampled tokens.
        """
        config, mask, groups = self.config, batch["response_mask"], Groups.of(batch)
        others = (groups.sizes() - 1).clamp(min=1)
        process = implicit_rewards(batch["reward_logp"], batch["ref_logp"], mask, config.beta).double()
        means = process.sum(-1) / mask.bool().sum(-1).clamp(min=1)
        score = scores(batch)
        scale, shared = (groups.sizes() / others)[:, None], (groups.sum(means) / others)[:, None]
        rewards = config.process_coef * (process * scale - shared)
        outcome = (groups.sizes() * score - groups.sum(score)) / others
        rewards = rewards + config.outcome_coef * outcome[:, None] * is_last(mask)
        returns = reward_to_go(rewards, mask)
        dtype = batch["rewards"].dtype
        return Advantages(whiten(returns, mask).to(dtype), returns.to(dtype))


class OutcomeObjective:
    """Cross-entropy of right and wrong against the sigmoid of the summed implicit reward; the mean over responses."""

    needs_entropy = False

    def __init__(self, config: PrimeConfig) -> None:
        self.beta = config.beta

    def __call__(self, outputs: TokenOutputs, micro: Batch, counts: Counts) -> tuple[Tensor, dict[str, Tensor]]:
        """Read `ref_logp`, `correct` [S] and `response_mask`; return shares of the mini-batch's loss and metrics."""
        assert outputs.logp is not None, "the reward model answers with log-probabilities"
        mask, right = micro["response_mask"], micro["correct"].to(outputs.logp.dtype)
        logits = implicit_rewards(outputs.logp, micro["ref_logp"], mask, self.beta).sum(-1)
        written = mask.bool().any(-1)
        num_sequences = max(counts.sequences, 1.0)
        loss = select(softplus(logits) - right * logits, written).sum() / num_sequences
        told = select(((logits > 0) == right.bool()).to(logits.dtype), written).sum() / num_sequences
        return loss, {"reward_model/loss": loss.detach(), "reward_model/accuracy": told.detach()}


def implicit_rewards(logp: Tensor, ref_logp: Tensor, mask: Tensor, beta: float) -> Tensor:
    """Return q_t = beta (log pi_rm - log pi_ref) of each token, [S, T], 0 where masked."""
    return beta * select(logp - ref_logp, mask)


def is_last(mask: Tensor) -> Tensor:
    """Return 1 at the last token that the model wrote of each response and 0 elsewhere, [S, T] in float64."""
    after = mask.bool().flip(-1).cumsum(-1).flip(-1)
    return (mask.bool() & (after == 1)).double()
