"""Rows of Megatron-LM's CI (its recipes' arguments and what it measured) as setups of the calculator."""

from __future__ import annotations

import ast
import csv
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from rlctl_hw import params
from rlctl_hw.setup import Setup, WeightDtype
from rlctl_hw.types import Experts, LatentAttention, Mesh, ModelShape, Recompute

TABLE = Path(__file__).parent / "megatron_ci.csv"
COMMIT = "https://github.com/NVIDIA/Megatron-LM/tree/d98e8a64ddf3"
GPT2_VOCABULARY = 50257
"""Entries of the tokenizer where a recipe names no vocabulary."""
CATALOGUE = {"A100": "a100-80gb", "H100": "h100-80gb", "GB200": "gb200-186gb", "": "a100-80gb"}
"""Golden values without a platform come from A100 nodes."""
RECOMPUTE: dict[str, Recompute] = {"": "none", "selective": "selective", "full": "full"}
NOT_COVERED = {
    "not a decoder": lambda row: row["family"] in ("bert", "t5", "multimodal-llava"),
    "state-space layers": lambda row: row["family"] == "hybrid" or bool(row["is_hybrid_model"]),
    "fp8": lambda row: bool(row["fp8_format"]),
    "Megatron-FSDP": lambda row: bool(row["use_megatron_fsdp"]),
    "multi-token prediction": lambda row: bool(row["mtp_num_layers"]),
    "Muon optimizer": lambda row: row["optimizer"] == "muon",
    "stages named by hand": lambda row: (
        bool(row["pipeline_model_parallel_layout"])
        or bool(row["decoder_first_pipeline_num_layers"])
        or bool(row["account_for_embedding_in_pipeline_split"])
    ),
    "activation offload by module": lambda row: bool(row["fine_grained_activation_offloading"]),
    "compiled cross entropy (10 to 14 B a logit by version)": lambda row: bool(row["cross_entropy_loss_fusion"]),
    "deferred embedding gradient": lambda row: "defer_embedding" in row["test_case"],
    "a teacher beside the model": lambda row: "distill" in row["test_case"],
    "CUDA graphs of training": lambda row: bool(row["cuda_graph_impl"]),
}
"""Features the calculator does not know, by name."""

Row = Mapping[str, str]


def rows() -> list[dict[str, str]]:
    """Return the table."""
    with TABLE.open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def not_covered(row: Row) -> str | None:
    """Return the first feature of a row that the calculator does not know, or None."""
    return next((name for name, has in NOT_COVERED.items() if has(row)), None)


def setup(row: Row) -> Setup:
    """Return the setup of a covered row."""
    mesh, data_parallel = _mesh(row)
    dtypes = _dtypes(row)
    return Setup(
        shape=_shape(row),
        engine="megatron",
        task="sft",
        mesh=mesh,
        seq_len=int(row["seq_length"]),
        micro_batch=int(row["micro_batch_size"]),
        num_micro_batches=int(row["global_batch_size"]) // (int(row["micro_batch_size"]) * data_parallel),
        recompute=RECOMPUTE[row["recompute_granularity"]],
        attention="eager" if _unfused(row) else "flash",
        param_dtype=dtypes[0],
        compute_dtype=dtypes[0],
        grad_dtype=dtypes[1],
        distributed_optimizer=bool(row["use_distributed_optimizer"]),
        grouped_experts=bool(row["moe_grouped_gemm"]),
        dropout=row["attention_dropout"] != "0.0",
        catalogue=CATALOGUE[row["platform"]],
    )


def _mesh(row: Row) -> tuple[Mesh, int]:
    tp, pp, cp = (_count(row, f"{name}_parallel_size") for name in ("tensor_model", "pipeline_model", "context"))
    data_parallel = int(row["world_size"]) // (tp * pp * cp)
    copies = _count(row, "num_distributed_optimizer_instances")
    virtual = _count(row, "num_virtual_stages_per_pipeline_rank")
    if row["num_layers_per_virtual_pipeline_stage"]:
        virtual = int(row["num_layers"]) // pp // int(row["num_layers_per_virtual_pipeline_stage"])
    mesh = Mesh(
        dp_replicate=copies,
        dp_shard=data_parallel // copies,
        tp=tp,
        pp=pp,
        cp=cp,
        ep=_count(row, "expert_model_parallel_size"),
        etp=_count(row, "expert_tensor_parallel_size", default=tp) if row["num_experts"] else 1,
        sequence_parallel=bool(row["sequence_parallel"]),
        virtual_stages=virtual,
    )
    return mesh, data_parallel


