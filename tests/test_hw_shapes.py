"""Parameter counts, against the published totals and against models that transformers builds."""

from __future__ import annotations

from typing import Any

import pytest
from rlctl_hw.model_shape import KNOWN_MODELS, known_shape, shape_from_config

SMALL = {
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 80,
    "vocab_size": 61,
    "max_position_embeddings": 64,
}
LLAMA_3B = {
    "model_type": "llama",
    "hidden_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 8192,
    "vocab_size": 128256,
    "tie_word_embeddings": True,
}


@pytest.mark.parametrize(
    ("name", "num_params"),
    [
        ("Qwen/Qwen2.5-0.5B-Instruct", 494_032_768),
        ("Qwen/Qwen2.5-1.5B-Instruct", 1_543_714_304),
        ("Qwen/Qwen2.5-7B-Instruct", 7_615_616_512),
    ],
)
def test_built_in_shapes_have_the_published_totals(name: str, num_params: int):
    shape = known_shape(name)
    assert shape is not None
    assert shape.num_params == num_params


def test_a_published_llama_total_is_met():
    assert shape_from_config(LLAMA_3B).num_params == 3_212_749_824


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("name", "extra"),
    [
        ("qwen2", {}),
        ("qwen3", {"head_dim": 16}),
        ("qwen3", {"head_dim": 12, "attention_bias": True}),
        ("llama", {}),
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("mistral", {"head_dim": 20}),
    ],
)
def test_counts_equal_those_of_a_built_model(name: str, extra: dict[str, Any], tied: bool):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(name, **SMALL, **extra, tie_word_embeddings=tied)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert shape_from_config(config.to_dict()).num_params == model.num_parameters()


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", None, 7, ["llama"]])
def test_an_unknown_architecture_lists_the_known(name: Any):
    with pytest.raises(ValueError, match="known: qwen2, qwen3, llama, mistral"):
        shape_from_config({**SMALL, "model_type": name})


@pytest.mark.parametrize("value", [None, 0, -3, "48", True, 4.5])
def test_a_size_that_is_none_names_its_key(value: Any):
    with pytest.raises(ValueError, match="hidden_size"):
        shape_from_config({**SMALL, "model_type": "llama", "hidden_size": value})


def test_the_longest_sequence_is_read_or_unknown():
    assert shape_from_config({**SMALL, "model_type": "llama"}).max_position == 64
    assert shape_from_config(LLAMA_3B).max_position is None


def test_only_named_models_are_built_in():
    assert known_shape("someone/else") is None
    assert all(known_shape(name) for name in KNOWN_MODELS)
