"""What algorithms share: roles, aggregation, KL penalties, groups and critics. Formulas are in `rlctl_train.algos`."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from rlctl_train.config.base import Choices, Config
from rlctl_train.config.correction import RolloutCorrection
from rlctl_train.config.losses import ClipLoss, PolicyLossConfig
from rlctl_train.config.optim import OptimConfig

Role = Literal["actor", "critic", "reference", "teacher", "reward_model"]
Aggregation = Literal["token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"]
KlEstimator = Literal["k1", "k2", "k3", "abs", "k1+", "k3+"]
KlLossEstimator = Literal["k1", "k2", "k3", "abs", "k1+", "k3+", "full"]

AGGREGATIONS = Choices(
    {
        "token-mean": "sum over tokens, divided by their number",
        "token-sum": "sum over tokens",
        "seq-mean-token-sum": "sum over tokens, divided by the number of sequences",
        "seq-mean-token-mean": "mean over each sequence's tokens, then over sequences",
        "seq-mean-token-sum-norm": "sum over tokens, divided by the number of sequences and by `aggregation_norm`",
    }
)
KL_ESTIMATORS = Choices(
    {
        "k1": "the log-ratio: unbiased, noisy, of either sign",
        "k2": "half its square: biased, never negative, unbiased gradient",
        "k3": "inverse ratio - 1 + log-ratio: unbiased, never negative, little noise",
        "abs": "the log-ratio's size",
        "k1+": "the value of k1 with the gradient of k2",
        "k3+": "the value of k3 with the gradient of k2",
    }
)
KL_LOSS_ESTIMATORS = Choices(
    KL_ESTIMATORS.meanings
    | {
        "full": "the KL itself, summed over the vocabulary, with its exact gradient: no noise, but the reference's "
        "log-probability of every token of the vocabulary travels for every response token"
    }
)


class FixedKl(Config):
    """Subtract `coef` times the KL estimate from the reward of each token."""

    type: Literal["fixed"] = "fixed"
    coef: NonNegativeFloat = 0.001
    """Factor on the KL estimate."""
    estimator: Annotated[KlEstimator, KL_ESTIMATORS] = "k1"
    """Per-token KL estimator between the old policy and the reference."""


class AdaptiveKl(Config):
    """Steer the coefficient towards a target KL (Ziegler et al. 2019, arXiv:1909.08593)."""

    type: Literal["adaptive"] = "adaptive"
    coef: PositiveFloat = 0.001
    """Initial factor on the KL estimate."""
    target: PositiveFloat = 0.1
    """Wanted KL per sequence, in nats."""
    horizon: PositiveInt = 10000
    """Number of sequences over which the coefficient may move by its full step."""
    estimator: Annotated[KlEstimator, KL_ESTIMATORS] = "k1"
    """Per-token KL estimator between the old policy and the reference."""


class EntropyControl(Config):
    """Steer `entropy_coef` towards a target entropy (Skywork-OR1, arXiv:2505.22312)."""

    target: PositiveFloat
    """Wanted mean entropy of a token, in nats; above it no bonus is paid."""
    step_size: PositiveFloat = 0.005
    """How far the coefficient moves after each step: up below the target, down above it."""


KlInReward = Annotated[FixedKl | AdaptiveKl, Field(discriminator="type")]


class PolicyGradient(Config):
    """What every algorithm with a policy loss has."""

    loss: PolicyLossConfig = ClipLoss()
    """The policy loss."""
    aggregation: Annotated[Aggregation, AGGREGATIONS] = "token-mean"
    """How per-token losses become one number; counts are global, over the whole mini-batch."""
    aggregation_norm: PositiveFloat | None = None
    """Constant divisor of `seq-mean-token-sum-norm`, in tokens; unset takes `rollout.max_response_tokens`."""
    kl_loss_coef: NonNegativeFloat = 0.0
    """Factor on the KL-to-reference loss; 0 turns it off and needs no reference model."""
    kl_loss_estimator: Annotated[KlLossEstimator, KL_LOSS_ESTIMATORS] = "k3"
    """Per-token KL of the loss between the current policy and the reference: estimated from the sampled token, or
    whole, for which a step's response tokens times the vocabulary, 4 bytes each, may take 16 GiB at most."""
    entropy_coef: float = 0.0
    """Factor on the entropy bonus; with `entropy_control` its first value."""
    entropy_control: EntropyControl | None = None
    """Steer the bonus towards a target entropy; unset keeps its factor."""
    correction: RolloutCorrection | None = None
    """What is done about tokens on which rollout and trainer disagree; unset only measures it."""
    kl_in_reward: KlInReward | None = None
    """KL penalty inside the reward; unset turns it off."""

    needs_critic: ClassVar[bool] = False
    needs_sum_pi_squared: ClassVar[bool] = False
    """Whether the advantage reads `sum_pi_squared`, which the actor's log-probability pass then returns."""

    def reads_old_logp(self) -> bool:
        """Return whether the advantage reads `old_logp`, which then is computed before the update in any case."""
        return False

    def compares_distributions(self) -> bool:
        """Return whether the KL loss reads the reference's whole distributions and not its sampled tokens alone."""
        return self.kl_loss_coef > 0 and self.kl_loss_estimator == "full"

    def roles(self) -> tuple[Role, ...]:
        """Return the model roles this algorithm needs, actor first."""
        roles: list[Role] = ["actor"]
        if self.needs_critic:
            roles.append("critic")
        if self.kl_loss_coef > 0 or self.kl_in_reward is not None:
            roles.append("reference")
        return tuple(roles)


class GroupRelative(PolicyGradient):
    """The responses to a prompt are compared with one another; one alone would have nothing to be compared with."""

    group_size: Annotated[int, Field(ge=2)] = 8
    """Responses sampled per prompt; the group is the baseline."""


class NormalizedGroup(GroupRelative):
    """The comparison may be in units of the group's standard deviation."""

    normalize_std: bool = True
    """Divide by the group's standard deviation; false gives Dr.GRPO's advantage (arXiv:2503.20783)."""


class ActorCritic(PolicyGradient):
    """A critic learns beside the policy."""

    needs_critic: ClassVar[bool] = True

    group_size: PositiveInt = 1
    """Responses sampled per prompt."""
    gamma: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Discount per token."""
    lam: Annotated[float, Field(ge=0, le=1)] = 1.0
    """GAE lambda (arXiv:1506.02438)."""
    value_clip: PositiveFloat = 0.5
    """Largest change of a value against the rollout's value before its loss is clipped."""
    critic_optim: OptimConfig = OptimConfig(lr=1e-5)
    """Optimizer of the critic."""
    critic_warmup_steps: NonNegativeInt = 0
    """First steps in which only the critic learns."""
