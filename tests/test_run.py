"""Whole runs through Ray: `python -m rlctl_train RUN_DIR` from an empty folder to an exported model."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from rlctl_train.config.layout import RunFiles
from tests import runs
from tests.plain import plain_accuracy

pytestmark = pytest.mark.slow


def test_a_grpo_run_leaves_everything_it_promises(tmp_path: Path) -> None:
    files = runs.make_run(
        tmp_path / "run", plan={"trainer_devices": 2, "rollout_devices": 2}, warm_start={"num_steps": 3}
    )
    process = runs.start(files)
    try:
        told = where_the_warm_start_is(files, process)
        assert process.wait(300) == 0, runs.log(files)
    finally:
        process.kill()
    assert told.startswith("asked for in step 0, phase ") and "in _warm_start" in told
    assert runs.status(files)["state"] == "done"
    assert [line["step"] for line in runs.lines(files)] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in runs.lines(files, "validation")] == [0, 3, 6]
    assert len(runs.lines(files, "warm_start")) == 3
    first = runs.lines(files)[0]
    assert first["health/logprob_gap"] < 1e-4
    for name in ("actor/pg_loss", "actor/entropy", "actor/lr", "timing_s/gen", "memory_gib/actor_update"):
        assert name in first
    assert all(0 < first[f"{share}/{role}"] <= 1 for share in ("busy", "device_busy") for role in ("actor", "rollout"))
    summary = json.loads(files.summary.read_text())
    assert {"val_accuracy_start", "val_accuracy_end", "steps", "wall_s", "tokens_per_s"} <= summary.keys()
    assert (files.samples / "step_000006.jsonl").read_text().count("\n") == 8
    assert files.report.exists() and files.curves.exists()
    assert summary["val_accuracy_end"] == pytest.approx(plain_accuracy(files), abs=1e-6)
    assert AutoTokenizer.from_pretrained(files.hf).chat_template


def where_the_warm_start_is(files: RunFiles, process: subprocess.Popen[bytes]) -> str:
    """Ask a run for its stacks as soon as its warm start begins; return the answer."""
    runs.wait_until((files.root / "warm_start" / "logs").exists, files, process)
    files.stacks_wanted.touch()
    runs.wait_until(lambda: not files.stacks_wanted.exists(), files, process)
    assert not (files.root / "warm_start" / "hf").exists(), "the answer came only afterwards"
    (path,) = files.logs.glob("stacks-*.txt")
    return path.read_text()


def test_ppo_with_roles_split_over_devices_and_every_kl_term(tmp_path: Path) -> None:
    files = runs.make_run(
        tmp_path / "run",
        placement="split",
        algo={
            "type": "ppo",
            "group_size": 2,
            "critic_optim": {"lr": 1e-3},
            "kl_in_reward": {"type": "adaptive", "coef": 0.1},
            "kl_loss_coef": 0.05,
            "entropy_coef": 0.01,
            "entropy_control": {"target": 0.1, "step_size": 0.004},
        },
        trainer={"num_steps": 3, "mini_batches_per_step": 2, "epochs_per_step": 2},
    )
    assert runs.run(files) == 0, runs.log(files)
    last = runs.lines(files)[-1]
    for name in ("critic/vf_loss", "actor/kl_loss", "actor/reward_kl_penalty_coeff", "critic/grad_norm"):
        assert name in last
    assert last["actor/reward_kl_penalty_coeff"] != 0.1
    paid = [line["actor/entropy_coef"] for line in runs.lines(files)]
    assert paid == [0.01, 0.0, 0.0], "an untrained policy is far above the target"
    state = json.loads((files.checkpoints / "step_000003" / "state.json").read_text())
    assert state["entropy"] == {"coef": 0.0, "is_paid": False}


@pytest.mark.long
def test_supervised_training_alone_lowers_the_held_out_loss(tmp_path: Path) -> None:
    files = runs.make_run(tmp_path / "run", algo={"type": "sft"}, reward=None, trainer={"prompts_per_step": 16})
    assert runs.run(files) == 0, runs.log(files)
    losses = [line["val/loss"] for line in runs.lines(files, "validation")]
    assert losses[-1] < losses[0]


@pytest.mark.long
def test_supervised_training_with_a_reward_validates_the_weights_it_has_just_learnt(tmp_path: Path) -> None:
    files = runs.make_run(
        tmp_path / "run",
        algo={"type": "sft"},
        trainer={"num_steps": 4, "prompts_per_step": 32, "mini_batches_per_step": 8, "optim": {"lr": 1e-2}},
        validation={"every_steps": 2, "temperature": 1.0},
    )
    assert runs.run(files) == 0, runs.log(files)
    scores = [line["val/score"] for line in runs.lines(files, "validation")]
    assert scores[-1] > scores[0], "digits are all the demonstrations show, and the score is the share of digits"
