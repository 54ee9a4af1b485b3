"""Whole runs whose loss compares whole distributions with the reference's, through Ray."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests import runs


def kl_trace(folder: Path, *, plan: dict[str, Any] | None = None, lora: bool = False, **algo: Any) -> list[float]:
    """Return the KL loss of each step of a short run."""
    model = {**runs.CONFIG["model"], "lora": {"rank": 2, "alpha": 4}} if lora else runs.CONFIG["model"]
    files = runs.make_run(
        folder,
        plan=plan,
        model=model,
        algo={"type": "grpo", "group_size": 4, "kl_loss_coef": 0.1, "kl_loss_estimator": "full", **algo},
        trainer={"num_steps": 3, "mini_batches_per_step": 2, "optim": {"lr": 1e-2}},
        validation={"every_steps": 0},
    )
    assert runs.run(files) == 0, runs.log(files)
    return [line["actor/kl_loss"] for line in runs.lines(files)]


@pytest.mark.long
@pytest.mark.parametrize("lora", [False, True], ids=["reference", "adapters"])
def test_the_policy_leaves_its_reference_step_by_step(tmp_path: Path, lora: bool) -> None:
    trace = kl_trace(tmp_path / "run", lora=lora, kl_in_reward={"type": "fixed"})
    assert 0 <= trace[0] < trace[1] < trace[2] < 1, trace


@pytest.mark.long
def test_two_ranks_give_what_one_gives(tmp_path: Path) -> None:
    one = kl_trace(tmp_path / "one")
    two = kl_trace(tmp_path / "two", plan={"trainer_devices": 2, "max_tokens_per_micro_batch": 60})
    assert two == pytest.approx(one, rel=1e-3, abs=1e-6) and one[-1] > 0
