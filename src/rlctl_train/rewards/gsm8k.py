"""GSM8K (Cobbe et al. 2021, arXiv:2110.14168): compare the final number of a worked solution.

Only the last 300 characters of a response count. Numbers are compared by value: thousands separators, a
currency sign, a trailing full stop and trailing zeros do not matter, on either side.
"""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Any

from rlctl_train.config.reward import Gsm8kReward
from rlctl_train.rewards.base import Grade, GradedSample, Grader, UngradableError

TAIL_CHARS = 300
_DIGITS = r"(?:[0-9][0-9,]*(?:\.[0-9]+)?|\.[0-9]+)"
FINAL = re.compile(rf"####\s*(?P<sign>-?)\s*\$?\s*(?P<sign2>-?)(?P<digits>{_DIGITS})")
"""The answer after the mark `####`."""
# A minus directly after a digit, letter or bracket is a subtraction or a range, not a sign.
NUMBER = re.compile(rf"(?P<sign>(?<![0-9A-Za-z)\]])-)?\$?(?P<sign2>(?<=\$)-)?(?<![0-9.,])(?P<digits>{_DIGITS})")
"""Any number in running text."""


def make(config: Gsm8kReward) -> Grader:
    """Return a grader by the strict or the flexible method."""
    pattern = FINAL if config.method == "strict" else NUMBER
    missing = "no number after ####" if config.method == "strict" else "no number"

    def grade(sample: GradedSample) -> Grade:
        truth = ground_truth_number(sample.ground_truth)
        answer = _last_number(pattern, sample.response)
        if answer is None:
            return Grade(0.0, f"{missing} in the last {TAIL_CHARS} characters", correct=False)
        if answer != truth:
            return Grade(config.format_score, f"{_short(answer)} is not {_short(truth)}", correct=False)
        return Grade(1.0, f"{_short(truth)} is right", correct=True)

    return grade


def ground_truth_number(ground_truth: Any) -> Decimal:
    """Read a ground truth: a number, its text (`1,234`), or a whole solution ending in `#### 1,234`."""
    text = str(ground_truth).strip()
    number = _value(FINAL.search(text) if "####" in text else NUMBER.fullmatch(text.rstrip(".")))
    if number is None:
        raise UngradableError(f"the ground truth {text[-40:]!r} is not a number")
    return number


def _last_number(pattern: re.Pattern[str], response: str) -> Decimal | None:
    """Return the last number that begins within the tail, None where there is none."""
    text = response.replace("−", "-")
    last = None
    for match in pattern.finditer(text, max(len(text) - TAIL_CHARS, 0)):
        last = match
    return _value(last)


def _value(match: re.Match[str] | None) -> Decimal | None:
    if match is None:
        return None
    sign = (match["sign"] or "") + (match["sign2"] or "")
    return Decimal(sign[:1] + match["digits"].replace(",", ""))


def _short(number: Decimal) -> str:
    return f"{number:f}"[:40]
