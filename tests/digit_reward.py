"""A reward that random weights already earn in part, so that every step of a tiny run has something to learn from."""

import time
from pathlib import Path


def digits(response: str, ground_truth: str) -> float:
    """Return the share of digits in the response."""
    return sum(character.isdigit() for character in response) / max(1, len(response))


def any_digit(response: str, ground_truth: str) -> float:
    """Return 1 where the response has a digit: among random weights many groups score alike."""
    return float(any(character.isdigit() for character in response))


def held_digits(response: str, ground_truth: str, hold: str) -> float:
    """Return the share of digits as soon as the file `hold` is gone: a test can meet the run in mid-step."""
    while Path(hold).exists():
        time.sleep(0.02)
    return digits(response, ground_truth)
