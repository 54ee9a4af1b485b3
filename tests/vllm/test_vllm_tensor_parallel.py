"""One vLLM engine over two processes against the same engine in one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rlctl_train.checksum import checksum
from rlctl_train.config.rollout import VllmRollout
from rlctl_train.rollout.base import Sample, Sampling
from rlctl_train.rollout.vllm import VllmRolloutEngine
from rlctl_train.rollout.weights import WeightError
from tests.vllm.ranks import SplitEngine
from tests.vllm.test_vllm_engine import PROMPTS, ROWS, SAMPLING, logp_gap, make_model, send

pytestmark = pytest.mark.vllm

GREEDY = replace(SAMPLING, temperature=0.0, ignore_eos=True)


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[bool, SplitEngine]]:
    """Two engines of two ranks on one machine, one with tied embeddings and one without."""
    split: dict[bool, SplitEngine] = {}
    for tied in (True, False):
        folder = tmp_path_factory.mktemp("model")
        make_model(0, tied=tied, num_kv_heads=2).save_pretrained(folder)
        split[tied] = SplitEngine(folder, 2)
    yield split
    for engine in split.values():
        engine.end()


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def tied(request: pytest.FixtureRequest) -> bool:
    return request.param


def generate(engine: VllmRolloutEngine, sampling: Sampling) -> list[Sample]:
    return engine.generate(PROMPTS, sampling, ROWS)


def take(engine: VllmRolloutEngine, seed: int, tied: bool, version: int) -> str:
    """Send the weights of another model to one rank, whole tensors as every rank gets them."""
    return send(make_model(seed, tied=tied, num_kv_heads=2), engine, version)


def take_without_a_norm(engine: VllmRolloutEngine, tied: bool) -> None:
    model = make_model(0, tied=tied, num_kv_heads=2)
    engine.start_update()
    engine.update_weights((name, tensor) for name, tensor in model.named_parameters() if name != "model.norm.weight")
    engine.finish_update(9)


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLING, replace(SAMPLING, temperature=0.6, top_p=0.8)], ids=str)
def test_every_rank_yields_the_samples_and_log_probs_of_the_model(
    engines: dict[bool, SplitEngine], tied: bool, sampling: Sampling
) -> None:
    first, second = engines[tied].on_all(generate, sampling)
    assert first == second
    assert logp_gap(make_model(0, tied=tied, num_kv_heads=2), first, sampling.temperature or 1.0) < 1e-4


def test_greedy_tokens_and_log_probs_are_those_of_one_process(
    engines: dict[bool, SplitEngine], tied: bool, tmp_path: Path
) -> None:
    make_model(0, tied=tied, num_kv_heads=2).save_pretrained(tmp_path)
    config = VllmRollout(kv_cache_gib=0.05)
    alone = VllmRolloutEngine(str(tmp_path), config, dtype="float32", device="cpu", max_model_len=64, max_concurrent=8)
    for seed in (0, 1):
        take(alone, seed, tied, seed)
        engines[tied].on_all(take, seed, tied, seed)
        whole, split = generate(alone, GREEDY), engines[tied].on_all(generate, GREEDY)[0]
        assert [sample.token_ids for sample in split] == [sample.token_ids for sample in whole]
        gaps = torch.tensor([s.logp for s in split]) - torch.tensor([s.logp for s in whole])
        assert gaps.abs().max() < 1e-4
    engines[tied].on_all(take, 0, tied, 0)


def test_new_weights_reach_every_rank_and_generate(engines: dict[bool, SplitEngine], tied: bool) -> None:
    other = make_model(2, tied=tied, num_kv_heads=2)
    held = engines[tied].on_all(take, 2, tied, 5)
    assert held == [checksum(other.named_parameters(), torch.float32)] * 2
    samples = engines[tied].on_all(generate, SAMPLING)[0]
    assert logp_gap(other, samples, 1.0) < 1e-4
    engines[tied].on_all(take, 0, tied, 0)


def test_an_update_without_all_weights_is_refused_by_every_rank(engines: dict[bool, SplitEngine], tied: bool) -> None:
    with pytest.raises(WeightError, match="1 weights did not come"):
        engines[tied].on_all(take_without_a_norm, tied)
    engines[tied].on_all(take, 0, tied, 0)
