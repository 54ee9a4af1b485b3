"""What a merge makes of verl's shards is a model that vLLM loads and samples from as transformers does."""

from __future__ import annotations

import multiprocessing
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from rlctl_train.checkpoint import kinds
from rlctl_train.checkpoint.merge import MergeOptions, merge, plan_merge
from rlctl_train.config.rollout import VllmRollout
from rlctl_train.rollout.vllm import VllmRolloutEngine
from tests import verl_files
from tests.vllm.test_vllm_engine import PROMPTS, ROWS, SAMPLING, logp_gap, make_model

pytestmark = pytest.mark.vllm


def merged(folder: Path, model: PreTrainedModel) -> Path:
    """Write a model as verl's trainer on four ranks does, and merge that."""
    # In a process of its own: vLLM leaves this one a process group, and the shards are written as a rank of another.
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        pool.apply(
            verl_files.write_shards, (folder / "actor", dict(model.state_dict())), {"num_ranks": 4, "replicas": 2}
        )
    model.config.architectures = [type(model).__name__]
    for settings in (model.config, model.generation_config):
        assert settings is not None
        settings.save_pretrained(folder / "actor" / "huggingface")
    return merge(plan_merge(kinds.read(folder / "actor"), MergeOptions()), folder / "merged")


def likeliest(model: PreTrainedModel, prompt: list[int]) -> list[int]:
    """Return the response of transformers' own greedy search, its stop token included."""
    prompt_ids = torch.tensor([prompt])
    found = model.generate(  # type: ignore[operator]
        prompt_ids, attention_mask=torch.ones_like(prompt_ids), do_sample=False, max_new_tokens=SAMPLING.max_tokens
    )
    return found[0, len(prompt) :].tolist()


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_merged_checkpoint_of_verls_generates_in_vllm_as_in_transformers(tmp_path: Path, tied: bool) -> None:
    model = make_model(0, tied=tied)
    folder = merged(tmp_path, model)
    engine = VllmRolloutEngine(
        str(folder), VllmRollout(kv_cache_gib=0.05), dtype="float32", device="cpu", max_model_len=64, max_concurrent=8
    )
    samples = engine.generate(PROMPTS, replace(SAMPLING, temperature=0.0), ROWS)
    assert [sample.token_ids for sample in samples] == [likeliest(model, prompt) for prompt in PROMPTS]
    assert logp_gap(model, samples, 1.0) < 1e-4
