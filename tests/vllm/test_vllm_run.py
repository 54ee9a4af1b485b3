"""Whole runs with vLLM as the rollout engine: weights reach it after every update, and log-probs agree."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlctl_train.config.layout import RunFiles
from tests import runs

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

VLLM = {"type": "vllm", "max_response_tokens": 6, "kv_cache_gib": 0.25, "enforce_eager": True}


@pytest.mark.parametrize(("placement", "tied"), [("colocated", True), ("split", False)])
def test_a_run_trains_through_vllm_and_its_log_probs_stay_the_trainers(
    tmp_path: Path, placement: str, tied: bool
) -> None:
    model = {"type": "random", "hidden_size": 64, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1}
    files = runs.make_run(
        tmp_path / "run",
        model=model | {"intermediate_size": 64, "max_position": 64, "tie_embeddings": tied},
        rollout=VLLM,
        placement=placement,
        trainer={"num_steps": 3, "optim": {"lr": 1e-2}},
    )
    _check(files)


def test_merged_adapters_reach_the_engine_after_every_update(tmp_path: Path) -> None:
    model = {"type": "random", "hidden_size": 64, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1}
    files = runs.make_run(
        tmp_path / "run",
        model=model | {"intermediate_size": 64, "max_position": 64, "lora": {"rank": 4}},
        rollout=VLLM,
        trainer={"num_steps": 3, "mini_batches_per_step": 2, "optim": {"lr": 1e-2}},
    )
    _check(files)


def test_a_run_trains_through_an_engine_of_two_ranks(tmp_path: Path) -> None:
    model = {"type": "random", "hidden_size": 64, "num_layers": 1, "num_heads": 2, "num_kv_heads": 2}
    files = runs.make_run(
        tmp_path / "run",
        plan={"trainer_devices": 2, "rollout_devices": 2, "rollout_tensor_parallel": 2},
        model=model | {"intermediate_size": 64, "max_position": 64, "tie_embeddings": True},
        rollout=VLLM,
        trainer={"num_steps": 3, "optim": {"lr": 1e-2}},
    )
    _check(files)


def _check(files: RunFiles) -> None:
    assert runs.run(files) == 0, runs.log(files)
    trained = runs.lines(files)
    assert trained[0]["health/logprob_gap"] < 1e-4
    assert all(line["health/logprob_gap_mean"] < 1e-4 for line in trained)
