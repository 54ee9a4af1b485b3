"""The memory model: sums, monotony, and totals that can be counted by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rlctl_hw.host_memory import host_memory
from rlctl_hw.memory import bands, memory, peak_gib, phase_gib, phases_of
from rlctl_hw.needs import PARTS, PHASES
from rlctl_hw.params import kv_bytes_per_token
from rlctl_hw.probe import parse_hardware
from rlctl_hw.training_memory import busy_role, role_params
from rlctl_hw.types import Layout, Mesh, Savings, Workload

from tests.plans import TINY, built_in, workload, workloads

GIB = 2**30
ON_GPU = Layout(
    device="cuda",
    memory_gib=80.0,
    trainer_devices=4,
    rollout_devices=4,
    compute_dtype="bfloat16",
    rollout_dtype="bfloat16",
    max_tokens_per_micro_batch=8192,
    max_concurrent=16,
    gpu_memory_share=0.5,
    mesh=Mesh(dp_shard=4),
)
ON_ONE = replace(ON_GPU, trainer_devices=1, mesh=Mesh())
ON_CPU = replace(ON_ONE, device="cpu", rollout_devices=1, compute_dtype="float32", rollout_dtype="float32")
layouts = st.sampled_from([ON_GPU, ON_CPU, ON_ONE, replace(ON_GPU, compute_dtype="float32")])


def part(workload: Workload, layout: Layout, phase: str, name: str) -> float:
    return sum(p.gib for p in memory(workload, layout) if (p.phase, p.part) == (phase, name))


def all_phases(workload: Workload, layout: Layout) -> list[float]:
    return [phase_gib(phase, workload, layout) for phase in PHASES if phase != "critic_update"]


@given(workloads(), layouts)
def test_parts_add_up_to_the_phase(asked: Workload, layout: Layout):
    parts = memory(asked, layout)
    for phase in PHASES:
        total = sum(p.gib for p in parts if p.phase == phase)
        left_out = phase not in phases_of(asked, layout)
        assert total == pytest.approx(0 if left_out else phase_gib(phase, asked, layout))
    for band in bands(asked, layout):
        assert band.low_gib <= band.gib <= band.high_gib
    assert all(p.gib > 0 and p.part in PARTS for p in parts)


@given(workloads(), layouts, st.integers(1, 5000))
def test_longer_sequences_never_take_less(asked: Workload, layout: Layout, more: int):
    longer = replace(asked, max_response_tokens=asked.max_response_tokens + more)
    assert all(a <= b + 1e-9 for a, b in zip(all_phases(asked, layout), all_phases(longer, layout), strict=True))


@given(workloads(), layouts, st.integers(1, 20000), st.integers(1, 300))
def test_more_at_one_time_never_takes_less(asked: Workload, layout: Layout, tokens: int, rows: int):
    fuller = replace(
        layout,
        max_tokens_per_micro_batch=layout.max_tokens_per_micro_batch + tokens,
        max_concurrent=layout.max_concurrent + rows,
    )
    assert all(a <= b + 1e-9 for a, b in zip(all_phases(asked, layout), all_phases(asked, fuller), strict=True))


@given(workloads(), layouts)
def test_savers_never_cost_memory(asked: Workload, layout: Layout):
    saving = replace(layout, savings=Savings("full", offload_params=True, offload_optimizer=True))
    for before, after in zip(all_phases(asked, layout), all_phases(asked, saving), strict=True):
        assert after <= before + 1e-9


def test_states_are_sixteen_bytes_a_parameter_over_the_ranks():
    asked = workload(built_in("7B"), roles=("actor",))
    states = sum(part(asked, ON_GPU, "actor_update", name) for name in ("weights", "gradients", "optimizer"))
    assert states == pytest.approx(16 * asked.shape.num_params / 4 / GIB)


def test_a_reference_adds_weights_and_no_moments():
    alone, both = workload(built_in("7B"), roles=("actor",)), workload(built_in("7B"))
    quarter = both.shape.num_params / 4 / GIB
    assert part(both, ON_GPU, "logprobs", "weights") - part(alone, ON_GPU, "logprobs", "weights") == pytest.approx(
        4 * quarter
    )
    assert part(both, ON_GPU, "logprobs", "optimizer") == part(alone, ON_GPU, "logprobs", "optimizer")


def test_a_critic_has_a_value_head_in_place_of_the_output_projection():
    shape = built_in("7B")
    assert role_params(shape, "critic") == shape.num_params - 152064 * 3584 + 3584
    assert role_params(TINY, "critic") == TINY.num_params + 128


def test_offloaded_states_leave_accelerators_and_stay_on_cpu():
    asked, away = workload(placement="split"), Savings(offload_params=True, offload_optimizer=True)
    on_gpu = replace(ON_GPU, savings=away)
    assert part(asked, on_gpu, "actor_update", "optimizer") == 0
    assert part(asked, on_gpu, "optimizer_step", "optimizer") > 0
    assert part(asked, replace(ON_CPU, savings=away), "generation", "optimizer") == pytest.approx(
        8 * TINY.num_params / GIB
    )


def test_the_kv_cache_is_counted_by_hand():
    assert kv_bytes_per_token(built_in("7B"), 2) == 2 * 28 * 4 * 128 * 2
    asked = workload(built_in("7B"))
    by_hand = 16 * (128 + 256) * 57344 / GIB
    assert part(asked, ON_GPU, "generation", "kv_cache") == pytest.approx(by_hand)


def test_vllm_fills_its_share_while_it_generates_and_little_while_it_sleeps():
    asked = workload(built_in("0.5B"), rollout="vllm", placement="split", roles=("actor",))
    assert phase_gib("generation", asked, ON_GPU) == pytest.approx(40)
    beside = replace(asked, placement="colocated")
    assert phase_gib("logprobs", beside, ON_GPU) - phase_gib("logprobs", asked, ON_GPU) < 2


def test_vllm_is_whole_while_weights_arrive():
    asked = workload(built_in("0.5B"), rollout="vllm")
    assert part(asked, ON_GPU, "weight_sync", "kv_cache") == part(asked, ON_GPU, "generation", "kv_cache") > 30


def test_shared_prompts_cost_attention_places():
    alone, grouped = workload(group_size=1, prompts_per_step=128), workload(group_size=8, prompts_per_step=16)
    assert part(grouped, ON_GPU, "actor_update", "activations") > part(alone, ON_GPU, "actor_update", "activations")


def test_one_rank_in_float32_gathers_nothing():
    asked = workload(built_in("0.5B"))
    one = replace(ON_ONE, compute_dtype="float32", rollout_devices=1)
    assert part(asked, one, "logprobs", "buffers") < 0.1, "a workspace"
    assert (
        part(asked, replace(one, trainer_devices=2, rollout_devices=2, mesh=Mesh(dp_shard=2)), "logprobs", "buffers")
        > 0.4
    )


def test_split_devices_hold_one_side_only():
    asked = workload(built_in("7B"), placement="split")
    assert part(asked, ON_GPU, "generation", "optimizer") == 0
    assert part(asked, ON_GPU, "actor_update", "kv_cache") == 0


def test_on_cpu_every_process_counts():
    one, two = workload(), workload()
    more = replace(ON_CPU, trainer_devices=2, rollout_devices=2, mesh=Mesh(dp_shard=2))
    assert part(two, more, "generation", "overhead") == pytest.approx(
        2 * part(one, ON_CPU, "generation", "overhead") - 1
    )


def test_the_logits_of_a_chunk_are_bounded_by_the_chunk():
    asked = workload(built_in("0.5B"), prompts_per_step=256)
    small = replace(asked, logits_chunk_tokens=128)
    assert part(small, ON_CPU, "actor_update", "logits") == pytest.approx(
        part(asked, ON_CPU, "actor_update", "logits") / 8
    )
    assert part(small, ON_GPU, "actor_update", "logits") <= part(asked, ON_GPU, "actor_update", "logits") / 8


def test_compared_distributions_take_the_columns_and_part_of_a_chunk():
    without = workload(built_in("0.5B"), max_response_tokens=64)
    asked = replace(without, full_kl=True)
    column = 128 * 64 * 151_936 * 4 / GIB
    for phase, columns in (("logprobs", 3), ("actor_update", 4)):
        more = part(asked, ON_CPU, phase, "buffers") - part(without, ON_CPU, phase, "buffers")
        assert more == pytest.approx(columns * column)
    for layout in (ON_CPU, ON_GPU):
        more = part(asked, layout, "actor_update", "logits") - part(without, layout, "actor_update", "logits")
        assert more == pytest.approx(1024 * 151_936 * 12 / GIB)


def test_the_peak_is_the_fullest_phase():
    parts = memory(workload(), ON_CPU)
    phase, gib = peak_gib(parts)
    assert gib == max(all_phases(workload(), ON_CPU))
    assert phase in PHASES


def test_a_teacher_takes_what_a_reference_of_its_size_does_and_has_no_adapters() -> None:
    taught = workload(built_in("0.5B"), roles=("actor", "teacher"), teacher=built_in("7B"))
    alike = workload(built_in("7B"), roles=("actor", "reference"))
    for layout in (ON_GPU, ON_CPU):
        for name in ("weights", "optimizer"):
            own, reference = (
                part(asked, layout, "generation", name)
                - part(replace(asked, roles=("actor",), teacher=None), layout, "generation", name)
                for asked in (taught, alike)
            )
            assert own == pytest.approx(reference)
    frozen = replace(taught, lora_rank=8)
    alone = replace(frozen, roles=("actor",), teacher=None)
    whole = role_params(built_in("7B"), "teacher") * 4 / GIB
    found = part(frozen, ON_CPU, "generation", "weights") - part(alone, ON_CPU, "generation", "weights")
    assert found == pytest.approx(whole)


def test_a_larger_teacher_is_what_takes_most_while_log_probabilities_are_computed() -> None:
    taught = workload(built_in("0.5B"), roles=("actor", "teacher"), teacher=built_in("7B"))
    same = replace(taught, teacher=taught.shape)
    assert phase_gib("logprobs", taught, ON_GPU) - phase_gib("generation", taught, ON_GPU) > 0
    assert (busy_role("logprobs", taught), busy_role("logprobs", same)) == ("teacher", "actor")


def test_the_copy_that_is_written_beside_training_is_weights_and_two_moments_of_what_changes():
    asked = replace(workload(roles=("actor", "reference")), copied_roles=("actor",))
    copy = 12 * asked.shape.num_params / GIB
    for phase in phases_of(asked, ON_CPU):
        assert part(asked, ON_CPU, phase, "checkpoint_copy") == pytest.approx(copy)
    assert part(replace(asked, copied_roles=()), ON_CPU, "generation", "checkpoint_copy") == 0
    assert part(asked, ON_GPU, "generation", "checkpoint_copy") == 0
    moved = replace(asked, copied_roles=("actor", "reference"))
    assert part(moved, ON_CPU, "generation", "checkpoint_copy") == pytest.approx(copy * 16 / 12)


def test_on_accelerators_the_copy_lies_in_the_hosts_memory():
    asked = replace(workload(), copied_roles=("actor",))
    hardware = parse_hardware("h100:8")
    there = {(p.phase, p.part): p for p in host_memory(asked, hardware, ON_GPU, 1.0)}
    assert there["running", "checkpoint_copy"].gib == pytest.approx(12 * asked.shape.num_params / GIB)
    assert there["running", "checkpoint_copy"].origin == "formula"
    assert not any(p.part == "checkpoint_copy" for p in host_memory(workload(), hardware, ON_GPU, 1.0))
