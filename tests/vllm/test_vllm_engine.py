"""The vLLM rollout engine against plain forward passes of the same Hugging Face folder."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from rlctl_train.checksum import checksum
from rlctl_train.config.errors import PREFLIGHT, UserError
from rlctl_train.config.rollout import HfRollout, VllmRollout
from rlctl_train.rollout.base import Sample, Sampling
from rlctl_train.rollout.hf import HfRolloutEngine
from rlctl_train.rollout.vllm import VllmRolloutEngine
from rlctl_train.rollout.weights import WeightError
from rlctl_train.sync.buckets import buckets
from rlctl_train.sync.transfer import SyncError, transfer

pytestmark = pytest.mark.vllm

VOCAB = 40
STOP_IDS = [1, 5]
PROMPTS = [[2, 3, 4, 6, 7], [8, 9], [8, 9], [2, 3, 4, 6, 7], [10], [11, 12, 13, 14, 15, 16, 17]]
ROWS = list(range(100, 106))
SAMPLING = Sampling(max_tokens=20, seed=3)


def make_model(seed: int, *, tied: bool, num_kv_heads: int = 1) -> PreTrainedModel:
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=VOCAB, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=num_kv_heads,
        intermediate_size=96, max_position_embeddings=64, initializer_range=0.3, tie_word_embeddings=tied,
        pad_token_id=0, bos_token_id=None, eos_token_id=1,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.ndim == 1:  # biases and norm weights start out constant, which would hide their misuse
            torch.nn.init.normal_(parameter, mean=0.5, std=0.2)
    model.generation_config = GenerationConfig(eos_token_id=STOP_IDS, pad_token_id=0, bos_token_id=None)
    return model


def make_engine(folder: Path, *, tied: bool) -> VllmRolloutEngine:
    make_model(0, tied=tied).save_pretrained(folder)
    config = VllmRollout(kv_cache_gib=0.05)
    return VllmRolloutEngine(str(folder), config, dtype="float32", device="cpu", max_model_len=64, max_concurrent=8)


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def tied(request: pytest.FixtureRequest) -> bool:
    return request.param


@pytest.fixture(scope="module")
def folder(tied: bool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tied" if tied else "untied")


@pytest.fixture(scope="module")
def loaded(folder: Path, tied: bool) -> VllmRolloutEngine:
    return make_engine(folder, tied=tied)


@pytest.fixture
def engine(loaded: VllmRolloutEngine, tied: bool) -> Iterator[VllmRolloutEngine]:
    yield loaded
    send(make_model(0, tied=tied), loaded, 0)


def send(model: PreTrainedModel, engine: VllmRolloutEngine, version: int) -> str:
    return transfer(buckets(model.named_parameters(), 8000), engine, version, torch.float32)


def logp_gap(model: PreTrainedModel, samples: list[Sample], temperature: float) -> float:
    gaps = []
    for prompt, sample in zip(PROMPTS, samples, strict=True):
        logits = model(torch.tensor([prompt + sample.token_ids])).logits[0, len(prompt) - 1 : -1]
        logp = (logits / temperature).log_softmax(-1).gather(-1, torch.tensor(sample.token_ids)[:, None])[:, 0]
        gaps.append((logp - torch.tensor(sample.logp)).abs().max().item())
    return max(gaps)


def highest_rank(model: PreTrainedModel, samples: list[Sample]) -> int:
    """Return the worst rank of a sampled token among all tokens; 0 is the likeliest."""
    ranks = []
    for prompt, sample in zip(PROMPTS, samples, strict=True):
        logits = model(torch.tensor([prompt + sample.token_ids])).logits[0, len(prompt) - 1 : -1]
        chosen = logits.gather(-1, torch.tensor(sample.token_ids)[:, None])
        ranks.append(int((logits > chosen + 1e-5).sum(-1).max()))
    return max(ranks)


@pytest.mark.parametrize(
    "sampling",
    [
        SAMPLING,
        replace(SAMPLING, temperature=0.6),
        replace(SAMPLING, temperature=1.7, top_k=4),
        replace(SAMPLING, temperature=0.8, top_p=0.7),
        replace(SAMPLING, temperature=0.0),
    ],
    ids=["plain", "cool", "hot-top-k", "top-p", "greedy"],
)
def test_logprobs_have_one_meaning_under_all_samplings(
    sampling: Sampling, engine: VllmRolloutEngine, tied: bool
) -> None:
    samples = engine.generate(PROMPTS, sampling, ROWS)
    assert logp_gap(make_model(0, tied=tied), samples, sampling.temperature or 1.0) < 1e-4


def test_top_k_top_p_and_temperature_act_on_what_is_sampled(engine: VllmRolloutEngine, tied: bool) -> None:
    model = make_model(0, tied=tied)
    hot = replace(SAMPLING, temperature=3.0, ignore_eos=True)
    assert highest_rank(model, engine.generate(PROMPTS, hot, ROWS)) > 3
    assert highest_rank(model, engine.generate(PROMPTS, replace(hot, top_k=3), ROWS)) in (1, 2)
    assert highest_rank(model, engine.generate(PROMPTS, replace(hot, top_p=1e-4), ROWS)) == 0
    assert highest_rank(model, engine.generate(PROMPTS, replace(hot, temperature=1e-4), ROWS)) == 0


def test_greedy_equals_the_other_rollout_engine(engine: VllmRolloutEngine, folder: Path) -> None:
    other = HfRolloutEngine(str(folder), HfRollout(), dtype="float32", device="cpu", max_model_len=64)
    greedy = replace(SAMPLING, temperature=0.0)
    ours, theirs = (e.generate(PROMPTS, greedy, ROWS) for e in (engine, other))
    assert [(s.token_ids, s.finish_reason) for s in ours] == [(s.token_ids, s.finish_reason) for s in theirs]


def test_the_same_seed_and_row_give_the_same_sample(engine: VllmRolloutEngine) -> None:
    free = replace(SAMPLING, ignore_eos=True)
    samples = engine.generate(PROMPTS, free, ROWS)
    assert engine.generate(PROMPTS[::-1], free, ROWS[::-1])[::-1] == samples
    assert engine.generate(PROMPTS[2:3], free, ROWS[2:3])[0].token_ids == samples[2].token_ids
    assert samples[1].token_ids != samples[2].token_ids
    assert engine.generate(PROMPTS, replace(free, seed=4), ROWS) != samples


def test_responses_end_at_stop_tokens_limits_and_the_model_length(engine: VllmRolloutEngine) -> None:
    samples = engine.generate([[2]] * 64, SAMPLING, list(range(64)))
    assert {s.token_ids[-1] for s in samples if s.finish_reason == "stop"} == set(STOP_IDS)
    assert {len(s.token_ids) for s in samples if s.finish_reason == "length"} == {20}
    free = replace(SAMPLING, ignore_eos=True, max_tokens=100)
    assert [len(s.token_ids) for s in engine.generate(PROMPTS, free, ROWS)] == [64 - len(p) for p in PROMPTS]


def test_a_response_that_is_longer_ends_later(engine: VllmRolloutEngine) -> None:
    """Without a stop token each goes on to the model's length, and a longer prompt ends sooner."""
    samples = engine.generate(PROMPTS, replace(SAMPLING, ignore_eos=True, max_tokens=100), ROWS)
    timed = sorted((len(sample.token_ids), sample.seconds or 0.0) for sample in samples)
    seconds = [one for _, one in timed]
    assert seconds == sorted(seconds) and 0 < seconds[0] < seconds[-1]


