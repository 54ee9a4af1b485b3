"""Whole runs in which a tiny student learns from a tiny teacher, through Ray."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlctl.workload import shape_of, workload_from_config
from rlctl_train.config import RunConfig
from rlctl_train.config.errors import UserError
from rlctl_train.config.layout import RunFiles
from rlctl_train.config.model import RandomModel
from rlctl_train.config.relations import relation_problems
from rlctl_train.data.loader import PromptLoader
from rlctl_train.model_factory import make_random_model
from rlctl_train.placement import lay_out
from rlctl_train.prepare import prepare
from tests import runs

TEACHER = RandomModel(hidden_size=48, num_layers=2, num_heads=4, intermediate_size=64, max_position=64, init_std=0.3)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("teacher")
    make_random_model(TEACHER, folder, seed=5)
    return str(folder)


def config(path: str, **algo: Any) -> RunConfig:
    return RunConfig.model_validate({**runs.CONFIG, "algo": {"type": "distill", "teacher_path": path, **algo}})


def test_the_teacher_has_a_place_beside_the_student_and_a_shape_of_its_own(teacher: str) -> None:
    made = config(teacher, kl_loss_coef=0.1)
    assert set(lay_out(runs.PLAN, made).slots) == {"actor", "reference", "teacher", "rollout"}
    asked = workload_from_config(made, shape_of(made))
    assert asked.shape_of("teacher").hidden_size == 48 and asked.shape_of("actor").hidden_size == 32
    assert workload_from_config(config("runs/none/hf"), asked.shape).teacher == asked.shape


def test_a_teacher_that_is_not_there_is_told_before_anything_is_trained(tmp_path: Path) -> None:
    files = runs.make_run(tmp_path / "run", algo={"type": "distill", "teacher_path": "runs/none/hf"})
    with pytest.raises(UserError, match="no teacher") as caught:
        prepare(files, config("runs/none/hf"))
    assert "algo.teacher_path" in caught.value.remedy


def test_a_teacher_of_another_language_is_refused(tmp_path: Path, teacher: str) -> None:
    other = tmp_path / "other"
    make_random_model(TEACHER, other, seed=5)
    tokenizer = AutoTokenizer.from_pretrained(other)
    tokenizer.add_tokens(["<more>"])
    tokenizer.save_pretrained(other)
    files = runs.make_run(tmp_path / "run", algo={"type": "distill", "teacher_path": str(other)})
    with pytest.raises(UserError, match="numbers its tokens otherwise"):
        prepare(files, config(str(other)))
    assert prepare(files, config(teacher)).teacher is not None


def test_what_would_have_no_effect_is_refused() -> None:
    keys = [p.key for p in relation_problems(config("t", task_coef=1.0))]
    keys += [p.key for p in relation_problems(config("t", kl_in_reward={"type": "fixed"}))]
    assert keys == ["algo.group_size", "algo.kl_in_reward"]
    assert not relation_problems(config("t", task_coef=1.0, group_size=2))


@pytest.mark.long
@pytest.mark.parametrize(("signal", "num_steps"), [("sampled", 60), ("top_k", 20)])
def test_the_student_comes_closer_to_the_teacher(tmp_path: Path, teacher: str, signal: str, num_steps: int) -> None:
    files = runs.make_run(
        tmp_path / "run",
        plan={"trainer_devices": 2},
        algo={"type": "distill", "teacher_path": teacher, "signal": {"type": signal}, "group_size": 4},
        trainer={"num_steps": num_steps, "prompts_per_step": 32, "optim": {"lr": 1e-2}},
        validation={"every_steps": 0},
    )
    assert runs.run(files) == 0, runs.log(files)
    name = "teacher/reverse_kl" if signal == "sampled" else "actor/teacher_kl"
    trace = [line[name] for line in runs.lines(files)]
    assert sum(trace[-5:]) < 0.87 * sum(trace[:5]), trace
    models = [AutoModelForCausalLM.from_pretrained(path) for path in (files.model, files.hf, teacher)]
    before, after, wanted = (first_token(model, files) for model in models)
    assert divergence(after, wanted) < 0.9 * divergence(before, wanted)


def first_token(model: Any, files: RunFiles) -> Tensor:
    """Return the log-probabilities [prompts, V] of what comes first after the run's own training prompts."""
    made = RunConfig.model_validate_json(files.config.read_text())
    tokenizer = AutoTokenizer.from_pretrained(files.model)
    loader = PromptLoader(files.data / "train.parquet", tokenizer, made.data, seed=0)
    with torch.no_grad():
        rows = [model(torch.tensor([row.prompt_ids])).logits[0, -1] for row in loader.next_batch(len(loader))]
    return torch.stack(rows).log_softmax(-1)


def divergence(student: Tensor, teacher: Tensor) -> float:
    """Return the KL of both directions together, mean over prompts."""
    return float(((teacher.exp() - student.exp()) * (teacher - student)).sum(-1).mean())
