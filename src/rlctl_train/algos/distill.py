"""On-policy distillation (Agarwal et al. 2023, arXiv:2306.13649). Letters as in `ops`, and K candidate tokens.

The student samples; the teacher, with probabilities nu, judges every token that the student, with probabilities pi,
wrote. Both divide their logits by the sampling temperature.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlctl_train.algos.groups import Groups, on_every_token, scores
from rlctl_train.algos.ops import Advantages, reward_to_go, select
from rlctl_train.batch import Batch
from rlctl_train.config.distill import DistillConfig, SampledSignal


class Distill:
    """Advantage of a token: what the teacher thinks of it, and of its response what the task does."""

    def __init__(self, config: DistillConfig) -> None:
        self.config = config

    def advantages(self, batch: Batch) -> Advantages:
        """Return coef sum_{u >= t} gamma^(u - t) (log nu(y_u) - log pi(y_u)) + task_coef A_task, [S, T].

        With gamma 0 its policy gradient descends the reverse KL, KL(pi || nu), at each token. Reads `teacher_logp`,
        `old_logp`, `response_mask`, and for the task's part `rewards` and `group`: the score less its group's mean,
        over the standard deviation plus 1e-6. With the top-k signal the teacher's part is in the loss instead.
        """
        config, mask = self.config, batch["response_mask"]
        total = torch.zeros_like(batch["rewards"])
        if isinstance(config.signal, SampledSignal):
            total = total + config.coef * reward_to_go(log_gap(batch), mask, config.signal.gamma).to(total.dtype)
        if config.task_coef > 0:
            against = Groups.of(batch).normalized(scores(batch))
            total = total + config.task_coef * on_every_token(against, batch)
        return Advantages(total)


def log_gap(batch: Batch) -> Tensor:
    """Return log nu(y_t) - log pi(y_t) [S, T] in nats, 0 where masked; minus its mean estimates the reverse KL."""
    return select(batch["teacher_logp"] - batch["old_logp"], batch["response_mask"])


def top_k_kl(logp: Tensor, teacher_logp: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return sum_k nu_k (log nu_k - log pi_k) and sum_k nu_k of each token, [S, T] each, 0 where masked.

    `logp` and `teacher_logp` are [S, T, K], both of the teacher's K likeliest tokens. With K the whole vocabulary this
    is the forward KL; with fewer the rest of the distribution is left out, and the sum may be below 0.
    """
    keep = mask[..., None]
    log_nu, log_pi = select(teacher_logp, keep), select(logp, keep)
    nu = select(log_nu.exp(), keep)
    return (nu * (log_nu - log_pi)).sum(-1), nu.sum(-1)
