"""Random and named questions for the memory calculator."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import strategies as st
from rlctl_hw import params
from rlctl_hw.model_catalogue import named_shape
from rlctl_hw.setup import Setup, Task
from rlctl_hw.types import EngineName, Experts, LatentAttention, Mesh, ModelShape

QWEN = named_shape("Qwen/Qwen2.5-7B-Instruct")
MOE = named_shape("Qwen/Qwen3-30B-A3B")
DEEPSEEK = named_shape("deepseek-ai/DeepSeek-V3")


latents = st.builds(
    LatentAttention,
    kv_rank=st.just(64),
    nope_dim=st.just(32),
    rope_dim=st.just(16),
    value_dim=st.just(32),
    query_rank=st.sampled_from([None, 96]),
)
engines: st.SearchStrategy[EngineName] = st.sampled_from(("fsdp2", "megatron"))
tasks: st.SearchStrategy[Task] = st.sampled_from(("sft", "update", "logprob", "rollout"))


def experts(num_layers: int) -> st.SearchStrategy[Experts]:
    return st.builds(
        Experts,
        num_experts=st.sampled_from([8, 32, 64]),
        experts_per_token=st.integers(1, 8),
        expert_size=st.just(64),
        shared_size=st.sampled_from([0, 128]),
        num_layers=st.just(num_layers),
    )


@st.composite
def shapes(draw: st.DrawFn) -> ModelShape:
    """Draw a decoder of which heads, layers and experts divide by 8."""

    latent = draw(st.none() | latents)
    num_layers, heads = 8 * draw(st.integers(1, 6)), 8 * draw(st.integers(1, 8))
    shape = ModelShape(
        architecture="drawn",
        hidden_size=64 * draw(st.integers(1, 64)),
        num_layers=num_layers,
        num_heads=heads,
        num_kv_heads=heads if latent else 8,
        head_dim=draw(st.sampled_from([32, 64, 128])),
        intermediate_size=64 * draw(st.integers(1, 128)),
        vocab_size=draw(st.integers(100, 200_000)),
        tied=draw(st.booleans()),
        num_params=0,
        qk_norm=draw(st.booleans()),
        norms_per_layer=draw(st.sampled_from([2, 4])),
        gated_mlp=draw(st.booleans()),
        experts=draw(st.none() | experts(num_layers)),
        latent=latent,
    )
    return replace(shape, num_params=params.total_params(shape))


@st.composite
def setups(draw: st.DrawFn) -> Setup:
    """Draw a legal question."""
    engine = draw(engines)
    task = draw(tasks)
    low = draw(st.booleans())
    dtype = "bfloat16" if low or engine == "megatron" else "float32"
    shape = draw(shapes())
    degree = st.sampled_from([1, 2, 4])
    ep = draw(degree) if shape.experts else 1
    return Setup(
        shape=shape,
        engine=engine,
        task=task,
        mesh=Mesh(
            dp_shard=ep * draw(degree),
            tp=draw(degree),
            pp=draw(degree),
            cp=1 if task == "rollout" else draw(degree),
            ep=ep,
            sequence_parallel=draw(st.booleans()),
        ),
        seq_len=8 * draw(st.integers(1, 4096)),
        micro_batch=draw(st.integers(1, 8)),
        num_micro_batches=draw(st.integers(1, 16)),
        recompute=draw(st.sampled_from(["none", "selective", "full"])),
        loss=draw(st.sampled_from(["plain", "chunked", "fused"])),
        attention=draw(st.sampled_from(["flash", "eager"])),
        param_dtype=dtype,
        grad_dtype=draw(st.sampled_from([dtype, "float32"])),
        optim_dtype=draw(st.sampled_from([dtype, "float32"])),
        optimizer=draw(st.sampled_from(["adamw", "adamw8bit", "sgd"])),
        optim_offload=draw(st.booleans()),
        lora_rank=0 if task == "rollout" else draw(st.sampled_from([0, 8])),
        dropout=draw(st.booleans()),
    )