def test_new_weights_generate_and_cached_prefixes_are_forgotten(engine: VllmRolloutEngine, tied: bool) -> None:
    prompts, rows = [[3] * 40] * 6, ROWS
    engine.generate(prompts, SAMPLING, rows)
    other = make_model(1, tied=tied)
    assert send(other, engine, 5) == checksum(other.named_parameters(), torch.float32)
    assert engine.version == 5
    assert logp_gap(other, engine.generate(PROMPTS, SAMPLING, ROWS), 1.0) < 1e-4
    sample = engine.generate(prompts, SAMPLING, rows)[0]
    logits = other(torch.tensor([prompts[0] + sample.token_ids])).logits[0, 39:-1].log_softmax(-1)
    expected = logits.gather(-1, torch.tensor(sample.token_ids)[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(sample.logp), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["model.layers.1.self_attn.k_proj.weight", "model.embed_tokens.weight",
    "model.layers.0.mlp.up_proj.weight", "model.layers.1.self_attn.v_proj.bias", "model.norm.weight"])  # fmt: skip
def test_a_poisoned_receiver_is_caught(name: str, engine: VllmRolloutEngine, tied: bool) -> None:
    plain = engine.update_weights

    def poisoned(tensors):  # type: ignore[no-untyped-def]
        """Deliver one wrong value after the sender took its checksum."""
        plain([(n, _spoil(t) if n == name else t) for n, t in tensors])

    engine.update_weights = poisoned  # type: ignore[method-assign]
    try:
        with pytest.raises(SyncError, match="version 9"):
            send(make_model(1, tied=tied), engine, 9)
    finally:
        engine.update_weights = plain  # type: ignore[method-assign]


def test_weights_spoiled_inside_the_engine_are_caught(engine: VllmRolloutEngine, tied: bool) -> None:
    def spoil(worker) -> None:  # type: ignore[no-untyped-def]
        """Let the loader write a wrong value into one layer, after the receiver hashed what came."""
        load = worker.model_runner.get_model().load_weights
        worker.model_runner.get_model().load_weights = lambda weights: load(
            (n, _spoil(t) if n.endswith("layers.1.mlp.down_proj.weight") else t) for n, t in weights
        )

    def mend(worker) -> None:  # type: ignore[no-untyped-def]
        del worker.model_runner.get_model().load_weights

    engine._llm.collective_rpc(spoil)
    try:
        with pytest.raises(SyncError, match="version 7"):
            send(make_model(1, tied=tied), engine, 7)
    finally:
        engine._llm.collective_rpc(mend)


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.self_attn.k_proj.weight"])
def test_an_update_without_all_weights_is_refused(name: str, engine: VllmRolloutEngine, tied: bool) -> None:
    tensors = [(n, t) for n, t in make_model(1, tied=tied).named_parameters() if n != name]
    with pytest.raises(WeightError, match=f"1 weights did not come: {name}"):
        transfer(buckets(tensors, 8000), engine, 3, torch.float32)


def test_heads_too_small_for_the_cpu_kernels_are_a_user_error(tmp_path: Path) -> None:
    Qwen2Config(vocab_size=VOCAB, hidden_size=32, num_attention_heads=2).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="at least 32 features; the model has 16") as caught:
        VllmRolloutEngine(str(tmp_path), VllmRollout(), dtype="float32", device="cpu", max_model_len=64)
    assert caught.value.exit_code == PREFLIGHT


def test_settings_vllm_cannot_work_with_are_a_user_error(folder: Path, loaded: VllmRolloutEngine) -> None:
    for config, reason in [
        (VllmRollout(kv_cache_gib=1e-5), "cache blocks"),
        (VllmRollout(engine_args={"no_such_argument": 1}), "no_such_argument"),
    ]:
        with pytest.raises(UserError, match=reason) as caught:
            VllmRolloutEngine(str(folder), config, dtype="float32", device="cpu", max_model_len=64)
        assert caught.value.exit_code == PREFLIGHT


def test_the_saved_folder_is_the_model_that_generates(folder: Path, tied: bool) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert checksum(loaded.named_parameters(), torch.float32) == checksum(
        make_model(0, tied=tied).named_parameters(), torch.float32
    )


def _spoil(tensor: torch.Tensor) -> torch.Tensor:
    spoiled = tensor.clone()
    spoiled.view(-1)[3] += 1e-3
    return spoiled
