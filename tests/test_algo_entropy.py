"""Entropy control: the coefficient goes where the target asks, and the bonus is paid below the target only."""

from __future__ import annotations

import pytest

from rlctl_train.algos.entropy_control import EntropyController
from rlctl_train.config.algo import GrpoConfig, SftConfig
from rlctl_train.config.policy import EntropyControl

CONFIG = GrpoConfig(entropy_coef=0.01, entropy_control=EntropyControl(target=0.2, step_size=0.004))


@pytest.mark.parametrize(
    ("entropies", "coef", "held"),
    [
        ([], 0.01, 0.01),
        ([0.1], 0.014, 0.014),
        ([0.1, 0.1], 0.018, 0.018),
        ([0.3], 0.0, 0.006),
        ([0.3, 0.1], 0.010, 0.010),
        ([0.2], 0.006, 0.006),
        ([0.3] * 5, 0.0, 0.0),
    ],
    ids=str,
)
def test_the_coefficient_rises_below_the_target_and_falls_above_it(
    entropies: list[float], coef: float, held: float
) -> None:
    control = EntropyController(CONFIG)
    for entropy in entropies:
        control.update(entropy)
    assert control.coef == pytest.approx(coef)
    assert control.state()["coef"] == pytest.approx(held)


def test_without_a_target_the_coefficient_stays() -> None:
    for config, coef in ((GrpoConfig(entropy_coef=-0.3), -0.3), (SftConfig(), 0.0)):
        control = EntropyController(config)
        control.update(5.0)
        assert control.coef == coef


def test_a_checkpoint_remembers_where_the_coefficient_was() -> None:
    control, resumed = EntropyController(CONFIG), EntropyController(CONFIG)
    for entropy in (0.1, 0.1, 0.3):
        control.update(entropy)
    resumed.load_state(control.state())
    for entropy in (0.1, 0.3, 0.1):
        assert resumed.coef == control.coef
        control.update(entropy)
        resumed.update(entropy)
