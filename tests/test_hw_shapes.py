"""Parameter counts, against the published totals and against models that transformers builds."""

from __future__ import annotations

import json
import random
import struct
from pathlib import Path
from typing import Any

import pytest
from rlctl_hw import params
from rlctl_hw.architectures import ARCHITECTURES
from rlctl_hw.model_catalogue import known_ids, known_models, known_shape, named_shape
from rlctl_hw.model_shape import WEIGHTS_INDEX, shape_from_config, shape_from_file

SMALL = {
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 80,
    "vocab_size": 61,
    "max_position_embeddings": 64,
}
TOTALS = {
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352,
    "qwen2.5-72b": 72_706_203_648,
    "qwen2.5-7b-base": 7_615_616_512,
    "qwen2.5-32b-base": 32_763_876_352,
    "qwen2.5-math-1.5b": 1_543_714_304,
    "qwen2.5-math-7b": 7_615_616_512,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
    "qwen3-30b-a3b": 30_532_122_624,
    "qwen3-235b-a22b": 235_093_634_560,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.1-405b": 405_853_388_800,
    "gemma-2-2b": 2_614_341_888,
    "gemma-2-9b": 9_241_705_984,
    "mistral-7b": 7_248_023_552,
    "mixtral-8x7b": 46_702_792_704,
    "deepseek-llm-7b": 6_910_365_696,
    "deepseek-v3": 671_026_419_200,
}
LATENT = {"kv_lora_rank": 24, "q_lora_rank": 40, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8, "v_head_dim": 16}
SHARED = {"n_routed_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 36, "first_k_dense_replace": 1}
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 36}
BUILT = [
    ("qwen2", {}),
    ("qwen3", {"head_dim": 16}),
    ("qwen3", {"head_dim": 12, "attention_bias": True}),
    ("qwen2_moe", {**EXPERTS, "shared_expert_intermediate_size": 52}),
    ("qwen2_moe", {**EXPERTS, "shared_expert_intermediate_size": 52, "qkv_bias": False, "decoder_sparse_step": 2}),
    ("qwen3_moe", {**EXPERTS, "head_dim": 16}),
    ("qwen3_moe", {**EXPERTS, "head_dim": 16, "mlp_only_layers": [1], "attention_bias": True}),
    ("llama", {}),
    ("llama", {"attention_bias": True, "mlp_bias": True}),
    ("mistral", {"head_dim": 20}),
    ("mixtral", {"num_local_experts": 4}),
    ("gemma", {"head_dim": 16}),
    ("gemma2", {"head_dim": 16}),
    ("gemma3_text", {"head_dim": 16}),
    ("glm", {"head_dim": 16, "pad_token_id": 0}),
    ("glm4", {"head_dim": 16, "pad_token_id": 0}),
    ("glm4_moe", {**SHARED, "n_shared_experts": 1, "head_dim": 16}),
    ("glm4_moe", {**SHARED, "n_shared_experts": 2, "use_qk_norm": True, "attention_bias": True}),
    ("deepseek_v2", {**LATENT, **SHARED, "n_shared_experts": 2, "num_key_value_heads": 4}),
    ("deepseek_v2", {**LATENT, **SHARED, "q_lora_rank": None, "num_key_value_heads": 4, "attention_bias": True}),
    ("deepseek_v3", {**LATENT, **SHARED, "n_shared_experts": 1, "num_key_value_heads": 4}),
    ("deepseek_v3", {**LATENT, **SHARED, "n_shared_experts": 1, "num_key_value_heads": 4, "attention_bias": True}),
    ("phi3", {"pad_token_id": 0}),
    ("granite", {"attention_bias": True}),
    ("seed_oss", {"head_dim": 16}),
    ("seed_oss", {"head_dim": 16, "attention_out_bias": True, "mlp_bias": True}),
    ("smollm3", {"pad_token_id": 0}),
    ("ernie4_5", {"head_dim": 16, "use_bias": True}),
    ("gpt_oss", {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "pad_token_id": 0}),
]


@pytest.mark.parametrize("name", known_models())
def test_built_in_shapes_have_the_published_totals(name: str):
    shape = named_shape(name)
    assert (shape.num_params, shape.exact) == (TOTALS[name], True)


@pytest.mark.parametrize(
    ("name", "billions"),
    [("qwen3-30b-a3b", 3.35), ("qwen3-235b-a22b", 22.19), ("mixtral-8x7b", 12.88), ("deepseek-v3", 37.55)],
)
def test_a_token_passes_the_published_share_of_the_experts(name: str, billions: float):
    assert named_shape(name).active_params / 1e9 == pytest.approx(billions, abs=0.005)


def test_a_dense_model_is_active_as_a_whole():
    assert named_shape("llama-3.1-8b").active_params == TOTALS["llama-3.1-8b"]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("name", "extra"), BUILT)
