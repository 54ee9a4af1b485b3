"""Whole runs in which a tiny reward model learns beside a tiny policy, through Ray."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rlctl.workload import shape_of, workload_from_config
from rlctl_train.config import RunConfig
from rlctl_train.config.relations import relation_problems
from rlctl_train.placement import lay_out
from tests import runs

SECTIONS: dict[str, Any] = {
    "plan": {"trainer_devices": 2},
    "reward": {"type": "custom", "path": f"{Path(__file__).with_name('digit_reward.py')}:any_digit"},
    "algo": {"type": "prime", "group_size": 4, "beta": 0.5, "max_rounds": 2, "reward_optim": {"lr": 1e-2}},
    "trainer": {"num_steps": 6, "prompts_per_step": 8, "mini_batches_per_step": 2, "optim": {"lr": 1e-3}},
    "validation": {"every_steps": 0},
}


def config(**algo: Any) -> RunConfig:
    return RunConfig.model_validate({**runs.CONFIG, "algo": {"type": "prime", **algo}})


def test_the_reward_model_has_a_place_of_its_own() -> None:
    made = config(kl_loss_coef=0.1)
    assert set(lay_out(runs.PLAN, made).slots) == {"actor", "reward_model", "reference", "rollout"}
    assert workload_from_config(made, shape_of(made)).roles == ("actor", "reward_model", "reference")


def test_bounds_that_cross_are_refused() -> None:
    assert [problem.key for problem in relation_problems(config(min_accuracy=0.9))] == ["algo.min_accuracy"]


@pytest.mark.long
def test_a_resumed_run_takes_the_reward_model_along_bit_for_bit(tmp_path: Path) -> None:
    whole = runs.make_run(tmp_path / "whole", **SECTIONS)
    assert runs.run(whole) == 0, runs.log(whole)
    lines = runs.lines(whole)
    names = ("reward_model/loss", "reward_model/accuracy", "reward_model/grad_norm", "sampling/kept_groups")
    assert lines[-1]["reward_model/loss"] < lines[0]["reward_model/loss"]
    assert lines[0]["health/logprob_gap"] < 1e-4 and sum(line["actor/grad_norm"] for line in lines) > 0

    cut = runs.make_run(tmp_path / "cut", **SECTIONS)
    process = runs.start(cut)
    runs.wait_for_step(cut, process, 3)
    runs.kill(process.pid)
    assert process.wait(120) != 0
    assert runs.run(cut) == 0, runs.log(cut)
    assert runs.learning_trace(cut) == runs.learning_trace(whole)
    assert [[line[name] for name in names] for line in runs.lines(cut)] == [[line[n] for n in names] for line in lines]
