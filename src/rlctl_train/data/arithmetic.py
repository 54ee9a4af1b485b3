"""Sums such as `23+45=`, made on the spot: every problem once, the held-out ones never among the training ones.

`23+45=` and `45+23=` are two problems. Each row carries its answer as ground truth and as a demonstration. A share of
the demonstrations may come from a careless pupil, who works digit by digit and forgets to carry and to borrow: what a
model learns from them is right only where nothing was to be carried, and the reward can teach it the rest.
"""

from __future__ import annotations

import operator
import random
from itertools import zip_longest
from pathlib import Path
from typing import Any

from rlctl_train.config.data import ArithmeticData
from rlctl_train.config.errors import UserError
from rlctl_train.data.prepare import Prepared, common_row, user_message, write_splits

DATA_SOURCE = "arithmetic"
OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul}


def write_arithmetic(config: ArithmeticData, out_dir: Path, seed: int, *, force: bool = False) -> Prepared:
    """Write `train.parquet` and, when `num_val` asks for it, `val.parquet`."""
    splits = arithmetic_splits(config, seed)
    return Prepared(write_splits(out_dir, splits, force=force))


def arithmetic_splits(config: ArithmeticData, seed: int) -> dict[str, list[dict[str, Any]]]:
    """Draw distinct problems; refuse to ask for more than there are."""
    numbers = max(0, config.max_operand + 1 - config.min_operand)
    operators = sorted(set(config.operators))
    num_distinct = len(operators) * numbers * numbers
    wanted = config.num_train + config.num_val
    if wanted > num_distinct:
        raise UserError(
            f"num_train + num_val asks for {wanted} problems, but operators {' '.join(operators)} "
            f"with operands {config.min_operand} to {config.max_operand} give {num_distinct} distinct ones",
            "widen the range of operands, add operators, or lower num_train",
        )
    problems = []
    for code in random.Random(seed).sample(range(num_distinct), wanted):
        rest, right = divmod(code, numbers)
        which, left = divmod(rest, numbers)
        problems.append((config.min_operand + left, operators[which], config.min_operand + right))
    train, val = problems[: config.num_train], problems[config.num_train :]
    splits = {"train": train, "val": val} if val else {"train": train}
    pupil = random.Random(f"{seed}/pupil")
    return {
        name: [
            _row(problem, name, i, careless=name == "train" and pupil.random() < config.careless_demonstrations)
            for i, problem in enumerate(part)
        ]
        for name, part in splits.items()
    }


def without_carry(left: int, symbol: str, right: int) -> int:
    """Return what comes out digit by digit, modulo ten in each place, when nothing is carried or borrowed.

    A difference is the larger number less the smaller one, with the sign set afterwards.
    """
    high, low = _digits(max(left, right)), _digits(min(left, right))
    if symbol == "*":
        parts = [(i + j, a * b) for i, a in enumerate(high) for j, b in enumerate(low)]
    else:
        parts = [(i, OPERATORS[symbol](a, b)) for i, (a, b) in enumerate(zip_longest(high, low, fillvalue=0))]
    places = [sum(value for place, value in parts if place == i) % 10 for i in range(len(high) + len(low))]
    result = sum(digit * 10**i for i, digit in enumerate(places))
    return -result if symbol == "-" and left < right else result


def _digits(number: int) -> list[int]:
    """Return the decimal digits, units first."""
    return [int(digit) for digit in reversed(str(number))]


def _row(problem: tuple[int, str, int], split: str, index: int, *, careless: bool) -> dict[str, Any]:
    left, symbol, right = problem
    answer = str(OPERATORS[symbol](left, right))
    return common_row(
        source=DATA_SOURCE,
        prompt=user_message(f"{left}{symbol}{right}="),
        ability="arithmetic",
        truth=answer,
        extra={"split": split, "index": index},
        response=str(without_carry(*problem)) if careless else answer,
    )