def test_counts_equal_those_of_a_built_model(name: str, extra: dict[str, Any], tied: bool):
    sizes = {**SMALL, **extra, "tie_word_embeddings": tied}
    assert shape_from_config(_config(name, sizes).to_dict()).num_params == _built_params(name, sizes)


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_counts_of_random_sizes_equal_those_of_a_built_model(name: str):
    draw = random.Random(name)
    extra = next(extra for other, extra in BUILT if other == name)
    for _ in range(4):
        sizes = {**SMALL, **extra, **_random_sizes(draw, extra)}
        assert shape_from_config(_config(name, sizes).to_dict()).num_params == _built_params(name, sizes), sizes


@pytest.mark.parametrize("name", ["mamba", None, 7, ["llama"]])
def test_an_unknown_architecture_names_itself_and_the_way_out(name: Any):
    with pytest.raises(ValueError, match=r"can count; known: qwen2, .*model\.safetensors\.index\.json"):
        shape_from_config({**SMALL, "model_type": name})


@pytest.mark.parametrize("value", [None, 0, -3, "48", True, 4.5])
def test_a_size_that_is_none_names_its_key(value: Any):
    with pytest.raises(ValueError, match="hidden_size"):
        shape_from_config({**SMALL, "model_type": "llama", "hidden_size": value})


def test_the_longest_sequence_is_read_or_unknown():
    assert shape_from_config({**SMALL, "model_type": "llama"}).max_position == 64
    without = {key: value for key, value in SMALL.items() if key != "max_position_embeddings"}
    assert shape_from_config({**without, "model_type": "llama"}).max_position is None


def test_only_named_models_are_built_in():
    assert known_shape("someone/else") is None
    assert known_shape("qwen2.5-7b") is None
    assert all(known_shape(name) for name in known_ids())


def test_a_short_name_is_the_hub_model_and_a_wrong_one_shows_the_nearest():
    assert named_shape("Qwen2.5-7B") == known_shape("Qwen/Qwen2.5-7B-Instruct")
    assert named_shape("qwen/qwen3-8b") == known_shape("Qwen/Qwen3-8B")
    with pytest.raises(ValueError, match=r"nearest: qwen2\.5-7b"):
        named_shape("qwen2.5-8b")


def test_layers_and_embeddings_sum_to_the_total():
    shape = named_shape("deepseek-v3")
    layers = 3 * params.layer_params(shape, moe=False) + 58 * params.layer_params(shape, moe=True)
    ends = params.embedding_params(shape) + params.output_params(shape) + shape.hidden_size
    assert layers + ends == shape.num_params


def test_the_largest_layer_is_the_one_with_experts():
    shape = named_shape("deepseek-v3")
    assert params.largest_layer_params(shape) == params.layer_params(shape, moe=True)
    assert params.largest_layer_params(named_shape("mixtral-8x7b")) == 1_451_270_144
    assert params.largest_layer_params(named_shape("llama-3.1-8b")) == 218_112_000


def test_the_critic_has_a_value_head_in_place_of_the_output():
    tied, plain = named_shape("qwen2.5-0.5b"), named_shape("llama-3.1-8b")
    assert params.critic_params(tied) == tied.num_params + 896
    assert params.critic_params(plain) == plain.num_params - 128256 * 4096 + 4096


def test_lora_counts_a_pair_for_each_named_projection():
    shape = named_shape("llama-3.1-8b")
    assert params.lora_params(shape, 8, ("q_proj", "v_proj")) == 3_407_872
    assert params.lora_params(shape, 16) == 41_943_040


def test_lora_can_leave_the_routed_experts_alone():
    shape = named_shape("qwen3-30b-a3b")
    attention = params.lora_params(shape, 8, params.ATTENTION_TARGETS)
    assert params.lora_params(shape, 8, experts=False) == attention
    assert params.lora_params(shape, 8) > 50 * attention


def test_a_latent_cache_is_far_smaller_than_one_of_heads():
    assert params.kv_bytes_per_token(named_shape("deepseek-v3"), 2) == 70_272
    assert params.kv_bytes_per_token(named_shape("llama-3.1-8b"), 2) == 131_072


def test_windowed_layers_keep_no_more_than_their_window():
    shape = named_shape("gemma-2-2b")
    assert (shape.sliding_window, shape.num_windowed_layers) == (4096, 13)
    per_layer = params.kv_values_per_token(shape) * 2
    assert params.kv_bytes(shape, 100, 2) == 26 * 100 * per_layer
    assert params.kv_bytes(shape, 8192, 2) == 13 * (8192 + 4096) * per_layer


@pytest.mark.parametrize(
    ("model_type", "extra", "windowed"),
    [
        ("mistral", {"sliding_window": 32}, 3),
        ("mistral", {"sliding_window": None}, 0),
        ("qwen2", {"sliding_window": 32, "use_sliding_window": False, "max_window_layers": 1}, 0),
        ("qwen2", {"sliding_window": 32, "use_sliding_window": True, "max_window_layers": 1}, 2),
        ("gemma3_text", {"sliding_window": 32, "sliding_window_pattern": 3}, 2),
        ("gemma3_text", {"layer_types": ["sliding_attention", "full_attention", "full_attention"]}, 1),
    ],
)
def test_windowed_layers_are_found(model_type: str, extra: dict[str, Any], windowed: int):
    assert shape_from_config({**SMALL, "model_type": model_type, **extra}).num_windowed_layers == windowed


