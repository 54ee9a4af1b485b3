"""Arithmetic: the whole response is the number, written in the one usual way (`68`, `-7`)."""

from __future__ import annotations

import re
from typing import Any

from rlctl_train.config.reward import ArithmeticReward
from rlctl_train.rewards.base import Grade, GradedSample, Grader, UngradableError

INTEGER = re.compile(r"0|-?[1-9][0-9]*")


def make(config: ArithmeticReward) -> Grader:
    """Return a grader that gives 1, `format_score` for another number, 0 for anything that is no number."""

    def grade(sample: GradedSample) -> Grade:
        truth = _truth(sample.ground_truth)
        answer = sample.response.strip()
        if not INTEGER.fullmatch(answer):
            return Grade(0.0, f"{answer[:40]!r} is not a plain whole number", correct=False)
        if answer != truth:
            return Grade(config.format_score, f"{answer[:40]} is not {truth}", correct=False)
        return Grade(1.0, f"{truth} is right", correct=True)

    return grade


def _truth(ground_truth: Any) -> str:
    if isinstance(ground_truth, float) and ground_truth.is_integer():
        ground_truth = int(ground_truth)
    text = str(ground_truth).strip()
    if not INTEGER.fullmatch(text):
        raise UngradableError(f"the ground truth {text[:40]!r} is not a whole number")
    return text
