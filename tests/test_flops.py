"""The model's own operations against counts by hand, their rates, and MFU only where a peak is known."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from rlctl_hw.types import PassFlops

from rlctl import planning, resolve
from rlctl_train.flops import Flops
from tests import runs

LENGTHS = np.array([[4, 6], [4, 2], [10, 5], [10, 0]])
PLAN = replace(
    runs.PLAN,
    trainer_devices=2,
    rollout_devices=4,
    pass_flops=(PassFlops("actor", 1e9, 1e6), PassFlops("critic", 2e9, 0)),
)


def test_tokens_of_a_shared_prompt_count_once_and_squares_for_every_sequence() -> None:
    flops = Flops(PLAN)
    flops.count("update_actor", "actor", LENGTHS, 2, passes=3)
    flops.count("values", "critic", LENGTHS, 1)
    made = flops.take({"timing_s/update_actor": 2.0, "timing_s/values": 1.0})
    tokens, squares = 6 + 2 + 5 + 4 + 10, 100 + 36 + 225 + 100
    assert made == {
        "perf/tflops/update_actor": pytest.approx(3 * (1e9 * tokens + 1e6 * squares) / 2.0 / 2 / 1e12),
        "perf/tflops/values": pytest.approx(2e9 * (13 + 28) / 1.0 / 2 / 1e12),
    }
    assert flops.take({"timing_s/update_actor": 2.0}) == {}, "each step counts anew"


def test_generation_is_shared_by_the_rollout_devices_and_a_reference_without_a_device_is_the_actor() -> None:
    flops = Flops(replace(PLAN, peak_tflops=0.5))
    flops.count("gen", "actor", LENGTHS, 2)
    flops.count("ref", "reference", LENGTHS, 2)
    made = flops.take({"timing_s/gen": 1.0, "timing_s/ref": 1.0})
    assert made["perf/tflops/ref"] == pytest.approx(2 * made["perf/tflops/gen"])
    assert made["perf/mfu/gen"] == pytest.approx(made["perf/tflops/gen"] / 0.5)


def test_a_phase_that_was_not_timed_and_a_plan_that_tells_nothing_have_no_rate() -> None:
    flops = Flops(PLAN)
    flops.count("gen", "actor", LENGTHS, 2)
    assert flops.take({}) == {}
    silent = Flops(runs.PLAN)
    silent.count("gen", "actor", LENGTHS, 2)
    assert silent.take({"timing_s/gen": 1.0}) == {}


@pytest.mark.parametrize(("machine", "peak"), [("h100-80gb:8", 989.0), ("cpu:2", None)])
def test_the_plan_knows_operations_by_the_models_size_and_the_peak_by_the_catalogue(
    machine: str, peak: float | None
) -> None:
    config = resolve.build("qwen2.5-7b-grpo" if peak else "quickstart").config
    plan = planning.plan_for(planning.workload_of(config), planning.hardware_named(machine))
    assert plan.peak_tflops == (pytest.approx(peak, rel=0.01) if peak else None)
    actor = next(one for one in plan.pass_flops if one.role == "actor")
    if peak:
        # Qwen2.5-7B: 7.62e9 parameters, 0.545e9 of them the input embedding; 28 layers of 28 heads of 128.
        assert actor.per_token == pytest.approx(2 * (7.615e9 - 0.545e9), rel=0.005)
        assert actor.per_square == 2 * 28 * 28 * 128
