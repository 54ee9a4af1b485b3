"""How responses are scored. `path = "my.py:score"` takes a function of the user's own."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from rlctl_train.config.base import Choices, Config


class ArithmeticReward(Config):
    """1 for the right number, `format_score` for a wrong number in the right form, 0 otherwise."""

    type: Literal["arithmetic"] = "arithmetic"
    weight: float = 1.0
    """Factor on this reward's score."""
    format_score: float = 0.0
    """Score of a well-formed wrong answer."""


class Gsm8kReward(Config):
    """GSM8K: compare the number after the last `####` (strict) or the last number in the text (flexible)."""

    type: Literal["gsm8k"] = "gsm8k"
    weight: float = 1.0
    """Factor on this reward's score."""
    method: Annotated[
        Literal["strict", "flexible"],
        Choices({"strict": "the number after the last `####`", "flexible": "the last number in the text"}),
    ] = "strict"
    """Where the answer is looked for: after `####`, or the last number in the text."""
    format_score: float = 0.0
    """Score of an answer in the right form but with the wrong number."""


class MathReward(Config):
    """Mathematical equivalence of the last boxed answer with the ground truth (math-verify)."""

    type: Literal["math"] = "math"
    weight: float = 1.0
    """Factor on this reward's score."""


class CustomReward(Config):
    """A function from a Python file of the user's own."""

    type: Literal["custom"] = "custom"
    path: str
    """`FILE.py:FUNCTION`, called as `function(response, ground_truth, **extra)`; returns a number or a dict."""
    weight: float = 1.0
    """Factor on this reward's score."""
    kwargs: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments handed to every call."""


LeafReward = Annotated[ArithmeticReward | Gsm8kReward | MathReward | CustomReward, Field(discriminator="type")]


class SumReward(Config):
    """Weighted sum of several rewards; each part is also a metric of its own."""

    type: Literal["sum"] = "sum"
    parts: tuple[LeafReward, ...] = Field(min_length=1)
    """The rewards that are added, each multiplied by its own `weight`."""


RewardConfig = Annotated[
    ArithmeticReward | Gsm8kReward | MathReward | CustomReward | SumReward, Field(discriminator="type")
]


class GraderConfig(Config):
    """The processes in which rewards are computed, apart from training, each call under a time limit."""

    num_workers: PositiveInt = 1
    """Number of grader processes."""
    time_limit_s: PositiveFloat = 10.0
    """Longest time one response may take to grade, in seconds; past it the score is a recorded zero."""
