r"""Mathematics: is the last `\boxed{}` answer equivalent to the ground truth? Judged by math-verify (extra `math`)."""

from __future__ import annotations

import logging
from typing import Any

from rlctl_train.config.errors import UserError
from rlctl_train.config.reward import MathReward
from rlctl_train.rewards.base import Grade, GradedSample, Grader, UngradableError
from rlctl_train.rewards.boxed import last_boxed

TIME_LIMIT_S = 5
"""Longest time math-verify may parse or compare one pair of expressions, in seconds."""


def make(config: MathReward) -> Grader:
    """Return a grader that gives 1 for an equivalent answer, else 0."""
    try:
        import math_verify  # pyright: ignore[reportMissingImports], an optional package
    except ImportError as error:
        raise UserError("reward.type=math needs the package math-verify", "pip install 'rlctl[math]'") from error
    # A failed parse is an ordinary wrong answer here, not news for the log.
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    extraction = [math_verify.LatexExtractionConfig(boxed_match_priority=0)]

    def parsed(answer: str) -> list[Any]:
        # Its limits are alarm signals, so this must be the main thread: a grader process's is.
        return math_verify.parse(rf"\boxed{{{answer}}}", extraction, parsing_timeout=TIME_LIMIT_S)

    def grade(sample: GradedSample) -> Grade:
        truth = _truth(sample.ground_truth)
        answer = last_boxed(sample.response)
        if answer is None:
            return Grade(0.0, r"no \boxed{} answer", correct=False)
        if _squeezed(answer) == _squeezed(truth):
            return Grade(1.0, f"{truth[:80]} is right", correct=True)
        right = math_verify.verify(parsed(truth), parsed(answer), timeout_seconds=TIME_LIMIT_S)
        relation = "equals" if right else "is not"
        return Grade(float(right), f"{answer[:80]} {relation} {truth[:80]}", correct=bool(right))

    return grade


def _truth(ground_truth: Any) -> str:
    text = "" if ground_truth is None else str(ground_truth).strip()
    boxed = last_boxed(text)
    text = (boxed if boxed is not None else text).strip().strip("$").strip()
    if not text:
        raise UngradableError("the ground truth is empty")
    return text


def _squeezed(text: str) -> str:
    return "".join(text.split())
