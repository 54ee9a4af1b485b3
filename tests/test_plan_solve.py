"""Inverse questions are answered tightly, and remedies do what they say."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rlctl_hw.plan import plan
from rlctl_hw.probe import parse_hardware
from rlctl_hw.remedies import remedies
from rlctl_hw.solving import solve
from rlctl_hw.types import DoesNotFit, Hardware, Pins, Workload

from tests.plans import built_in, hardware, pin_sets, with_memory, workload, workloads

LARGE = workload(built_in("7B"), rollout="vllm", prompts_per_step=64, max_prompt_tokens=512, max_response_tokens=1024)
SIZES = st.floats(24.0, 80.0)


def planned(asked: Workload, machine: Hardware) -> bool:
    try:
        plan(asked, machine, with_remedies=False)
    except DoesNotFit:
        return False
    return True


def pinned(asked: Workload, **pins: float) -> Workload:
    return replace(asked, pins=replace(asked.pins, **pins))


@settings(max_examples=6)
@given(SIZES)
def test_one_device_fewer_does_not_fit(gib: float):
    machine = with_memory(parse_hardware("h100:8"), gib)
    found = solve("gpus", LARGE, machine)
    count = round(found.value)
    assert planned(LARGE, replace(machine, devices=machine.devices[: min(count, 8)], num_nodes=max(1, count // 8)))
    if 1 < count <= 8:
        assert not planned(LARGE, replace(machine, devices=machine.devices[: count - 1]))


@settings(max_examples=6)
@given(SIZES)
def test_one_token_more_does_not_fit(gib: float):
    machine = with_memory(parse_hardware("h100:8"), gib)
    asked = replace(LARGE, shape=replace(LARGE.shape, max_position=None))
    try:
        length = round(solve("seq_len", asked, machine).value)
    except DoesNotFit:
        assert not planned(replace(asked, max_response_tokens=1), machine)
        return
    assert planned(replace(asked, max_response_tokens=length - 512), machine)
    assert not planned(replace(asked, max_response_tokens=length - 511), machine)


@settings(max_examples=6)
@given(SIZES)
def test_one_token_more_in_a_micro_batch_does_not_fit(gib: float):
    machine = with_memory(parse_hardware("h100:8"), gib)
    try:
        tokens = round(solve("micro_batch_tokens", LARGE, machine).value)
    except DoesNotFit:
        assert not planned(pinned(LARGE, max_tokens_per_micro_batch=LARGE.longest_tokens), machine)
        return
    assert planned(pinned(LARGE, max_tokens_per_micro_batch=tokens), machine)
    whole = LARGE.longest_tokens * LARGE.step_sequences
    assert tokens == whole or not planned(pinned(LARGE, max_tokens_per_micro_batch=tokens + 1), machine)


def test_one_rank_more_does_not_fit():
    machine = parse_hardware("rtx4090:1")
    alone = replace(LARGE, roles=("actor",))
    rank = round(solve("lora_rank", alone, machine).value)
    assert 1 < rank < alone.shape.hidden_size
    assert planned(replace(alone, lora_rank=rank), machine)
    assert not planned(replace(alone, lora_rank=rank + 1), machine)


def test_one_hundredth_more_of_the_device_does_not_fit():
    machine = parse_hardware("h100:8")
    share = solve("gpu_memory_utilization", LARGE, machine).value
    assert planned(pinned(LARGE, gpu_memory_share=share), machine)
    assert not planned(pinned(LARGE, gpu_memory_share=share + 0.01), machine)


def test_questions_without_an_answer_say_why():
    with pytest.raises(DoesNotFit, match="takes what it needs"):
        solve("gpu_memory_utilization", workload(), parse_hardware("h100:1"))
    with pytest.raises(DoesNotFit, match="no accelerators"):
        solve("gpus", workload(), parse_hardware("cpu:2"))


def test_the_answer_says_what_the_next_value_lacks():
    found = solve("micro_batch_tokens", LARGE, with_memory(parse_hardware("h100:8"), 60))
    assert "needs" in found.limit and "GiB" in found.limit
    assert found.plan.max_tokens_per_micro_batch == found.value


@settings(max_examples=25)
@given(workloads(pin_sets), hardware)
def test_a_remedy_that_is_applied_fits(asked: Workload, machine: Hardware):
    if planned(asked, machine):
        return
    for remedy in remedies(asked, machine):
        assert planned(remedy.workload, remedy.hardware), remedy.text


def test_remedies_are_settings_or_another_machine():
    asked = pinned(LARGE, max_tokens_per_micro_batch=400_000)
    first, *others = remedies(asked, parse_hardware("h100:8"))
    assert first.settings == {"engine.max_tokens_per_micro_batch": None}
    assert first.workload.pins == Pins()
    assert all(other.settings or other.hardware != parse_hardware("h100:8") for other in others)
