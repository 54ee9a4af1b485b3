"""The log-probability gate: its limit follows precision, it stops or warns, and it says what to look at."""

from dataclasses import replace
from typing import Any

import pytest

from rlctl_train.config import RunConfig
from rlctl_train.config.errors import UserError
from rlctl_train.health import MismatchGates, check_logprob_gap, likely_causes, logprob_gap_limit
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


FINE = {"training/rollout_probs_diff_mean": 0.004, "rollout_corr/k3_kl": 1e-3, "rollout_corr/chi2_token": 0.02}


@pytest.mark.parametrize(
    ("metric", "key"),
    [
        ("training/rollout_probs_diff_mean", "probs_diff"),
        ("rollout_corr/k3_kl", "rollout_kl"),
        ("rollout_corr/chi2_token", "chi_square"),
    ],
)
@pytest.mark.parametrize("value", [3.0, float("nan")])
def test_each_gate_stops_the_run_with_its_number_its_limit_and_a_cause(metric: str, key: str, value: float) -> None:
    gates = MismatchGates(config(on_mismatch="stop"), PLAN)
    gates.check(FINE)
    with pytest.raises(UserError, match=rf"is {value:g} \(health\.{key} allows") as caught:
        gates.check({**FINE, metric: value})
    assert caught.value.exit_code == 3 and "stale weights" in caught.value.remedy
    MismatchGates(config(on_mismatch="stop", **{key: None}), PLAN).check({**FINE, metric: value})


def test_a_gate_warns_once_and_another_one_still_does(capsys: pytest.CaptureFixture[str]) -> None:
    gates = MismatchGates(config(), PLAN)
    for _ in range(2):
        gates.check({**FINE, "rollout_corr/k3_kl": 1.0})
    assert capsys.readouterr().err.count("warning") == 1
    gates.check({**FINE, "rollout_corr/k3_kl": 1.0, "rollout_corr/chi2_token": 9.0})
    told = capsys.readouterr().err
    assert "chi_square" in told and "rollout_kl" not in told


def test_a_step_that_compared_nothing_passes_the_gates() -> None:
    MismatchGates(config(on_mismatch="stop"), PLAN).check({"actor/pg_loss": 0.1})


def test_likely_causes_are_those_that_the_settings_leave_possible() -> None:
    vllm = {"type": "vllm", "max_response_tokens": 6, "temperature": 0.7}
    hot = RunConfig.model_validate({**CONFIG, "rollout": vllm})
    causes = likely_causes(hot, replace(PLAN, rollout_dtype="bfloat16"))
    kinds = ("precision", "cascade attention", "temperature of 0.7", "stale weights")
    assert [kind in cause for kind, cause in zip(kinds, causes, strict=True)] == [True] * 4
    set_right = RunConfig.model_validate({**CONFIG, "rollout": {**vllm, "engine_args": {"disable_cascade_attn": True}}})
    assert not any("cascade" in cause for cause in likely_causes(set_right, PLAN))
    assert [cause.split(":")[0] for cause in likely_causes(config(), PLAN)] == ["stale weights"]
