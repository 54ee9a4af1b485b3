"""The planner: what it chooses, keeps and refuses, on machines that exist only as numbers."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from rlctl_hw.budgets import LIMIT_SHARE
from rlctl_hw.explain import memory_table, sentences
from rlctl_hw.memory import peak_gib
from rlctl_hw.plan import plan
from rlctl_hw.probe import parse_hardware
from rlctl_hw.types import DoesNotFit, Hardware, Pins, Plan, Savings, Workload

from tests.plans import TINY, built_in, hardware, pin_sets, with_memory, workload, workloads

FIELD_OF_PIN = {
    "max_concurrent": "rollout_max_concurrent",
    "gpu_memory_share": "rollout_gpu_memory_share",
    "tensor_parallel": "tp",
    "pipeline_parallel": "pp",
    "context_parallel": "cp",
    "expert_parallel": "ep",
}


def chosen(made: Plan, pin: str) -> Any:
    """Return what the plan holds for a pin."""
    home = next(home for home in (made, made.savings, made.mesh) if FIELD_OF_PIN.get(pin, pin) in vars(home))
    return getattr(home, FIELD_OF_PIN.get(pin, pin))


def refusal(asked: Workload, spec: str) -> DoesNotFit:
    with pytest.raises(DoesNotFit) as caught:
        plan(asked, parse_hardware(spec))
    return caught.value


def reason(made: Plan, key: str) -> str:
    return next(choice.reason for choice in made.choices if choice.key == key)


@settings(max_examples=60)
@given(workloads(), hardware)
def test_a_plan_stays_within_its_budgets(asked: Workload, machine: Hardware):
    try:
        made = plan(asked, machine)
    except DoesNotFit as error:
        assert error.remedies
        return
    assert peak_gib(made.memory)[1] <= LIMIT_SHARE * made.device_memory_gib + 1e-6
    assert made.max_tokens_per_micro_batch >= asked.longest_tokens
    assert made.rollout_max_concurrent >= 1
    assert made.threads_per_worker >= 1
    assert 0 <= made.rollout_gpu_memory_share <= 1
    assert 0 < made.object_store_gib < machine.host_memory_gib


@settings(max_examples=60)
@given(workloads(pin_sets), hardware)
def test_pins_are_kept_or_refused(asked: Workload, machine: Hardware):
    try:
        made = plan(asked, machine)
    except DoesNotFit as error:
        assert error.what
        assert error.remedies
        return
    for field in fields(Pins):
        pinned = getattr(asked.pins, field.name)
        if pinned is not None:
            assert chosen(made, field.name) == pinned


@settings(max_examples=60)
@given(workloads(), hardware, st.floats(1.0, 4.0))
def test_more_memory_never_lowers_a_budget_of_the_same_layout(asked: Workload, machine: Hardware, factor: float):
    layout = Pins(recompute="full", offload_params=False, offload_optimizer=False, rollout_tensor_parallel=1)
    asked = replace(asked, pins=layout)
    try:
        before = plan(asked, machine)
    except DoesNotFit:
        assume(False)
        return
    after = plan(asked, with_memory(machine, factor * before.device_memory_gib))
    assert after.max_tokens_per_micro_batch >= before.max_tokens_per_micro_batch
    assert after.rollout_max_concurrent >= before.rollout_max_concurrent


@settings(max_examples=60)
@given(workloads(pin_sets), hardware)
def test_a_plan_is_a_function_and_survives_json(asked: Workload, machine: Hardware):
    try:
        made = plan(asked, machine)
    except DoesNotFit:
        return
    assert plan(asked, machine) == made
    assert Plan.from_json(json.loads(json.dumps(made.to_json()))) == made


def test_on_cpu_one_process_a_side_takes_turns_with_all_cores():
    made = plan(workload(), parse_hardware("cpu:2"))
    assert (made.trainer_devices, made.rollout_devices, made.threads_per_worker) == (1, 1, 2)
    assert (made.compute_dtype, made.rollout_dtype) == ("float32", "float32")
    assert made.max_tokens_per_micro_batch == 4096


def test_on_cpu_split_sides_divide_the_cores():
    asked = workload(placement="split")
    assert plan(asked, parse_hardware("cpu:4")).threads_per_worker == 2
    assert plan(asked, parse_hardware("cpu:1")).notes == ("trainer and rollout share one core",)


def test_more_threads_than_a_small_model_can_use_are_not_taken():
    made = plan(workload(), parse_hardware("cpu:64"))
    assert made.threads_per_worker == 4
    assert "do not speed up" in reason(made, "trainer.threads_per_worker")


def test_colocated_devices_all_train_and_generate():
    made = plan(workload(), parse_hardware("h100:8"))
    assert (made.trainer_devices, made.rollout_devices, made.compute_dtype) == (8, 8, "bfloat16")


def test_split_devices_are_halved_or_what_a_pin_leaves():
    asked = workload(placement="split")
    made = plan(asked, parse_hardware("h100:8"))
    assert (made.trainer_devices, made.rollout_devices) == (4, 4)
    made = plan(replace(asked, pins=Pins(rollout_devices=6)), parse_hardware("h100:8"))
    assert (made.trainer_devices, made.rollout_devices) == (2, 6)
    made = plan(replace(asked, pins=Pins(trainer_devices=3)), parse_hardware("h100:8"))
    assert (made.trainer_devices, made.rollout_devices) == (3, 5)


def test_devices_that_a_mini_batch_cannot_feed_stay_idle_and_are_said():
    made = plan(workload(prompts_per_step=1, group_size=4), parse_hardware("h100:8"))
    assert made.trainer_devices == 4
    assert "4 of 8 devices stay idle" in made.notes


@pytest.mark.parametrize(("spec", "dtype"), [("t4:1", "float32"), ("a10:1", "bfloat16"), ("mi300x:1", "bfloat16")])
def test_precision_follows_the_device(spec: str, dtype: str):
    assert plan(workload(), parse_hardware(spec)).compute_dtype == dtype


def test_pinned_devices_beyond_those_present_name_both_numbers():
    error = refusal(workload(pins=Pins(trainer_devices=16)), "h100:8")
    assert "trainer.num_devices=16" in error.what
    assert "8 cuda devices" in error.what
    assert "2 CPU cores" in refusal(workload(pins=Pins(rollout_devices=3)), "cpu:2").what


def test_split_sides_that_exceed_the_machine_name_their_sum():
    asked = workload(placement="split", pins=Pins(trainer_devices=6, rollout_devices=6))
    assert "12 together, but there are 8" in refusal(asked, "h100:8").what
    assert "set placement=colocated" in refusal(workload(placement="split"), "h100:1").remedies


def test_colocated_sides_of_different_size_are_refused():
    asked = workload(pins=Pins(trainer_devices=2, rollout_devices=4))
    assert "set placement=split" in refusal(asked, "h100:8").remedies


def test_a_model_too_large_is_refused_with_numbers_and_ways_out_that_work():
    asked = workload(built_in("7B"), roles=("actor", "critic", "reference"), rollout="vllm")
    error = refusal(asked, "h100:1")
    assert "79.1 GiB" in error.what
    nodes = next(remedy for remedy in error.remedies if remedy.startswith("use "))
    assert plan(asked, parse_hardware(f"h100:1x{nodes.split()[1]}"))


def test_what_saves_memory_is_chosen_where_it_must_be_and_offered_where_it_is_pinned_off():
    asked = workload(built_in("7B"), rollout="vllm", max_prompt_tokens=1024, max_response_tokens=15000)
    made = plan(asked, parse_hardware("h100:8"))
    assert made.savings.recompute == "full"
    assert reason(made, "engine.gradient_checkpointing") == "nothing else fits"
    error = refusal(replace(asked, pins=Pins(recompute="none")), "h100:8")
    assert error.remedies[0] == "unset engine.gradient_checkpointing"


def test_a_small_run_saves_nothing():
    made = plan(workload(built_in("0.5B"), rollout="vllm"), parse_hardware("h100:8"))
    assert made.savings == Savings()
    assert made.rollout_tensor_parallel == 1


def test_a_pin_that_does_not_fit_is_refused_and_unsetting_it_is_offered():
    asked = workload(built_in("7B"), prompts_per_step=1024, pins=Pins(max_tokens_per_micro_batch=100_000))
    error = refusal(asked, "h100:8")
    assert "actor_update needs" in error.what
    assert error.remedies[0] == "unset engine.max_tokens_per_micro_batch"


def test_a_micro_batch_below_one_sequence_is_refused():
    error = refusal(workload(pins=Pins(max_tokens_per_micro_batch=100)), "cpu:2")
    assert "set engine.max_tokens_per_micro_batch=384 or more, or unset it" in error.remedies


def test_a_share_in_which_vllm_cannot_live_is_refused():
    asked = workload(built_in("7B"), rollout="vllm", pins=Pins(gpu_memory_share=0.1, rollout_tensor_parallel=1))
    assert "7.9 GiB, but vLLM needs" in refusal(asked, "h100:8").what


def test_an_object_store_larger_than_the_host_is_refused():
    assert "ray.object_store_gib" in refusal(workload(pins=Pins(object_store_gib=100.0)), "cpu:2").what


def test_a_host_too_small_to_load_or_to_offload_is_refused():
    machine = replace(parse_hardware("h100:8"), host_memory_gib=40.0)
    with pytest.raises(DoesNotFit, match="the host needs"):
        plan(workload(built_in("7B")), machine)


def test_distributions_of_more_tokens_than_can_travel_are_refused_with_their_size():
    asked = workload(built_in("0.5B"), full_kl=True)
    error = refusal(asked, "h100:8")
    assert "algo.kl_loss_estimator=full would take 18.5 GiB" in error.what
    assert "k3" in error.remedies[0] and "at most 28268 response tokens" in error.remedies[1]
    assert plan(replace(asked, full_kl=False), parse_hardware("h100:8"))
    fewer = replace(asked, max_response_tokens=28268 // asked.step_sequences)
    made = plan(fewer, parse_hardware("h100:8"))
    assert made.object_store_gib > 15.9 and next(p for p in made.host_memory if p.part == "distributions").gib > 150


def test_sequences_beyond_the_models_reach_are_refused():
    short = replace(TINY, max_position=300)
    assert "set rollout.max_response_tokens=172" in refusal(workload(short), "cpu:2").remedies


def test_vllm_on_cpu_refuses_small_heads_and_a_small_cache():
    narrow = replace(TINY, head_dim=16)
    assert "at least 32 features" in refusal(workload(narrow, rollout="vllm"), "cpu:2").what
    asked = workload(built_in("7B"), rollout="vllm", kv_cache_gib=0.01)
    assert "rollout.kv_cache_gib=0.01 cannot hold one sequence" in refusal(asked, "cpu:64").what


def test_vllm_refuses_bfloat16_where_the_device_has_none():
    asked = workload(rollout="vllm", pins=Pins(rollout_dtype="bfloat16"))
    assert refusal(asked, "t4:1").remedies == ("set rollout.dtype=float32",)


def test_pinned_bfloat16_on_an_old_device_is_kept_and_warned_of():
    made = plan(workload(pins=Pins(compute_dtype="bfloat16")), parse_hardware("t4:1"))
    assert made.compute_dtype == "bfloat16"
    assert "emulated" in made.notes[0]


def test_small_shared_memory_is_noted():
    made = plan(workload(), replace(parse_hardware("cpu:2"), shm_gib=0.0625))
    assert "--shm-size" in made.notes[0]


def test_the_smallest_of_different_devices_is_planned_for():
    machine = parse_hardware("h100:2")
    mixed = replace(machine, devices=(machine.devices[0], *parse_hardware("rtx4090:1").devices))
    made = plan(workload(), mixed)
    assert made.device_memory_gib == 23.6
    assert any("devices differ" in note for note in made.notes)


def test_every_number_that_is_not_pinned_has_its_reason():
    made = plan(workload(built_in("0.5B"), rollout="vllm"), parse_hardware("h100:1"))
    assert len({choice.key for choice in made.choices}) == len(made.choices) == 14
    assert all(choice.reason and choice.origin for choice in made.choices)
    pinned = plan(workload(pins=Pins(compute_dtype="float32", max_concurrent=4)), parse_hardware("cpu:2"))
    assert not {"engine.compute_dtype", "rollout.max_concurrent"} & {choice.key for choice in pinned.choices}


def test_the_plan_reads_as_sentences_and_a_table():
    made = plan(workload(), parse_hardware("cpu:2"))
    lines = sentences(made)
    assert lines[0] == "1 CPU worker trains in float32 and 1 CPU worker generates in float32."
    assert any(line.startswith("Memory is fullest during") for line in lines)
    table = memory_table(made)
    assert table.totals_gib == tuple(map(sum, table.gib))
    assert len(table.phases) == len(table.gib)
    assert all(len(row) == len(table.parts) for row in table.gib)


def test_a_copy_for_checkpoints_that_does_not_fit_can_be_gone_without():
    asked = workload(built_in("0.5B"), copied_roles=("actor",))
    with pytest.raises(DoesNotFit) as caught:
        plan(asked, with_memory(parse_hardware("cpu:2"), 22))
    assert caught.value.remedies[0] == "set checkpoint.asynchronous=false"
