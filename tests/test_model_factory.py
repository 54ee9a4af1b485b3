"""The random model: a complete Hugging Face folder, the same from the same seed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlctl_train.config.model import RandomModel
from rlctl_train.config.vocab import END, PAD, VOCAB
from rlctl_train.model_factory import make_random_model

SMALL = RandomModel(hidden_size=32, num_layers=2, num_heads=2, num_kv_heads=1, intermediate_size=48)


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3", "llama"])
@pytest.mark.parametrize("tied", [True, False])
def test_folder_loads_and_generates(tmp_path: Path, architecture: str, tied: bool) -> None:
    config = SMALL.model_copy(update={"architecture": architecture, "tie_embeddings": tied})
    make_random_model(config, tmp_path, seed=0)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    tokens = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=3, do_sample=False, min_new_tokens=3)
    assert tokens.shape == (1, 6)
    assert model.config.model_type == architecture
    assert model.config.head_dim == 16
    tables = (model.get_input_embeddings().weight, model.get_output_embeddings().weight)
    assert (tables[0].data_ptr() == tables[1].data_ptr()) is tied


def test_weights_are_those_of_the_seed(tmp_path: Path) -> None:
    make_random_model(SMALL, tmp_path / "a", seed=3)
    torch.manual_seed(99)
    make_random_model(SMALL, tmp_path / "b", seed=3)
    make_random_model(SMALL, tmp_path / "c", seed=4)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in "abc"]
    assert weights[0] == weights[1] != weights[2]


def test_making_a_model_leaves_the_global_random_state_alone(tmp_path: Path) -> None:
    before = torch.get_rng_state()
    make_random_model(SMALL, tmp_path, seed=3)
    assert torch.equal(before, torch.get_rng_state())


def test_rotary_frequencies_survive_loading(tmp_path: Path) -> None:
    make_random_model(SMALL, tmp_path, seed=0)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).model.rotary_emb.inv_freq
    expected = 10000.0 ** -(torch.arange(0, 16, 2) / 16)
    torch.testing.assert_close(loaded, expected)


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3", "llama"])
def test_every_token_is_one_character_and_decodes_to_itself(tmp_path: Path, architecture: str) -> None:
    make_random_model(SMALL.model_copy(update={"architecture": architecture}), tmp_path, seed=0)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    text = "".join(VOCAB[4:])
    ids = tokenizer(text)["input_ids"]
    assert ids == list(range(4, len(VOCAB)))
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(tokenizer(" a  don't\n\nb ")["input_ids"]) == " a  don't\n\nb "
    assert len(tokenizer) == len(VOCAB)


def test_chat_template_marks_turns_and_opens_the_answer(tmp_path: Path) -> None:
    make_random_model(SMALL, tmp_path, seed=0)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    ask = [{"role": "user", "content": "1+2="}]
    prompt = tokenizer.apply_chat_template(ask, add_generation_prompt=True, tokenize=False)
    assert prompt == "<|user|>1+2=<|end|><|assistant|>"
    ids = tokenizer.apply_chat_template(ask, add_generation_prompt=True)["input_ids"]
    assert ids == tokenizer(prompt)["input_ids"]
    whole = tokenizer.apply_chat_template([*ask, {"role": "assistant", "content": "3"}], tokenize=False)
    assert whole == prompt + "3<|end|>"
    assert tokenizer.decode(tokenizer("3<|end|>")["input_ids"], skip_special_tokens=True) == "3"


def test_end_and_padding_tokens_agree_everywhere(tmp_path: Path) -> None:
    make_random_model(SMALL, tmp_path, seed=0)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    generation = json.loads((tmp_path / "generation_config.json").read_text())
    model = json.loads((tmp_path / "config.json").read_text())
    assert tokenizer.eos_token_id == generation["eos_token_id"] == model["eos_token_id"] == VOCAB.index(END)
    assert tokenizer.pad_token_id == generation["pad_token_id"] == model["pad_token_id"] == VOCAB.index(PAD)
