"""Megatron-core's distributed checkpoints without Megatron: its names, its stacking and its chunks, from HF weights.

Written apart from the reader, the other way round: what Megatron would save of a model with these weights.
"""

from __future__ import annotations

import json
import tempfile
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.state_dict_saver import save
from transformers import AutoConfig, AutoModelForCausalLM

LATENT = {
    "num_key_value_heads": 4, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4,
    "v_head_dim": 4,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 8},
    "mixtral": {"num_local_experts": 3},
    "qwen3_moe": {"head_dim": 8, "moe_intermediate_size": 12, "num_experts": 4},
    "qwen2_moe": {"moe_intermediate_size": 12, "shared_expert_intermediate_size": 20, "num_experts": 2},
    "deepseek_v3": LATENT | {
        "moe_intermediate_size": 12, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "n_shared_experts": 1,
        "first_k_dense_replace": 1, "num_nextn_predict_layers": 0,
    },
}  # fmt: skip


HF_PARTS = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class HfModel:
    """A tiny model as Hugging Face has it."""

    config: dict[str, Any]
    weights: dict[str, Tensor]

    @property
    def num_layers(self) -> int:
        return self.config["num_hidden_layers"]

    @property
    def num_experts(self) -> int:
        layers = [name.split(".experts.")[1] for name in self.weights if ".experts." in name]
        return 1 + max((int(rest.split(".")[0]) for rest in layers), default=-1)


