"""Small whole runs of what asks more of a run than GRPO does: other flows, columns, critics and draws."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rlctl_train.telemetry.glossary import describe
from tests import runs

pytestmark = pytest.mark.long

REWARD = f"{Path(__file__).with_name('digit_reward.py')}"
PARTS = [{"type": "custom", "path": f"{REWARD}:digits"}, {"type": "custom", "path": f"{REWARD}:any_digit"}]
CRITIC = {"group_size": 2, "critic_optim": {"lr": 1e-3}}
RUNS: dict[str, tuple[dict[str, Any], str]] = {
    "remax": ({"type": "remax", "group_size": 2}, "reward/greedy_baseline"),
    "sppo": ({"type": "sppo", "group_size": 2}, "actor/ppo_kl"),
    "otb": ({"type": "otb", "group_size": 2}, "health/logprob_gap"),
    "gdpo": ({"type": "gdpo", "parts": {"digits": 1.0, "any_digit": 0.5}}, "reward/any_digit"),
    "vapo": ({"type": "vapo", "critic_warmup_steps": 1, **CRITIC}, "actor/lm_loss"),
    "pf_ppo": ({"type": "ppo", "resample": {"type": "max_min"}, **CRITIC}, "sampling/distinct_share"),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_learns_and_says_what_it_did(name: str, tmp_path: Path) -> None:
    algo, metric = RUNS[name]
    reward: dict[str, Any] = {"type": "sum", "parts": PARTS} if name == "gdpo" else runs.CONFIG["reward"]
    trainer = {"num_steps": 3, "mini_batches_per_step": 2}
    files = runs.make_run(tmp_path / "run", algo=algo, reward=reward, trainer=trainer, validation={"every_steps": 0})
    assert runs.run(files) == 0, runs.log(files)
    lines = runs.lines(files)[1:]
    assert all(line["actor/grad_norm"] > 0 and metric in line for line in lines)
    assert all(describe(key) for line in lines for key in line if "/" in key)
