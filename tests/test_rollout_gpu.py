"""The Hugging Face rollout engine on a CUDA device."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rlctl_train.config.rollout import HfRollout
from rlctl_train.rollout.base import Sampling
from rlctl_train.rollout.hf import HfRolloutEngine

pytestmark = pytest.mark.gpu

PROMPTS = [[2, 3, 4, 6, 7], [8, 9], [8, 9], [10]]
GREEDY = Sampling(max_tokens=12, temperature=0.0)


def engine(folder: Path, device: str) -> HfRolloutEngine:
    return HfRolloutEngine(str(folder), HfRollout(), dtype="float32", device=device, max_model_len=64)


def test_the_device_samples_what_the_cpu_samples(tiny_model: Path) -> None:
    on_cpu, on_gpu = (engine(tiny_model, d).generate(PROMPTS, GREEDY, range(4)) for d in ("cpu", "cuda"))
    assert [s.token_ids for s in on_gpu] == [s.token_ids for s in on_cpu]
    for ours, theirs in zip(on_gpu, on_cpu, strict=True):
        torch.testing.assert_close(torch.tensor(ours.logp), torch.tensor(theirs.logp), atol=1e-4, rtol=0)


def test_sleep_frees_device_memory_and_wake_takes_it_back(tiny_model: Path) -> None:
    before = torch.cuda.memory_allocated()
    rollout = engine(tiny_model, "cuda")
    samples = rollout.generate(PROMPTS, GREEDY, range(4))
    rollout.sleep()
    assert torch.cuda.memory_allocated() <= before + 2**20
    rollout.wake()
    assert rollout.generate(PROMPTS, GREEDY, range(4)) == samples