def hf_model(family: str) -> HfModel:
    """Make a tiny model with random weights, norms and biases too."""
    config = AutoConfig.for_model(
        family, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, vocab_size=40,
        **({"num_key_value_heads": 2, "tie_word_embeddings": False} | FAMILIES[family]),
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        weights = load_file(Path(folder) / "model.safetensors")
        settings = json.loads((Path(folder) / "config.json").read_text())
    draw = torch.Generator().manual_seed(3)
    return HfModel(settings, {name: torch.randn(t.shape, generator=draw) for name, t in sorted(weights.items())})


def mcore_weights(model: HfModel, *, apart: bool = False) -> dict[str, Tensor]:
    """Return the tensors of Megatron; layers and experts stacked, or apart as its newest naming has it."""
    rest = dict(model.weights)
    layers = [_layer(rest, model, f"model.layers.{number}.", apart) for number in range(model.num_layers)]
    names = {"model.embed_tokens": "embedding.word_embeddings", "model.norm": "decoder.final_layernorm"}
    found = {f"{(names | {'lm_head': 'output_layer'})[n.removesuffix('.weight')]}.weight": t for n, t in rest.items()}
    if apart or layers[0].keys() != layers[1].keys():
        return found | {f"decoder.layers.{n}.{key}": t for n, layer in enumerate(layers) for key, t in layer.items()}
    return found | {f"decoder.layers.{key}": torch.stack([layer[key] for layer in layers]) for key in layers[0]}


def write_checkpoint(
    folder: Path,
    tensors: Mapping[str, Tensor],
    *,
    config: Mapping[str, Any] | None = None,
    tensor_parallel: int = 1,
    common: Mapping[str, Any] | None = None,
) -> None:
    """Write verl's older layout: `dist_ckpt`, and `huggingface` with a config where there is one."""
    inside = folder / "dist_ckpt"
    inside.mkdir(parents=True)
    chunked = {name: Chunked(tensor, chunks(name, tensor, tensor_parallel)) for name, tensor in tensors.items()}
    save(chunked, storage_writer=FileSystemWriter(inside), planner=ChunkPlanner(), no_dist=True)
    torch.save(dict(common or {"iteration": 7}), inside / "common.pt")
    says = {"sharded_backend": "torch_dist", "sharded_backend_version": 1, "common_backend": "torch"}
    (inside / "metadata.json").write_text(json.dumps(says))
    if config is not None:
        (folder / "huggingface").mkdir()
        (folder / "huggingface" / "config.json").write_text(json.dumps(config))


def megatron_lm_arguments(model: HfModel) -> dict[str, Any]:
    """Return what Megatron-LM's `common.pt` says of heads."""
    heads, groups = model.config["num_attention_heads"], model.config["num_key_value_heads"]
    return {"args": Namespace(num_attention_heads=heads, num_query_groups=groups), "iteration": 7}


def chunks(name: str, tensor: Tensor, tensor_parallel: int) -> list[tuple[slice, ...]]:
    """Return the blocks that ranks write: one index of every stacked dimension, and their share of the matrix."""
    parallel_dim = {"linear_proj.weight": 1, "linear_fc2.weight": 1, "norm": None, "router": None, "gate_weight": None}
    parallel_dim |= {"linear_fc2.bias": None, "linear_proj.bias": None, "down_proj": None}
    dim = next((dim for part, dim in parallel_dim.items() if part in name), 0)
    num_stacked = ("layers." in name and not name.split("layers.")[1][0].isdigit()) + (".experts.linear_fc" in name)
    num_shares = 1 if dim is None else tensor_parallel * (2 if "linear_fc1" in name else 1)
    blocks: list[tuple[slice, ...]] = [()]
    for axis, length in enumerate(tensor.shape):
        parts = length if axis < num_stacked else num_shares if axis - num_stacked == dim else 1
        assert length % parts == 0
        edges = range(0, length, length // parts)
        blocks = [(*block, slice(edge, edge + length // parts)) for block in blocks for edge in edges]
    return blocks


class Chunked:
    """A tensor that torch saves in these blocks, as one that lies on many ranks."""

    def __init__(self, whole: Tensor, blocks: Sequence[tuple[slice, ...]]) -> None:
        self._whole = whole
        self._blocks = {torch.Size(part.start for part in block): whole[block].clone() for block in blocks}

    def __create_write_items__(self, name: str, _: object) -> list[WriteItem]:
        properties = TensorProperties.create_from_tensor(self._whole)
        return [
            WriteItem(
                index=MetadataIndex(name, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk=chunk, properties=properties, size=self._whole.shape),
            )
            for chunk in self.__create_chunk_list__()
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(offsets=start, sizes=block.shape) for start, block in self._blocks.items()]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        assert index.offset is not None
        return self._blocks[index.offset]


class ChunkPlanner(DefaultSavePlanner):
    """Plans a save of `Chunked`, which torch knows only as tensors otherwise."""

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return self.state_dict[index.fqn].__get_tensor_shard__(index)


def _layer(rest: dict[str, Tensor], model: HfModel, prefix: str, apart: bool) -> dict[str, Tensor]:
    """Take a layer's tensors out of `rest`, and return Megatron's."""
    hf = {name.removeprefix(prefix): rest.pop(name) for name in list(rest) if name.startswith(prefix)}
    block = "block_sparse_moe" if model.config["model_type"] == "mixtral" else "mlp"
    is_moe = f"{block}.gate.weight" in hf
    made = _experts(hf, block, model.num_experts, apart) if is_moe else {}
    for kind in ("weight", "bias"):
        if f"self_attn.k_proj.{kind}" in hf:
            query, key, value = (hf.pop(f"self_attn.{part}_proj.{kind}") for part in "qkv")
            made[f"self_attention.linear_qkv.{kind}"] = _grouped(query, key, value, model)
        for shared, name in {"": "", ".shared_expert": ".shared_experts", ".shared_experts": ".shared_experts"}.items():
            if f"mlp{shared}.gate_proj.{kind}" in hf:
                made |= _feed_forward(hf, f"mlp{shared}", f"mlp{name}", kind, HF_PARTS, apart)
    attention = "self_attention."
    latent = "self_attn.kv_a_layernorm.weight" in hf
    names = {
        "input_layernorm": "input_layernorm.weight" if latent else f"{attention}linear_qkv.layer_norm_weight",
        "post_attention_layernorm": "pre_mlp_layernorm.weight" if is_moe else "mlp.linear_fc1.layer_norm_weight",
        "self_attn.o_proj": f"{attention}linear_proj.weight",
        "self_attn.q_norm": f"{attention}q_layernorm.weight",
        "self_attn.k_norm": f"{attention}k_layernorm.weight",
        "self_attn.q_a_proj": f"{attention}linear_q_down_proj.weight",
        "self_attn.q_b_proj": f"{attention}linear_q_up_proj.weight",
        "self_attn.q_a_layernorm": attention + ("linear_q_up_proj.layer_norm_" if apart else "q_layernorm.") + "weight",
        "self_attn.kv_a_proj_with_mqa": f"{attention}linear_kv_down_proj.weight",
        "self_attn.kv_b_proj": f"{attention}linear_kv_up_proj.weight",
        "self_attn.kv_a_layernorm": attention
        + ("linear_kv_up_proj.layer_norm_" if apart else "kv_layernorm.")
        + "weight",
        f"{block}.gate": "mlp.router.weight",
        "mlp.shared_expert_gate": "mlp.shared_experts.gate_weight",
    }
    names = {f"{name}.weight": mcore for name, mcore in names.items()} | {
        "self_attn.o_proj.bias": f"{attention}linear_proj.bias",
        f"{block}.gate.e_score_correction_bias": "mlp.router.expert_bias",
    }
    return made | {names[name]: tensor for name, tensor in hf.items()}


def _experts(hf: dict[str, Tensor], block: str, num_experts: int, apart: bool) -> dict[str, Tensor]:
    """Take the experts' tensors out of a layer, and return Megatron's, stacked or each by its number."""
    parts = ("w1", "w3", "w2") if block == "block_sparse_moe" else HF_PARTS
    mcore = "mlp.experts.experts"
    numbers = [(f"{block}.experts.{n}", f"{mcore}.{n}" if apart else mcore) for n in range(num_experts)]
    experts = [_feed_forward(hf, expert, name, "weight", parts, apart) for expert, name in numbers]
    if apart:
        return {name: tensor for expert in experts for name, tensor in expert.items()}
    return {name: torch.stack([expert[name] for expert in experts]) for name in experts[0]}


def _grouped(query: Tensor, key: Tensor, value: Tensor, model: HfModel) -> Tensor:
    """Put queries, keys and values together as Megatron does: group by group, [q, k, v] in each."""
    groups = model.config["num_key_value_heads"]
    parts = [part.view(groups, -1, *part.shape[1:]) for part in (query, key, value)]
    return torch.cat(parts, dim=1).flatten(0, 1)


def _feed_forward(
    hf: dict[str, Tensor], block: str, name: str, kind: str, names: tuple[str, str, str], apart: bool
) -> dict[str, Tensor]:
    gate, up, down = (hf.pop(f"{block}.{part}.{kind}") for part in names)
    first = {f"{name}.linear_fc1.{kind}_w": gate, f"{name}.linear_fc1.{kind}_v": up}
    if not apart:
        first = {f"{name}.linear_fc1.{kind}": torch.cat([gate, up])}
    return first | {f"{name}.linear_fc2.{kind}": down}
