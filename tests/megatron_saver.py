"""Save tiny models as Megatron-core does, on the CPU: `python -m tests.megatron_saver FOLDER`, with its environment.

For every case, FOLDER/CASE/tp1 and tp2 hold `dist_ckpt`, `huggingface/config.json` and `logits.pt`; tp2 is tp1 loaded
by Megatron into two processes and saved again. Nothing of rlctl is imported here.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.overrides import TorchFunctionMode

COMMON = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 64, "max_position_embeddings": 32, "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, "tie_word_embeddings": False,
}  # fmt: skip
MOE = COMMON | {
    "model_type": "qwen3_moe", "moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2,
    "norm_topk_prob": True,
}  # fmt: skip
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "qwen2": (COMMON | {"model_type": "qwen2", "tie_word_embeddings": True}, {}),
    "qwen3": (COMMON | {"model_type": "qwen3", "head_dim": 16}, {"non_homogeneous_layers": True}),
    "qwen3_moe": (MOE, {}),
    "qwen3_moe_apart": (MOE, {"singleton_local_shards": True}),
}
"""Case -> what Hugging Face's config says, and how Megatron is to name what it saves."""
TOKENS = torch.arange(20).view(2, 10) * 3


def save_all(folder: Path) -> None:
    """Save every case from one process, then from two."""
    for num_ranks in (1, 2):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        mp.spawn(_rank, args=(num_ranks, port, folder), nprocs=num_ranks)


def _rank(rank: int, num_ranks: int, port: int, folder: Path) -> None:
    from megatron.core import dist_checkpointing, parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    _do_without_cuda()
    NoCuda().__enter__()
    store = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=num_ranks)
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=num_ranks)
    model_parallel_cuda_manual_seed(1)
    for case, (config, naming) in CASES.items():
        model = _model(config, num_ranks)
        if num_ranks == 1:
            _randomise(model)
        else:
            held = model.sharded_state_dict(metadata=naming)
            model.load_state_dict(dist_checkpointing.load(held, str(folder / case / "tp1" / "dist_ckpt")))
        place = folder / case / f"tp{num_ranks}"
        (place / "dist_ckpt").mkdir(parents=True, exist_ok=True)
        (place / "huggingface").mkdir(exist_ok=True)
        dist.barrier()
        dist_checkpointing.save(model.sharded_state_dict(metadata=naming), str(place / "dist_ckpt"))
        logits = _logits(model)
        if rank == 0:
            (place / "huggingface" / "config.json").write_text(json.dumps(config))
            torch.save(logits, place / "logits.pt")
    dist.barrier()
    dist.destroy_process_group()


def _model(config: dict[str, Any], num_ranks: int) -> Any:
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer.transformer_config import TransformerConfig

    moe: dict[str, Any] = {}
    if "num_experts" in config:
        moe = {
            "num_moe_experts": config["num_experts"], "moe_router_topk": config["num_experts_per_tok"],
            "moe_ffn_hidden_size": config["moe_intermediate_size"], "moe_router_load_balancing_type": "none",
            "moe_token_dispatcher_type": "allgather",
        }  # fmt: skip
    has_qk_norm = config["model_type"] != "qwen2"
    settings = TransformerConfig(
        num_layers=config["num_hidden_layers"], hidden_size=config["hidden_size"],
        num_attention_heads=config["num_attention_heads"], num_query_groups=config["num_key_value_heads"],
        kv_channels=config["head_dim"], ffn_hidden_size=config["intermediate_size"],
        layernorm_epsilon=config["rms_norm_eps"], normalization="RMSNorm", qk_layernorm=has_qk_norm,
        gated_linear_unit=True, activation_func=torch.nn.functional.silu, add_bias_linear=False,
        add_qkv_bias=not has_qk_norm, hidden_dropout=0.0, attention_dropout=0.0, use_cpu_initialization=True,
        tensor_model_parallel_size=num_ranks, bias_dropout_fusion=False, bias_activation_fusion=False,
        masked_softmax_fusion=False, gradient_accumulation_fusion=False, apply_rope_fusion=False, **moe,
    )  # fmt: skip
    spec = get_gpt_layer_local_spec(
        num_experts=config.get("num_experts"), moe_grouped_gemm=False, qk_layernorm=has_qk_norm, normalization="RMSNorm"
    )
    return GPTModel(
        settings, spec, vocab_size=config["vocab_size"], max_sequence_length=config["max_position_embeddings"],
        position_embedding_type="rope", rotary_base=config["rope_parameters"]["rope_theta"],
        share_embeddings_and_output_weights=config["tie_word_embeddings"],
    )  # fmt: skip


@torch.no_grad()
def _randomise(model: Any) -> None:
    draw = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.2)


@torch.no_grad()
def _logits(model: Any) -> torch.Tensor:
    """Return the logits of all ranks, [B, S, V]."""
    model.eval()
    mine = model(TOKENS, torch.arange(TOKENS.shape[1]).expand_as(TOKENS), None).contiguous()
    parts = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, mine)
    return torch.cat(parts, dim=-1)


class NoCuda(TorchFunctionMode):
    """Makes on the CPU what is asked for on CUDA."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        changed = {"device": "cpu"} if str((kwargs or {}).get("device")).startswith("cuda") else {}
        return func(*args, **(kwargs or {}) | changed)


def _do_without_cuda() -> None:
    """Stand in for what else Megatron asks of CUDA while it saves, loads and computes in float32."""
    from megatron.core.tensor_parallel import random
    from megatron.core.transformer.moe import moe_utils

    moe_utils.te_general_gemm = None  # undefined without TransformerEngine
    torch.cuda.synchronize = lambda *_: None
    torch.cuda.current_device = lambda: "cpu"
    torch.cuda.manual_seed = lambda *_: None
    torch.cuda.get_rng_state = torch.cuda.random.get_rng_state = lambda *_, **__: torch.get_rng_state()
    random._set_cuda_rng_state = lambda *_, **__: None
    torch.Tensor.cuda = lambda tensor, *_, **__: tensor


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    save_all(Path(sys.argv[1]))
