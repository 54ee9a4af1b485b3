"""Workloads, machines and hypothesis strategies for the planner's tests."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hypothesis import strategies as st
from rlctl_hw.model_catalogue import known_shape
from rlctl_hw.model_shape import shape_from_config
from rlctl_hw.probe import parse_hardware
from rlctl_hw.types import Hardware, ModelShape, Pins, Savings, Workload

TINY = shape_from_config(
    {
        "model_type": "qwen2",
        "hidden_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 512,
        "vocab_size": 100,
        "tie_word_embeddings": True,
    }
)


def built_in(size: str) -> ModelShape:
    shape = known_shape(f"Qwen/Qwen2.5-{size}-Instruct")
    assert shape is not None
    return shape


def workload(shape: ModelShape = TINY, *, pins: Pins | None = None, **changes: Any) -> Workload:
    usual = Workload(
        shape=shape,
        roles=("actor", "reference"),
        group_size=8,
        prompts_per_step=16,
        mini_batches=1,
        max_prompt_tokens=128,
        max_response_tokens=256,
        pins=pins or Pins(),
    )
    return replace(usual, **changes)


def with_memory(hardware: Hardware, gib: float) -> Hardware:
    devices = tuple(replace(device, memory_gib=gib) for device in hardware.devices)
    host_gib = gib if hardware.kind == "cpu" else hardware.host_memory_gib
    return replace(hardware, devices=devices, host_memory_gib=host_gib)


shapes = st.sampled_from([TINY, built_in("0.5B"), built_in("1.5B"), built_in("7B")])
roles = st.sampled_from([("actor",), ("actor", "reference"), ("actor", "critic", "reference")])
machines = st.sampled_from(
    ["cpu:1", "cpu:2", "cpu:64", "t4:1", "rtx4090:2", "a100:3", "h100:8", "h200:8x2", "mi300x:8"]
)
pin_sets = st.builds(
    Pins,
    compute_dtype=st.sampled_from([None, "float32", "bfloat16"]),
    rollout_dtype=st.sampled_from([None, "float32"]),
    trainer_devices=st.sampled_from([None, None, 1, 2, 8]),
    rollout_devices=st.sampled_from([None, None, 1, 2, 8]),
    threads_per_worker=st.sampled_from([None, 1, 3]),
    max_tokens_per_micro_batch=st.sampled_from([None, 256, 2048, 70000]),
    max_concurrent=st.sampled_from([None, 1, 100]),
    gpu_memory_share=st.sampled_from([None, 0.3, 0.9]),
    object_store_gib=st.sampled_from([None, 0.5, 4000.0]),
    recompute=st.sampled_from([None, "none", "full"]),
    offload_params=st.sampled_from([None, True, False]),
    offload_optimizer=st.sampled_from([None, True, False]),
    reshard_after_forward=st.sampled_from([None, None, False]),
    rollout_tensor_parallel=st.sampled_from([None, None, 1, 2]),
)
savings = st.builds(
    Savings,
    recompute=st.sampled_from(["none", "full"]),
    offload_params=st.booleans(),
    offload_optimizer=st.booleans(),
    reshard_after_forward=st.booleans(),
)


@st.composite
def workloads(draw: st.DrawFn, pins: st.SearchStrategy[Pins] = st.just(Pins())) -> Workload:
    return Workload(
        shape=draw(shapes),
        roles=draw(roles),
        group_size=draw(st.sampled_from([1, 8])),
        prompts_per_step=draw(st.sampled_from([1, 16, 256])),
        mini_batches=draw(st.sampled_from([1, 4])),
        max_prompt_tokens=draw(st.integers(1, 1024)),
        max_response_tokens=draw(st.integers(1, 4096)),
        rollout=draw(st.sampled_from(["hf", "vllm"])),
        placement=draw(st.sampled_from(["colocated", "split"])),
        pins=draw(pins),
    )


hardware = machines.map(parse_hardware)