def test_a_config_that_says_only_what_differs_gets_the_defaults_of_its_architecture():
    text = {"model_type": "gemma3_text", "hidden_size": 1152, "intermediate_size": 6912, "num_hidden_layers": 26}
    shape = shape_from_config({**text, "num_attention_heads": 4, "num_key_value_heads": 1, "vocab_size": 262144})
    assert (shape.num_params, shape.tied, shape.num_windowed_layers) == (999_885_952, True, 22)


def test_the_language_model_of_a_multimodal_one_is_not_the_whole():
    text = {**SMALL, "model_type": "gemma3_text", "head_dim": 16}
    shape = shape_from_config({"model_type": "gemma3", "text_config": text, "vision_config": {}})
    assert shape.num_params == shape_from_config(text).num_params
    assert not shape.exact


def test_a_decoder_inside_a_model_that_sees_is_known_by_its_own_name():
    shape = shape_from_config({**SMALL, "model_type": "qwen2_5_vl", "vision_config": {}})
    assert shape.num_params == shape_from_config({**SMALL, "model_type": "qwen2"}).num_params
    assert not shape.exact


def test_an_unlisted_architecture_is_counted_from_its_weights(tmp_path: Path):
    config = {**SMALL, "model_type": "hybrid", "layer_types": ["linear_attention"] * 2 + ["full_attention"]}
    _write(tmp_path / "config.json", config)
    _write_safetensors(tmp_path / "model.safetensors", {"a": [7, 11], "b": [13]})
    shape = shape_from_file(tmp_path / "config.json")
    assert (shape.num_params, shape.exact, shape.num_windowed_layers) == (90, False, 2)


def test_an_index_alone_tells_bytes(tmp_path: Path):
    _write(tmp_path / "config.json", {**SMALL, "model_type": "hybrid", "torch_dtype": "bfloat16"})
    _write(tmp_path / WEIGHTS_INDEX, {"metadata": {"total_size": 2000}, "weight_map": {"a": "one.safetensors"}})
    shape = shape_from_file(tmp_path / "config.json")
    assert (shape.num_params, shape.exact) == (1000, False)


def test_the_unused_experts_of_an_unlisted_architecture_are_not_active(tmp_path: Path):
    _write(tmp_path / "config.json", {**SMALL, **EXPERTS, "model_type": "hybrid"})
    _write_safetensors(tmp_path / "model.safetensors", {"a": [100_000]})
    assert shape_from_file(tmp_path / "config.json").active_params == 100_000 - 3 * 4 * 3 * 48 * 36


def test_a_damaged_weights_file_is_named(tmp_path: Path):
    _write(tmp_path / "config.json", {**SMALL, "model_type": "hybrid"})
    (tmp_path / "model.safetensors").write_bytes(b"short")
    with pytest.raises(ValueError, match=r"model\.safetensors is not a safetensors file"):
        shape_from_file(tmp_path / "config.json")


def test_the_weights_are_not_read_where_the_config_settles_it(tmp_path: Path):
    _write(tmp_path / "config.json", {**SMALL, "model_type": "llama"})
    (tmp_path / "model.safetensors").write_bytes(b"short")
    assert shape_from_file(tmp_path / "config.json").exact


def _random_sizes(draw: random.Random, extra: dict[str, Any]) -> dict[str, Any]:
    kv_heads = draw.choice([1, 2, 3])
    heads = kv_heads * draw.choice([1, 2, 4])
    sizes = {
        "hidden_size": heads * draw.choice([8, 16, 24]),
        "num_hidden_layers": draw.randint(2, 5),
        "num_attention_heads": heads,
        "num_key_value_heads": heads if "kv_lora_rank" in extra else kv_heads,
        "intermediate_size": draw.randint(8, 90),
        "vocab_size": draw.randint(20, 90),
        "tie_word_embeddings": draw.random() < 0.5,
    }
    varied = {key: draw.randint(2, 60) for key in ("moe_intermediate_size", "kv_lora_rank") if key in extra}
    return sizes | varied


def _config(name: str, sizes: dict[str, Any]) -> Any:
    from transformers import AutoConfig

    return AutoConfig.for_model(name, **sizes)


def _built_params(name: str, sizes: dict[str, Any]) -> int:
    """Count a model's parameters, and the router's corrections, which checkpoints have as weights."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(_config(name, sizes))
    corrections = (buffer for key, buffer in model.named_buffers() if key.endswith("e_score_correction_bias"))
    return model.num_parameters() + sum(buffer.numel() for buffer in corrections)


def _write(file: Path, data: dict[str, Any]) -> None:
    file.write_text(json.dumps(data), encoding="utf-8")


def _write_safetensors(file: Path, shapes: dict[str, list[int]]) -> None:
    header = {name: {"dtype": "BF16", "shape": shape, "data_offsets": [0, 0]} for name, shape in shapes.items()}
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text)
