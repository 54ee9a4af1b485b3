"""Policy losses: how the gap between the old and the current policy is held. Formulas are in `rlctl_train.algos`."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat

from rlctl_train.config.base import Choices, Config

DIVERGENCES = Choices(
    {
        "tv": "difference of the probabilities",
        "kl": "KL divergence between drawing the token and drawing any other, old policy first",
    }
)


class PolicyLoss(Config):
    """What every policy loss has."""

    reads_ahead: ClassVar[bool] = False
    """Whether the loss must know the whole mini-batch, which the update then reads once before, without gradients."""


class ClipLoss(PolicyLoss):
    """The clipped ratio of PPO, with dual clip (arXiv:1707.06347, arXiv:1912.09729)."""

    type: Literal["clip"] = "clip"
    clip_low: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Lower clip: the probability ratio is held above 1 - clip_low."""
    clip_high: PositiveFloat = 0.2
    """Upper clip: the probability ratio is held below 1 + clip_high."""
    dual_clip: Annotated[float, Field(gt=1)] | None = 3.0
    """Bound on the loss of tokens with negative advantage, as a multiple of the advantage; unset turns it off."""


class GspoLoss(PolicyLoss):
    """Group sequence policy optimisation: the clipped ratio of whole sequences (arXiv:2507.18071)."""

    type: Literal["gspo"] = "gspo"
    clip_low: Annotated[float, Field(gt=0, lt=1)] = 3e-4
    """Lower clip: the length-normalised ratio of a sequence is held above 1 - clip_low."""
    clip_high: PositiveFloat = 4e-4
    """Upper clip: the length-normalised ratio of a sequence is held below 1 + clip_high."""


class SapoLoss(PolicyLoss):
    """Soft adaptive policy optimisation: a smooth gate in place of the clip (arXiv:2511.20347)."""

    type: Literal["sapo"] = "sapo"
    tau_pos: PositiveFloat = 1.0
    """Steepness of the gate for tokens with positive advantage."""
    tau_neg: PositiveFloat = 1.05
    """Steepness of the gate for the other tokens, whose gradient is to fade sooner."""


class GpgLoss(PolicyLoss):
    """Group policy gradient: the plain policy gradient without a ratio (arXiv:2504.02546)."""

    type: Literal["gpg"] = "gpg"


class CispoLoss(PolicyLoss):
    """The policy gradient with a clipped importance weight that keeps every token (arXiv:2506.13585)."""

    type: Literal["cispo"] = "cispo"
    clip_low: PositiveFloat = 1.0
    """Lower clip: the weight is held above 1 - clip_low; 1 and more set no lower bound, as in the paper."""
    clip_high: PositiveFloat = 0.2
    """Upper clip: the weight is held below 1 + clip_high.

    The paper tunes it and names no value; ScaleRL (arXiv:2510.13786) finds weights of at most 4, 5 and 8 alike."""


class ClipCovLoss(PolicyLoss):
    """The clipped ratio less a few tokens of high covariance, drawn at random (arXiv:2505.22617).

    Costs a forward pass of the mini-batch: covariances are against the means of all its tokens."""

    reads_ahead: ClassVar[bool] = True

    type: Literal["clip_cov"] = "clip_cov"
    clip_low: Annotated[float, Field(gt=0, le=1)] = 0.2
    """Lower clip: the probability ratio is held above 1 - clip_low; 1 sets no lower bound, as the authors do."""
    clip_high: PositiveFloat = 0.2
    """Upper clip: the probability ratio is held below 1 + clip_high."""
    token_share: Annotated[float, Field(gt=0, le=1)] = 2e-4
    """Share of the mini-batch's tokens that are left out, at least one token."""
    cov_low: float = 1.0
    """Only tokens above this covariance of advantage and log-probability are drawn."""
    cov_high: float = 5.0
    """Only tokens below this covariance of advantage and log-probability are drawn."""


class KlCovLoss(PolicyLoss):
    """The unclipped ratio with a penalty on the tokens of the highest covariance (arXiv:2505.22617).

    Costs a forward pass of the mini-batch: covariances are against the means of all its tokens."""

    reads_ahead: ClassVar[bool] = True

    type: Literal["kl_cov"] = "kl_cov"
    token_share: Annotated[float, Field(gt=0, le=1)] = 2e-4
    """Share of the mini-batch's tokens that are penalised, at least one token; the paper has 2e-3 for 7B, 2e-4 for
    32B."""
    coef: NonNegativeFloat = 1.0
    """Factor on the size of a penalised token's log-ratio."""


class GmpoLoss(PolicyLoss):
    """Geometric-mean policy optimisation: the geometric mean of clipped token ratios (arXiv:2507.20673)."""

    type: Literal["gmpo"] = "gmpo"
    clip_low: PositiveFloat = 0.4
    """Lower clip: a token's log-ratio is held above -clip_low, in nats."""
    clip_high: PositiveFloat = 0.4
    """Upper clip: a token's log-ratio is held below clip_high, in nats."""


class DppoLoss(PolicyLoss):
    """Divergence PPO: the trust region is in probabilities and not in their ratio (arXiv:2602.04879)."""

    type: Literal["dppo"] = "dppo"
    variant: Annotated[Literal["tv", "kl"], DIVERGENCES] = "tv"
    """How far the sampled token's probability moved."""
    threshold_low: PositiveFloat | None = None
    """Largest move of a token whose probability should fall; unset takes 0.15 with tv, 0.05 nats with kl."""
    threshold_high: PositiveFloat | None = None
    """Largest move of a token whose probability should grow; unset takes 0.15 with tv, 0.05 nats with kl."""
    max_ratio: PositiveFloat = 20.0
    """The importance weight is held below this."""


class DroLoss(PolicyLoss):
    """Direct reward optimisation: a quadratic pull to the old policy in place of the clip (arXiv:2405.19107)."""

    type: Literal["dro"] = "dro"
    beta: NonNegativeFloat = 1.0
    """Factor on half the squared log-ratio of a token to the old policy.

    The paper has a whole response's log-ratio to the reference; of 0.1, 1 and 5 it finds 1 the best factor."""


class DpoLoss(PolicyLoss):
    """Direct preference optimisation: the log-odds that the chosen response is the better one (arXiv:2305.18290)."""

    reads_ahead: ClassVar[bool] = True

    type: Literal["dpo"] = "dpo"
    beta: PositiveFloat = 0.1
    """Factor on the pair's margin over the reference; the larger, the nearer the policy stays."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Probability that the preference is the wrong way round."""


class IpoLoss(PolicyLoss):
    """Identity preference optimisation: a pair's margin is fitted to a constant (arXiv:2310.12036)."""

    reads_ahead: ClassVar[bool] = True

    type: Literal["ipo"] = "ipo"
    beta: PositiveFloat = 0.1
    """The margin is fitted to 1 / (2 beta), in nats; the larger, the nearer the policy stays."""


class SppoLoss(PolicyLoss):
    """The squared error of a response's log-ratio (arXiv:2405.00675)."""

    type: Literal["sppo"] = "sppo"


PairLossConfig = Annotated[DpoLoss | IpoLoss, Field(discriminator="type")]
PolicyLossConfig = Annotated[
    ClipLoss | GspoLoss | SapoLoss | GpgLoss | CispoLoss | ClipCovLoss | KlCovLoss | GmpoLoss | DppoLoss | DroLoss,
    Field(discriminator="type"),
]
