"""Predicted time: a roofline with a range, nothing for what is not known, and the directions it must move in."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rlctl_hw.lengths import lengths
from rlctl_hw.plan import plan
from rlctl_hw.probe import parse_hardware
from rlctl_hw.timing import FASTEST, SLOWEST, step_seconds
from rlctl_hw.types import Corrections, Hardware, Nic, Pins, Plan

from tests.plans import built_in, workload

LARGE = workload(built_in("7B"), rollout="vllm", prompts_per_step=256, max_prompt_tokens=512, max_response_tokens=1024)
SAME = Pins(
    recompute="full", offload_params=False, offload_optimizer=False, rollout_tensor_parallel=1,
    max_tokens_per_micro_batch=8192, gpu_memory_share=0.5,
)  # fmt: skip
"""One layout, so that only what a test changes makes a difference."""


def seconds(made: Plan, phase: str) -> float:
    return next(time.seconds for time in made.times if time.phase == phase)


def step(made: Plan) -> float:
    found = step_seconds(made)
    assert found is not None
    return found[0]


def unknown(machine: Hardware) -> Hardware:
    devices = tuple(replace(device, name="A device of tomorrow", catalogue=None) for device in machine.devices)
    return replace(machine, devices=devices)


def test_the_range_begins_at_the_roofline_and_ends_at_three_times_it():
    for time in plan(LARGE, parse_hardware("h100:8")).times:
        assert time.low_s == pytest.approx(FASTEST * time.roofline_s)
        assert time.high_s == pytest.approx(SLOWEST * time.roofline_s)
        assert time.low_s <= time.seconds <= time.high_s
        assert time.origin == "assumed"


def test_no_time_is_predicted_for_a_device_that_nobody_knows():
    made = plan(LARGE, unknown(parse_hardware("h100:8")))
    assert made.times == ()
    assert step_seconds(made) is None
    assert plan(workload(), parse_hardware("cpu:2")).times == ()


def test_measured_rates_give_an_unknown_device_a_time():
    measured = Corrections(matmul_tflops=700.0, bandwidth_gb_per_s=2700.0, time_factors={"generation": 2.0})
    made = plan(LARGE, replace(unknown(parse_hardware("h100:8")), corrections=measured))
    generation = next(time for time in made.times if time.phase == "generation")
    assert generation.origin == "measured"
    assert generation.seconds == pytest.approx(2 * generation.roofline_s)


@settings(max_examples=10)
@given(st.integers(64, 2048), st.integers(1, 2048))
def test_longer_responses_never_take_less_time(tokens: int, more: int):
    asked = replace(LARGE, pins=SAME, max_response_tokens=tokens)
    longer = replace(asked, max_response_tokens=tokens + more)
    machine = parse_hardware("h100:8")
    assert step(plan(asked, machine)) <= step(plan(longer, machine)) + 1e-9


def test_the_longest_response_rules_generation():
    machine = parse_hardware("h100:8")
    short = replace(LARGE, max_response_tokens=8192, mean_response_tokens=512, prompts_per_step=8)
    found = lengths(short)
    assert found.longest > 3 * found.mean
    assert f"{found.longest:.0f} decode steps" in plan(short, machine).times[0].why


def test_the_expected_length_can_be_told():
    assert lengths(replace(LARGE, mean_response_tokens=100)).mean == 100
    assert lengths(replace(LARGE, mean_response_tokens=5000)).mean == 1024, "the longest allowed bounds the mean"


def test_recomputing_and_moving_cost_time():
    machine = parse_hardware("h100:8")
    update = {
        savings: seconds(plan(replace(LARGE, pins=replace(SAME, **dict(savings))), machine), "actor_update")
        for savings in ((("recompute", "none"), ("max_tokens_per_micro_batch", 4096)), (), (("offload_params", True),))
    }
    none, recomputed, moved = update.values()
    assert none < recomputed < moved


def test_slow_ports_between_nodes_slow_gathering_weights():
    fast, slow = (
        replace(parse_hardware("h100:8x4"), nics=tuple(Nic(f"mlx5_{i}", rate) for i in range(8)))
        for rate in (50.0, 1.0)
    )
    asked = replace(LARGE, pins=SAME)
    assert seconds(plan(asked, fast), "actor_update") < seconds(plan(asked, slow), "actor_update")


def test_a_faster_device_takes_less_time():
    asked = replace(LARGE, pins=SAME)
    assert step(plan(asked, parse_hardware("h100:8"))) < step(plan(asked, parse_hardware("a100:8")))


def test_adapters_skip_the_weights_own_gradients():
    machine, full = parse_hardware("h100:8"), replace(LARGE, pins=SAME, roles=("actor",))
    adapters = replace(full, lora_rank=16)
    assert seconds(plan(adapters, machine), "actor_update") < seconds(plan(full, machine), "actor_update")


def test_a_critic_adds_its_passes():
    phases = {time.phase for time in plan(replace(LARGE, roles=("actor", "critic")), parse_hardware("h200:8")).times}
    assert {"values", "critic_update"} <= phases


def test_checkpoints_are_not_part_of_a_step():
    made = plan(LARGE, parse_hardware("h100:8"))
    assert step(made) == pytest.approx(sum(time.seconds for time in made.times if time.phase != "checkpoint"))


def test_what_an_algorithm_does_beside_takes_its_time():
    def phases(**changes: object) -> dict[str, float]:
        made = plan(replace(LARGE, pins=SAME, **changes), parse_hardware("h100:8"))
        return {time.phase: time.seconds for time in made.times}

    usual, greedy, ahead = phases(), phases(greedy_responses=1), phases(reads_ahead=True)
    assert greedy["generation"] > usual["generation"] and greedy["actor_update"] == usual["actor_update"]
    assert ahead["actor_update"] == pytest.approx(usual["actor_update"] * 4 / 3, rel=0.1)
    rounds = plan(replace(LARGE, pins=SAME, max_rounds=3), parse_hardware("h100:8"))
    assert "may take 3" in next(time.why for time in rounds.times if time.phase == "generation")
