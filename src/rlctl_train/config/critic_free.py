"""Algorithms that compare responses with one another, or with a baseline, instead of asking a critic.

Formulas are in `rlctl_train.algos`.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from rlctl_train.config.losses import GpgLoss, PolicyLossConfig
from rlctl_train.config.policy import GroupRelative, NormalizedGroup, PolicyGradient


class PassKGrpoConfig(NormalizedGroup):
    """GRPO for the best of k: only a group's best response counts (Tang et al. 2025, arXiv:2503.19595)."""

    type: Literal["passk_grpo"] = "passk_grpo"


class GdpoConfig(GroupRelative):
    """Group reward-decoupled normalisation policy optimisation (Liu et al. 2026, arXiv:2601.05242)."""

    type: Literal["gdpo"] = "gdpo"
    parts: dict[str, PositiveFloat] = Field(default_factory=dict)
    """Parts of the reward to learn from and their weights, by the names they have in `reward/<part>`.

    The weights replace those of `reward.parts`, which go on to make the score. Two parts and more are what it is for.
    """


class RlooConfig(GroupRelative):
    """REINFORCE with the mean of the other responses as baseline (Ahmadian et al. 2024, arXiv:2402.14740)."""

    type: Literal["rloo"] = "rloo"


class OpoConfig(GroupRelative):
    """On-policy optimisation with the length-weighted optimal baseline (Hao et al. 2025, arXiv:2505.23585)."""

    type: Literal["opo"] = "opo"


class GpgConfig(GroupRelative):
    """Group policy gradient (Chu et al. 2025, arXiv:2504.02546)."""

    type: Literal["gpg"] = "gpg"
    loss: PolicyLossConfig = GpgLoss()
    """The policy loss; the paper's has no ratio."""
    f_norm: PositiveFloat = 1.0
    """Constant that advantages are divided by; the paper's is 1."""


class OtbConfig(GroupRelative):
    """Optimal token baseline: at each token the least noisy common one (Li et al. 2026, arXiv:2602.07078)."""

    needs_sum_pi_squared: ClassVar[bool] = True

    type: Literal["otb"] = "otb"
    multi_turn: bool = False
    """Compare tokens by how many the model wrote before them, tools' replies left out, rather than by position."""


class ReinforcePpConfig(PolicyGradient):
    """REINFORCE++: the whole batch is the baseline (Hu et al. 2025, arXiv:2501.03262)."""

    type: Literal["reinforce_pp"] = "reinforce_pp"
    group_size: PositiveInt = 1
    """Responses sampled per prompt."""
    gamma: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Discount per token."""


class ReinforcePpBaselineConfig(GroupRelative):
    """REINFORCE++ on scores less their group's mean (Hu et al. 2025, arXiv:2501.03262)."""

    type: Literal["reinforce_pp_baseline"] = "reinforce_pp_baseline"


class RemaxConfig(PolicyGradient):
    """REINFORCE with the score of one greedy response as baseline (Li et al. 2023, arXiv:2310.10505)."""

    type: Literal["remax"] = "remax"
    group_size: PositiveInt = 1
    """Responses sampled per prompt, beside the greedy one."""
