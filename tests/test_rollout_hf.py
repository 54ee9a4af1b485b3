"""The Hugging Face rollout engine: log-probabilities, seeds, stopping, padding, joining, on fast and general paths."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from transformers import GenerationConfig, PreTrainedModel

from rlctl_train.config.errors import PREFLIGHT, UserError
from rlctl_train.config.rollout import HfRollout
from rlctl_train.rollout.base import RolloutError, Sample, Sampling
from rlctl_train.rollout.hf import HfRolloutEngine

VOCAB = 24
STOP_IDS = [1, 5]
PROMPTS = [[2, 3, 4, 6, 7], [8, 9], [8, 9], [2, 3, 4, 6, 7], [10], [11, 12, 13, 14, 15, 16, 17], [10], [8, 9, 2]]
ROWS = list(range(100, 108))
SAMPLING = Sampling(max_tokens=20, temperature=0.7, seed=3)
_SIZES = {
    "vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": 64, "initializer_range": 0.3,
    "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1,
}  # fmt: skip
_FAST: dict[str, Callable[[], PreTrainedModel]] = {
    "qwen2": lambda: transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**_SIZES, tie_word_embeddings=True)),
    "qwen3": lambda: transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**_SIZES, head_dim=16)),
    "llama": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            **_SIZES,
            rope_parameters={
                "rope_type": "llama3", "rope_theta": 1e4, "factor": 4.0, "low_freq_factor": 1.0,
                "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
            },
        )
    ),
}  # fmt: skip
_GENERAL: dict[str, Callable[[], PreTrainedModel]] = {
    "mistral-sliding": lambda: transformers.MistralForCausalLM(
        transformers.MistralConfig(**_SIZES, sliding_window=4, attn_implementation="eager")
    ),
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=2, n_positions=64, eos_token_id=1, bos_token_id=None,
            initializer_range=0.3,
        )
    ),
    "gemma2": lambda: transformers.Gemma2ForCausalLM(
        transformers.Gemma2Config(**_SIZES, head_dim=8, query_pre_attn_scalar=8, sliding_window=4)
    ),
}  # fmt: skip
MODELS = _FAST | _GENERAL


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            torch.manual_seed(0)
            model = MODELS[name]()
            model.generation_config = GenerationConfig(eos_token_id=STOP_IDS, pad_token_id=0, bos_token_id=None)
            for parameter in model.parameters():
                if parameter.ndim == 1:  # biases and norm weights start out constant, which would hide their misuse
                    torch.nn.init.normal_(parameter, mean=0.5, std=0.2)
            model.save_pretrained(made[name])
        return made[name]

    return folder


def engine(folder: Path, **overrides: object) -> HfRolloutEngine:
    settings = {"dtype": "float32", "device": "cpu", "max_model_len": 64} | overrides
    return HfRolloutEngine(str(folder), HfRollout(), **settings)  # type: ignore[arg-type]


def full_logp(folder: Path, prompt: list[int], sample: Sample, temperature: float) -> torch.Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        logits = model(torch.tensor([prompt + sample.token_ids])).logits[0, len(prompt) - 1 : -1]
    return (logits / temperature).log_softmax(-1).gather(-1, torch.tensor(sample.token_ids)[:, None])[:, 0]


def tokens(samples: list[Sample]) -> list[list[int]]:
    return [sample.token_ids for sample in samples]


@pytest.mark.parametrize("name", MODELS)
def test_logprobs_equal_those_of_a_full_forward_pass(name: str, folders: Callable[[str], Path]) -> None:
    samples = engine(folders(name)).generate(PROMPTS, SAMPLING, ROWS)
    for prompt, sample in zip(PROMPTS, samples, strict=True):
        expected = full_logp(folders(name), prompt, sample, SAMPLING.temperature)
        torch.testing.assert_close(torch.tensor(sample.logp), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", MODELS)
def test_each_architecture_takes_its_intended_path(name: str, folders: Callable[[str], Path]) -> None:
    assert (engine(folders(name))._fused is not None) == (name in _FAST)


@pytest.mark.parametrize("name", ["qwen2", "gpt2"])
def test_a_row_samples_the_same_whatever_is_around_it(name: str, folders: Callable[[str], Path]) -> None:
    whole = tokens(engine(folders(name)).generate(PROMPTS, SAMPLING, ROWS))
    for places in (1, 3, 7):
        few = engine(folders(name), max_concurrent=places)
        assert tokens(few.generate(PROMPTS, SAMPLING, ROWS)) == whole
    assert tokens(engine(folders(name)).generate(PROMPTS[5:6], SAMPLING, ROWS[5:6])) == whole[5:6]


def test_rows_and_seeds_make_different_samples(folders: Callable[[str], Path]) -> None:
    rollout = engine(folders("qwen2"))
    prompts = [PROMPTS[0]] * 4
    free = replace(SAMPLING, ignore_eos=True)
    first = tokens(rollout.generate(prompts, free, [0, 1, 2, 3]))
    assert len({tuple(ids) for ids in first}) == 4
    assert tokens(rollout.generate(prompts, free, [3, 2, 1, 0])) == first[::-1]
    assert tokens(rollout.generate(prompts, replace(free, seed=4), [0, 1, 2, 3])) != first


@pytest.mark.parametrize("name", MODELS)
def test_greedy_equals_generate_of_transformers(name: str, folders: Callable[[str], Path]) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(folders(name)).eval()
    samples = engine(folders(name)).generate(PROMPTS, replace(SAMPLING, temperature=0.0), ROWS)
    for prompt, sample in zip(PROMPTS, samples, strict=True):
        ids = torch.tensor([prompt])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False)
        assert sample.token_ids == out[0, len(prompt) :].tolist()
        expected = full_logp(folders(name), prompt, sample, 1.0)
        torch.testing.assert_close(torch.tensor(sample.logp), expected, atol=1e-5, rtol=0)


def test_a_response_ends_at_any_stop_token_or_at_its_limit(folders: Callable[[str], Path]) -> None:
    samples = engine(folders("qwen2")).generate(PROMPTS * 8, SAMPLING, list(range(64)))
    assert {sample.token_ids[-1] for sample in samples if sample.finish_reason == "stop"} == set(STOP_IDS)
    for sample in samples:
        assert not set(STOP_IDS) & set(sample.token_ids[:-1])
        assert (sample.finish_reason == "length") == (sample.token_ids[-1] not in STOP_IDS)
        assert len(sample.logp) == len(sample.token_ids) <= 20


def test_ignore_eos_goes_on_to_the_limit(folders: Callable[[str], Path]) -> None:
    samples = engine(folders("qwen2")).generate(PROMPTS, replace(SAMPLING, ignore_eos=True), ROWS)
    assert {(len(sample.token_ids), sample.finish_reason) for sample in samples} == {(20, "length")}


def test_prompt_and_response_never_exceed_the_model_length(folders: Callable[[str], Path]) -> None:
    short = engine(folders("qwen2"), max_model_len=9)
    samples = short.generate(PROMPTS, replace(SAMPLING, ignore_eos=True), ROWS)
    assert [len(s.token_ids) for s in samples] == [9 - len(p) for p in PROMPTS]
    with pytest.raises(RolloutError, match="prompt 1 has 9 tokens"):
        short.generate([[2], [2] * 9], SAMPLING, [0, 1])


def test_the_cache_grows_without_changing_samples(
    folders: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    long = replace(SAMPLING, max_tokens=50, ignore_eos=True)
    whole = tokens(engine(folders("qwen2")).generate(PROMPTS, long, ROWS))
    monkeypatch.setattr("rlctl_train.rollout.fused._GROWTH_TOKENS", 2)
    monkeypatch.setattr("rlctl_train.rollout.fused._PREFILL_TOKENS", 8)
    rollout = engine(folders("qwen2"), max_concurrent=5)
    assert tokens(rollout.generate(PROMPTS, long, ROWS)) == whole
    assert tokens(rollout.generate(PROMPTS, long, ROWS)) == whole


def test_rows_join_while_others_are_decoded(folders: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    rollout = engine(folders("qwen2"), max_concurrent=4)
    rollout.generate(PROMPTS[:1], SAMPLING, [0])
    decoder = rollout._decoder
    assert decoder is not None
    active_at_entry: list[int] = []
    add = decoder.add
    monkeypatch.setattr(decoder, "add", lambda *a: active_at_entry.append(len(decoder._lengths)) or add(*a))  # type: ignore[attr-defined]
    rollout.generate(PROMPTS * 4, SAMPLING, list(range(32)))
    assert any(active_at_entry)


def test_a_group_computes_its_prompt_once(folders: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    rollout = engine(folders("qwen2"))
    rollout.generate(PROMPTS[:1], SAMPLING, [0])
    decoder = rollout._decoder
    assert decoder is not None
    computed: list[int] = []
    add = decoder.add
    monkeypatch.setattr(decoder, "add", lambda prompts, copies: computed.append(len(prompts)) or add(prompts, copies))
    rollout.generate(PROMPTS, SAMPLING, ROWS)
    assert computed == [5]


def test_no_step_is_computed_for_finished_rows(folders: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    rollout = engine(folders("qwen2"))
    rollout.generate(PROMPTS[:1], SAMPLING, [0])
    decoder = rollout._decoder
    assert decoder is not None
    stepped: list[int] = []
    step = decoder.step
    monkeypatch.setattr(decoder, "step", lambda ids: stepped.append(len(ids)) or step(ids))
    samples = rollout.generate(PROMPTS, SAMPLING, ROWS)
    assert sum(stepped) == sum(len(sample.token_ids) - 1 for sample in samples)


def test_bfloat16_logprobs_stay_close_to_float32(folders: Callable[[str], Path]) -> None:
    rollout = engine(folders("qwen2"), dtype="bfloat16")
    assert rollout._fused is not None
    samples = rollout.generate(PROMPTS, SAMPLING, ROWS)
    for prompt, sample in zip(PROMPTS, samples, strict=True):
        expected = full_logp(folders("qwen2"), prompt, sample, SAMPLING.temperature)
        torch.testing.assert_close(torch.tensor(sample.logp), expected, atol=0.3, rtol=0)


def test_a_decoder_that_disagrees_with_the_model_is_not_used(
    folders: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    norm = torch.nn.functional.rms_norm
    monkeypatch.setattr(torch.nn.functional, "rms_norm", lambda *a: norm(*a) * 1.1)
    assert engine(folders("qwen2"))._fused is None
    assert "slow way" in caplog.text


def test_broken_weights_are_an_error_and_do_not_outlast_their_repair(folders: Callable[[str], Path]) -> None:
    rollout = engine(folders("qwen2"))
    good = rollout.generate(PROMPTS, SAMPLING, ROWS)
    layer = rollout._model.model.layers[0].self_attn.v_proj
    kept = layer.weight.clone()
    layer.weight[0, 0] = torch.nan
    with pytest.raises(RolloutError, match="not finite"):
        rollout.generate(PROMPTS, SAMPLING, ROWS)
    layer.weight.copy_(kept)
    assert rollout.generate(PROMPTS, SAMPLING, ROWS) == good


def test_a_folder_without_a_model_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot load the model") as caught:
        engine(tmp_path)
    assert caught.value.exit_code == PREFLIGHT


def test_no_prompts_make_no_samples(folders: Callable[[str], Path]) -> None:
    assert engine(folders("qwen2")).generate([], SAMPLING, []) == []


@pytest.mark.parametrize("name", ["qwen2", "gpt2"])
def test_a_response_that_is_longer_ends_later(name: str, folders: Callable[[str], Path]) -> None:
    samples = engine(folders(name)).generate(PROMPTS, replace(SAMPLING, ignore_eos=False), ROWS)
    seconds = [sample.seconds for sample in sorted(samples, key=lambda sample: len(sample.token_ids))]
    assert all(one is not None and one > 0 for one in seconds)
    assert seconds == sorted(seconds, key=lambda one: one or 0.0) and len(set(seconds)) > 1
