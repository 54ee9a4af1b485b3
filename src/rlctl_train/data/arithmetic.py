"""Sums such as `23+45=`, made on the spot: every problem once, the held-out ones never among the training ones.

`23+45=` and `45+23=` are two problems. Each row carries its answer as ground truth and as a demonstration.
"""

from __future__ import annotations

import operator
import random
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
    numbers = config.max_operand + 1
    operators = sorted(set(config.operators))
    num_distinct = len(operators) * numbers * numbers
    wanted = config.num_train + config.num_val
    if wanted > num_distinct:
        raise UserError(
            f"num_train + num_val asks for {wanted} problems, but operators {' '.join(operators)} "
            f"with operands 0 to {config.max_operand} give {num_distinct} distinct ones",
            "raise max_operand, add operators, or lower num_train",
        )
    problems = []
    for code in random.Random(seed).sample(range(num_distinct), wanted):
        rest, right = divmod(code, numbers)
        which, left = divmod(rest, numbers)
        problems.append((left, operators[which], right))
    train, val = problems[: config.num_train], problems[config.num_train :]
    splits = {"train": train, "val": val} if val else {"train": train}
    return {name: [_row(problem, name, i) for i, problem in enumerate(part)] for name, part in splits.items()}


def _row(problem: tuple[int, str, int], split: str, index: int) -> dict[str, Any]:
    left, symbol, right = problem
    answer = str(OPERATORS[symbol](left, right))
    return common_row(
        source=DATA_SOURCE,
        prompt=user_message(f"{left}{symbol}{right}="),
        ability="arithmetic",
        truth=answer,
        extra={"split": split, "index": index},
        response=answer,
    )
