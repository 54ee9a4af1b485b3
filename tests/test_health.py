"""The log-probability gate: its limit follows precision, it stops or warns, and it says what to look at."""

from dataclasses import replace
from typing import Any

import pytest

from rlctl_train.config import RunConfig
from rlctl_train.config.errors import UserError
from rlctl_train.health import check_logprob_gap, logprob_gap_limit
from tests.runs import CONFIG, PLAN


def config(**health: Any) -> RunConfig:
    return RunConfig.model_validate({**CONFIG, "health": health})


def test_the_limit_is_tight_in_float32_and_wider_when_either_side_is_bfloat16() -> None:
    assert logprob_gap_limit(config(), PLAN) == 1e-4
    assert logprob_gap_limit(config(), replace(PLAN, rollout_dtype="bfloat16")) > 1e-2
    assert logprob_gap_limit(config(logprob_gap=0.5), PLAN) == 0.5


def test_a_gap_beyond_the_limit_stops_the_run_with_both_numbers_and_advice() -> None:
    with pytest.raises(UserError, match=r"0\.3 nats.*allows 0\.0001") as caught:
        check_logprob_gap(config(), PLAN, {"health/logprob_gap": 0.3})
    assert "precision" in caught.value.remedy and caught.value.exit_code == 3


def test_a_gap_beyond_the_limit_only_warns_when_told_so(capsys: pytest.CaptureFixture[str]) -> None:
    check_logprob_gap(config(on_failure="warn"), PLAN, {"health/logprob_gap": 0.3})
    assert "warning" in capsys.readouterr().err


def test_a_gap_within_the_limit_passes_in_silence(capsys: pytest.CaptureFixture[str]) -> None:
    check_logprob_gap(config(), PLAN, {"health/logprob_gap": 1e-5})
    assert capsys.readouterr().err == ""


def test_a_gap_that_is_not_a_number_does_not_pass() -> None:
    with pytest.raises(UserError):
        check_logprob_gap(config(), PLAN, {"health/logprob_gap": float("nan")})
