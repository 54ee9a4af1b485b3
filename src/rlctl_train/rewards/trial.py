"""Try a reward on answers whose worth is known: the right ones should score, those of other rows should not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from rlctl_train.rewards.pool import Grade, GradedSample, GraderPool

LEAST_GOLD, MOST_OTHER = 0.99, 0.2
"""A reward passes when right answers reach the first accuracy on average and others stay under the second."""


@dataclass(frozen=True)
class Trial:
    """Mean accuracies (0 to 1) over `num_samples` rows, and the grades of the right answers."""

    num_samples: int
    gold: float
    other: float
    """Accuracy of each row's response against another row's ground truth."""
    empty: float
    """Accuracy of the empty response."""
    gold_grades: tuple[Grade, ...]

    @property
    def passed(self) -> bool:
        """Say whether the reward tells right answers from others."""
        return self.gold >= LEAST_GOLD and max(self.other, self.empty) <= MOST_OTHER


def try_reward(pool: GraderPool, gold: Sequence[GradedSample]) -> Trial:
    """Grade `gold` (responses known to be right) as they are, against other rows' ground truths, and emptied."""
    others = [
        replace(sample, ground_truth=_another_truth(gold, i))
        for i, sample in enumerate(gold)
        if _another_truth(gold, i)
    ]
    emptied = [replace(sample, response="") for sample in gold]
    right = pool.score(gold)
    return Trial(
        len(gold), _accuracy(right), _accuracy(pool.score(others)), _accuracy(pool.score(emptied)), tuple(right)
    )


def _another_truth(gold: Sequence[GradedSample], place: int) -> object | None:
    """Return the next ground truth, going round, that differs from the one at `place`."""
    own = gold[place].ground_truth
    round_trip = (gold[(place + step) % len(gold)].ground_truth for step in range(1, len(gold)))
    return next((truth for truth in round_trip if truth != own), None)


def _accuracy(grades: Sequence[Grade]) -> float:
    return sum(grade.accuracy for grade in grades) / len(grades) if grades else 0.0
