"""The reward contract: a graded sample goes in, a grade comes out. A reward file has `make(config) -> Grader`."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from rlctl_train.config.reward import RewardConfig, SumReward
from rlctl_train.registry import REWARDS, load

MAX_REASON_CHARS = 500


@dataclass(frozen=True)
class GradedSample:
    """One response to be graded; `extra` is the row's `extra_info`."""

    response: str
    ground_truth: Any
    data_source: str = ""
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Grade:
    """What a response is worth and why; `error` is set when grading itself failed, and the score is then 0."""

    score: float
    reason: str
    parts: dict[str, float] = field(default_factory=dict)
    error: str | None = None
    correct: bool | None = None
    """Whether the answer is right, apart from weights and form; None where a reward does not say."""

    @property
    def accuracy(self) -> float:
        """Return 1 or 0 for right or wrong, or the score itself where right and wrong are not told apart."""
        return self.score if self.correct is None else float(self.correct)


Grader = Callable[[GradedSample], Grade]


class UngradableError(Exception):
    """A sample cannot be graded, whatever the response: its ground truth has no form the reward can read."""


def make_grader(config: RewardConfig) -> Grader:
    """Return the grader of a reward section, its weight applied; it raises nothing and returns finite scores."""
    grade = load(REWARDS, config.type)(config)
    weight = 1.0 if isinstance(config, SumReward) else config.weight

    def weighted(sample: GradedSample) -> Grade:
        result = grade(sample)
        return replace(result, score=result.score * weight)

    return lambda sample: guard(weighted, sample)


def guard(grade: Grader, sample: GradedSample) -> Grade:
    """Grade a sample; an exception or a score or part that is not finite becomes a recorded zero."""
    try:
        result = grade(sample)
    except (Exception, SystemExit) as error:  # a grader may be anyone's code and raise anything
        return failed(_describe(error))
    result = replace(result, reason=result.reason[:MAX_REASON_CHARS])
    for name, value in {"score": result.score, **result.parts}.items():
        if not math.isfinite(value):
            return failed(f"{name} is not finite: {value}")
    return result


def failed(why: str) -> Grade:
    """Return the recorded zero of a sample whose grading failed."""
    why = why[:MAX_REASON_CHARS]
    return Grade(0.0, f"not graded: {why}", error=why)


def _describe(error: BaseException) -> str:
    if isinstance(error, UngradableError):
        return str(error)
    return f"{type(error).__name__}: {error}"