def _dtypes(row: Row) -> tuple[WeightDtype, WeightDtype]:
    """bf16 accumulates gradients in fp32, fp16 in fp16 with a copy in fp32 for the optimizer."""
    if row["bf16"]:
        return "bfloat16", "float32"
    return ("float16", "float16") if row["fp16"] else ("float32", "float32")


def _unfused(row: Row) -> bool:
    """Return whether scores are kept.

    On one cluster the long-term build had no fused kernel to choose: its peaks equal, to 2 MiB, those of the same
    recipes with `--attention-backend unfused`.
    """
    if row["env"] == "lts" and "dracooci" in row["golden"] and not row["attention_backend"]:
        return True
    return row["attention_backend"] in ("unfused", "local") or row["transformer_impl"] == "local"


def _shape(row: Row) -> ModelShape:
    hidden, heads, num_layers = (int(row[key]) for key in ("hidden_size", "num_attention_heads", "num_layers"))
    bias, latent = not row["disable_bias_linear"], bool(row["multi_latent_attention"])
    shape = ModelShape(
        architecture="megatron-gpt",
        hidden_size=hidden,
        num_layers=num_layers,
        num_heads=heads,
        num_kv_heads=int(row["num_query_groups"] or heads),
        head_dim=int(row["kv_channels"] or hidden // heads),
        intermediate_size=int(row["ffn_hidden_size"] or 4 * hidden),
        vocab_size=int(row["vocab_size"] or GPT2_VOCABULARY),
        tied=not row["untie_embeddings_and_output_weights"],
        num_params=0,
        qkv_bias=bias and not latent,
        output_bias=bias,
        mlp_bias=bias,
        qk_norm=bool(row["qk_layernorm"]),
        gated_mlp=bool(row["swiglu"]),
        experts=_experts(row, num_layers) if row["num_experts"] else None,
        latent=_latent(row) if latent else None,
    )
    positions = 0 if row["position_embedding_type"] == "rope" else int(row["max_position_embeddings"]) * hidden
    norm_biases = 0 if row["normalization"] == "RMSNorm" else (2 * num_layers + 1) * hidden
    return replace(shape, num_params=params.total_params(shape) + positions + norm_biases)


def _experts(row: Row, num_layers: int) -> Experts:
    pattern = row["moe_layer_freq"]
    return Experts(
        num_experts=int(row["num_experts"]),
        experts_per_token=int(row["moe_router_topk"] or 2),
        expert_size=int(row["moe_ffn_hidden_size"] or row["ffn_hidden_size"] or 4 * int(row["hidden_size"])),
        shared_size=int(row["moe_shared_expert_intermediate_size"] or 0),
        num_layers=sum(_layer_kinds(pattern)) if pattern else num_layers,
    )


def _layer_kinds(pattern: str) -> list[int]:
    """Read `([0]*3+[1]*5)`: dense and sparse layers in order."""
    kinds: list[int] = []
    for part in pattern.strip("()").split("+"):
        values, times = part.split("*")
        kinds += ast.literal_eval(values) * int(times)
    return kinds


def _latent(row: Row) -> LatentAttention:
    return LatentAttention(
        kv_rank=int(row["kv_lora_rank"]),
        nope_dim=int(row["qk_head_dim"]),
        rope_dim=int(row["qk_pos_emb_head_dim"]),
        value_dim=int(row["v_head_dim"]),
        query_rank=int(row["q_lora_rank"]) if row["q_lora_rank"] else None,
    )


def _count(row: Row, key: str, default: int = 1) -> int:
    return int(row[key] or default)


def covered() -> Iterator[tuple[Row, Setup]]:
    """Yield every covered row with its setup."""
    for row in rows():
        if not_covered(row) is None:
            yield row, setup(row)
