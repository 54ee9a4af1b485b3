"""Learning-rate schedules, by value."""

from __future__ import annotations

import pytest

from rlctl_train.config.optim import OptimConfig
from rlctl_train.engines.schedule import learning_rate


def rates(num_steps: int, **settings: object) -> list[float]:
    config = OptimConfig(lr=1.0, **settings)  # type: ignore[arg-type]
    return [learning_rate(step, num_steps, config) for step in range(num_steps + 2)]


def test_constant_stays_after_warm_up() -> None:
    assert rates(4, warmup_steps=2) == pytest.approx([0.5, 1, 1, 1, 1, 1])


def test_linear_falls_to_its_end_and_stays() -> None:
    assert rates(4, schedule="linear", min_lr_ratio=0.2) == pytest.approx([1, 0.8, 0.6, 0.4, 0.2, 0.2])


def test_cosine_is_halfway_in_the_middle() -> None:
    assert rates(4, schedule="cosine", min_lr_ratio=0.5)[2] == pytest.approx(0.75)
    assert rates(4, schedule="cosine")[4:] == pytest.approx([0, 0])


def test_the_fall_begins_after_warm_up() -> None:
    assert rates(6, schedule="linear", warmup_steps=2) == pytest.approx([0.5, 1, 1, 0.75, 0.5, 0.25, 0, 0])


def test_warm_up_as_long_as_the_run_never_falls() -> None:
    assert max(rates(3, schedule="cosine", warmup_steps=3)[:3]) == 1
