"""Write a synthetic checkpoint as verl's FSDP2 trainer does, a tensor at a time, for `merging.py` to merge.

    python -m benchmarks.merging_checkpoint FOLDER GB

Qwen2 with the widths of Qwen2.5-1.5B, a smaller vocabulary, embeddings apart, and as many layers as fill the size:
four ranks' files of float32 DTensors, with config and tokenizer. Memory stays near one rank's file.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, Qwen2Config

from rlctl_train.model_factory import make_tokenizer
from tests.verl_files import being_rank, shard, write_settings

RANKS = 4
WIDTHS = {
    "vocab_size": 32_768, "hidden_size": 1536, "intermediate_size": 8960, "num_attention_heads": 12,
    "num_key_value_heads": 2, "max_position_embeddings": 4096, "tie_word_embeddings": False, "dtype": "float32",
}  # fmt: skip


def main() -> None:
    """Write the folder that is asked for."""
    folder, gigabytes = Path(sys.argv[1]), float(sys.argv[2])
    config = Qwen2Config(**WIDTHS, num_hidden_layers=num_layers(gigabytes), architectures=["Qwen2ForCausalLM"])
    config.save_pretrained(folder / "huggingface")
    make_tokenizer(WIDTHS["max_position_embeddings"]).save_pretrained(folder / "huggingface")
    shapes = shapes_of(config)
    for rank in range(RANKS):
        torch.manual_seed(rank)
        with being_rank(rank, RANKS) as mesh:
            held = OrderedDict()
            for name, shape in shapes.items():
                held[name] = shard(torch.empty(shape), mesh)  # of what is not written to, no memory is taken
                held[name].to_local().normal_(std=0.02)
            torch.save(held, folder / f"model_world_size_{RANKS}_rank_{rank}.pt")
    write_settings(folder, RANKS)


def num_layers(gigabytes: float) -> int:
    """Return how many layers bring the weights near so many times 10^9 bytes."""
    none, one = (num_bytes(Qwen2Config(**WIDTHS, num_hidden_layers=layers)) for layers in (0, 1))
    return max(1, round((gigabytes * 1e9 - none) / (one - none)))


def num_bytes(config: Qwen2Config) -> int:
    """Return the size of a model's weights in float32."""
    return sum(4 * shape.numel() for shape in shapes_of(config).values())


def shapes_of(config: Qwen2Config) -> dict[str, torch.Size]:
    """Return the shape of each weight, in the model's order."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


if __name__ == "__main__":
    main()
