"""The memory calculator: what must hold for every setup, and totals that can be counted by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from rlctl_hw.calculator import check, estimate
from rlctl_hw.devices import by_key
from rlctl_hw.setup import Estimate, IllegalLayout, Setup
from rlctl_hw.types import Mesh

from tests.setups import DEEPSEEK, MOE, QWEN, setups

GIB = 2**30
METRICS = ("peak", "reserved", "device", "steady")


def part(found: Estimate, name: str) -> float:
    return next((part.gib for part in found.parts if part.name == name), 0.0)


def never_more(less: Setup, more: Setup) -> bool:
    small, large = estimate(less), estimate(more)
    return all(getattr(small, name).gib <= getattr(large, name).gib * (1 + 1e-9) for name in METRICS)


@given(setups())
def test_parts_add_up_to_what_the_device_shows(setup: Setup):
    found = estimate(setup)
    assert sum(part.gib for part in found.parts) == pytest.approx(found.device.gib)
    assert all(part.gib > 0 and part.why for part in found.parts)


@given(setups())
def test_every_number_lies_inside_its_band_and_metrics_are_ordered(setup: Setup):
    found = estimate(setup)
    for name in METRICS:
        band = getattr(found, name)
        assert 0 <= band.low_gib <= band.gib <= band.high_gib
    assert found.steady.gib <= found.peak.gib * (1 + 1e-9)
    assert found.peak.gib <= found.reserved.gib <= found.device.gib


@given(setups())
def test_the_same_question_has_the_same_answer(setup: Setup):
    assert estimate(setup) == estimate(replace(setup))


@given(setups(), st.sampled_from(["dp_shard", "tp", "pp", "cp", "ep"]))
def test_more_shards_never_need_more(setup: Setup, axis: str):
    mesh = setup.mesh
    # torch's pipelining has a buffer for every micro-batch, which can be more than a stage saves.
    assume(axis != "pp" or setup.engine == "megatron")
    wider = replace(setup, mesh=replace(mesh, **{axis: getattr(mesh, axis) * 2}))
    assume(_is_legal(wider))
    assert never_more(wider, setup)


@given(setups(), st.integers(1, 100))
def test_shorter_sequences_never_need_more(setup: Setup, blocks: int):
    assert never_more(setup, replace(setup, seq_len=setup.seq_len + 8 * blocks))


@given(setups(), st.integers(1, 8), st.integers(1, 8))
def test_smaller_micro_batches_never_need_more(setup: Setup, rows: int, batches: int):
    larger = replace(setup, micro_batch=setup.micro_batch + rows, num_micro_batches=setup.num_micro_batches + batches)
    assert never_more(setup, larger)


@given(setups(), st.integers(1, 64))
def test_a_smaller_rank_never_needs_more(setup: Setup, more: int):
    assume(setup.lora_rank)
    assert never_more(setup, replace(setup, lora_rank=setup.lora_rank + more))


@given(setups())
def test_recomputing_more_never_needs_more(setup: Setup):
    none, selective, full = (replace(setup, recompute=kind) for kind in ("none", "selective", "full"))
    assert never_more(full, selective)
    assert never_more(selective, none)


@given(setups())
def test_offload_moves_memory_to_the_host(setup: Setup):
    here, away = replace(setup, optim_offload=False), replace(setup, optim_offload=True)
    assert never_more(away, here)
    assert estimate(away).host_gib >= estimate(here).host_gib


def test_fsdp_states_are_sixteen_bytes_over_the_ranks():
    found = estimate(Setup(QWEN, "fsdp2", "update", Mesh(dp_shard=8), num_micro_batches=2))
    states = sum(part(found, name) for name in ("weights", "gradients", "optimizer"))
    assert states == pytest.approx(16 * QWEN.num_params / 8 / GIB)


def test_megatron_states_are_six_bytes_and_twelve_over_the_optimizer_ranks():
    shape = replace(QWEN, vocab_size=152_064)
    found = estimate(Setup(shape, "megatron", "sft", Mesh(dp_shard=4), param_dtype="bfloat16"))
    states = sum(part(found, name) for name in ("weights", "gradients", "optimizer"))
    assert states == pytest.approx((6 + 12 / 4) * QWEN.num_params / GIB, rel=1e-3)


def test_optimizer_offload_of_megatron_saves_eight_bytes_a_sharded_parameter():
    mesh = Mesh(dp_shard=4, tp=2, pp=2, ep=4, sequence_parallel=True)
    setup = Setup(MOE, "megatron", "sft", mesh, param_dtype="bfloat16", num_micro_batches=4)
    saved = estimate(setup).peak.gib - estimate(replace(setup, optim_offload=True)).peak.gib
    assert saved * GIB / 1e9 == pytest.approx(15.26, rel=0.01)


def test_plain_logits_take_eight_to_eighteen_bytes_by_path():
    setup = Setup(QWEN, "fsdp2", "sft", Mesh(dp_shard=8), seq_len=16384, recompute="full")

    count = 16384 * QWEN.vocab_size / GIB
    for path, size in (("none", 8), ("dropped", 14), (None, 17), ("held", 18)):
        assert part(estimate(replace(setup, fp32_logits=path)), "logits") == pytest.approx(size * count)
    assert part(estimate(replace(setup, compiled_loss=True)), "logits") == pytest.approx(6 * count)


def test_a_critic_has_no_logits():
    assert part(estimate(Setup(QWEN, "fsdp2", "update", critic=True)), "logits") == 0


def test_rollout_holds_a_cache_of_every_sequence():
    found = estimate(Setup(QWEN, "fsdp2", "rollout", Mesh(tp=2), seq_len=1024, micro_batch=64))
    per_token = 2 * QWEN.num_layers * QWEN.num_kv_heads * QWEN.head_dim * 2 / 2
    assert part(found, "kv_cache") == pytest.approx(64 * 1024 * per_token / GIB)


def test_an_engine_that_takes_a_share_fills_it():
    setup = Setup(QWEN, "fsdp2", "rollout", catalogue="h100-80gb", gpu_memory_share=0.5)
    assert estimate(setup).device.gib == pytest.approx(0.5 * by_key("h100-80gb").memory_gib, rel=0.01)


def test_the_latent_cache_is_whole_on_every_rank():
    setup = Setup(DEEPSEEK, "megatron", "rollout", Mesh(tp=8), micro_batch=16)
    assert part(estimate(setup), "kv_cache") == part(estimate(replace(setup, mesh=Mesh(tp=16))), "kv_cache")


@pytest.mark.parametrize(
    ("mesh", "size"),
    [
        (Mesh(tp=3), "num_heads 28"),
        (Mesh(tp=7), "num_kv_heads 4"),
        (Mesh(pp=3), "num_layers 28"),
        (Mesh(cp=3), "seq_len 4096"),
        (Mesh(ep=2), "experts"),
    ],
)
def test_what_does_not_divide_is_named(mesh: Mesh, size: str):
    with pytest.raises(IllegalLayout, match=size):
        check(Setup(QWEN, "megatron", "sft", mesh))


def test_a_rollout_engine_copies_heads_beyond_their_number():
    mesh = Mesh(tp=8)
    check(Setup(MOE, "fsdp2", "rollout", mesh))
    with pytest.raises(IllegalLayout, match="num_kv_heads 4"):
        check(Setup(MOE, "fsdp2", "sft", mesh))


def test_an_uneven_last_stage_must_be_asked_for():
    even = Setup(DEEPSEEK, "megatron", "sft", Mesh(pp=16), num_micro_batches=16)
    with pytest.raises(IllegalLayout, match="num_layers 61"):
        check(even)
    found = estimate(replace(even, mesh=Mesh(pp=16, uneven_stages=True)))
    assert "last pipeline stage with fewer layers" in found.path


def _is_legal(setup: Setup) -> bool:
    try:
        check(setup)
    except IllegalLayout:
        return False
    return True
