"""The search over layouts: only legal ones, the fastest first, each loser with its reason."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rlctl_hw.calculator import check
from rlctl_hw.layouts import RolloutSplit, island_size, rollout_splits, savings_ladder, train_meshes
from rlctl_hw.model_catalogue import known_shape
from rlctl_hw.plan import plan
from rlctl_hw.probe import parse_hardware
from rlctl_hw.ranking import rank
from rlctl_hw.search import best, fits, tried
from rlctl_hw.setup import Setup
from rlctl_hw.types import DoesNotFit, Hardware, Mesh, ModelShape, Pins, Workload

from tests.plans import built_in, hardware, workload, workloads


def known(name: str) -> ModelShape:
    shape = known_shape(name)
    assert shape is not None
    return shape


MOE = known("Qwen/Qwen3-30B-A3B")
LARGE = workload(built_in("7B"), rollout="vllm", prompts_per_step=256, max_prompt_tokens=512, max_response_tokens=1024)


def accelerated(asked: Workload) -> Workload:
    return replace(asked, engine="megatron", rollout="vllm")


@settings(max_examples=15)
@given(workloads().map(accelerated), st.sampled_from(["a100:3", "h100:8", "h100:8x4", "mi300x:8"]))
def test_every_layout_that_is_tried_is_legal(asked: Workload, spec: str):
    machine = parse_hardware(spec)
    try:
        found = tried(asked, machine)
    except DoesNotFit as refusal:
        assert refusal.remedies
        return
    for one in found:
        mesh, rollout = one.candidate.mesh, one.candidate.rollout
        assert mesh.world_size == one.candidate.trainer_devices
        assert max(mesh.tp, rollout.tensor) <= island_size(machine)
        assert one.candidate.rollout_devices % rollout.num_devices == 0
        check(Setup(asked.shape, "megatron", "update", mesh, seq_len=8192))
        check(Setup(asked.shape, "megatron", "rollout", Mesh(tp=rollout.tensor)))


def test_islands_bound_tensor_parallelism():
    machine = parse_hardware("h100:8")
    assert island_size(machine) == 8
    halves = replace(machine, islands=((0, 1, 2, 3), (4, 5, 6, 7)))
    assert max(mesh.tp for mesh in train_meshes(accelerated(LARGE), halves, 8)) == 4
    loners = replace(machine, islands=((0, 1),))
    assert rollout_splits(LARGE, loners, 8) == [RolloutSplit(1)]


def test_a_degree_that_does_not_divide_the_heads_is_refused_with_both_numbers():
    asked = replace(LARGE, pins=Pins(rollout_tensor_parallel=8))
    with pytest.raises(DoesNotFit, match="28 does not divide by tp 8") as caught:
        plan(asked, parse_hardware("h100:8"))
    assert caught.value.remedies == ("unset rollout.tensor_parallel",)


def test_pinned_degrees_are_the_only_ones_and_impossible_ones_are_named():
    pins = Pins(tensor_parallel=2, pipeline_parallel=4)
    made = plan(replace(accelerated(LARGE), pins=pins), parse_hardware("h100:8"))
    assert (made.mesh.tp, made.mesh.pp, made.mesh.dp_shard) == (2, 4, 1)
    with pytest.raises(DoesNotFit, match=r"engine.tensor_parallel=5"):
        plan(replace(accelerated(LARGE), pins=Pins(tensor_parallel=5)), parse_hardware("h100:8"))


def test_pins_of_savings_leave_their_rungs_only():
    rungs = savings_ladder(replace(LARGE, pins=Pins(recompute="full", offload_params=True)), parse_hardware("h100:8"))
    assert {(rung.recompute, rung.offload_params) for rung in rungs} == {("full", True)}


def test_the_fastest_that_fits_is_taken():
    found = tried(LARGE, parse_hardware("h100:8"))
    chosen = best(found)
    assert chosen is not None
    assert chosen.step_s == min(one.step_s for one in found if one.step_s is not None)


@settings(max_examples=20)
@given(workloads(), hardware)
def test_fitting_agrees_with_planning(asked: Workload, machine: Hardware):
    try:
        plan(asked, machine, with_remedies=False)
    except DoesNotFit:
        assert not fits(asked, machine)
    else:
        assert fits(asked, machine)


def test_ranks_rise_with_time_and_losers_have_reasons():
    ranked = rank(LARGE, parse_hardware("h100:8"))
    times = [one.tried.step_s for one in ranked if one.tried is not None and one.tried.step_s is not None]
    assert times == sorted(times)
    assert {(one.engine, one.placement) for one in ranked} >= {("fsdp2", "colocated"), ("megatron", "colocated")}
    assert ranked[0].lost == ""
    assert all(one.lost for one in ranked[1:])


def test_what_is_ranked_first_is_never_slower_than_the_plan_asked_for():
    machine = parse_hardware("h100:8x4")
    asked = replace(LARGE, shape=MOE)
    first = rank(asked, machine)[0].tried
    alone = best(tried(asked, machine))
    assert first is not None and alone is not None
    assert first.step_s is not None and alone.step_s is not None
    assert first.step_s <= alone.step_s


def test_the_largest_model_gets_expert_parallelism_over_many_nodes():
    shape = known("deepseek-ai/DeepSeek-V3")
    made = plan(replace(accelerated(LARGE), shape=shape, roles=("actor",)), parse_hardware("h100:8x32"))
    assert made.mesh.ep > 1
    assert made.mesh.world_size == 256
    assert made.mesh.tp <= 8
    assert made.rollout_tensor_parallel * made.rollout_pipeline_parallel > 8


def test_adapters_of_a_7b_model_are_trained_on_one_consumer_card():
    asked = replace(LARGE, lora_rank=32, roles=("actor",), has_reference=True)
    made = plan(asked, parse_hardware("rtx4090:1"))
    assert made.savings.offload_params
    with pytest.raises(DoesNotFit):
        plan(LARGE, parse_hardware("rtx4090:1"))


def test_megatron_brings_its_states_down_with_more_splits():
    machine, asked = parse_hardware("h200:8"), accelerated(LARGE)
    kept = Pins(tensor_parallel=1, recompute="full", offload_params=False, offload_optimizer=False)
    by_split = {pp: plan(replace(asked, pins=replace(kept, pipeline_parallel=pp)), machine) for pp in (1, 4)}
    weights = {
        pp: sum(p.gib for p in made.memory if (p.phase, p.part) == ("optimizer_step", "weights"))
        for pp, made in by_split.items()
    }
    assert weights[4] < 0.5 * weights[1]
