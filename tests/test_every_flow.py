"""Every flow for two steps through Ray; adapters, and that each learns and resumes, are for the session `long`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rlctl_train.config.model import RandomModel
from rlctl_train.model_factory import make_random_model
from tests import ray_head, runs

pytestmark = pytest.mark.slow

ANY_DIGIT = {"type": "custom", "path": f"{Path(__file__).with_name('digit_reward.py')}:any_digit"}
TEACHER = RandomModel(hidden_size=32, num_layers=1, intermediate_size=64, max_position=64)
LORA = {"model": {**runs.CONFIG["model"], "lora": {"rank": 2}}, "algo": {"type": "grpo", "group_size": 4}}
RUNS: dict[str, tuple[dict[str, Any], str]] = {
    "dapo": ({"algo": {"type": "dapo", "group_size": 2}, "reward": ANY_DIGIT}, "sampling/rounds"),
    "prime": ({"algo": {"type": "prime", "group_size": 4}, "reward": ANY_DIGIT}, "reward_model/loss"),
    "spin": ({"algo": {"type": "spin", "refresh_every_steps": 2}}, "actor/pair_margin"),
    "distill": ({"algo": {"type": "distill", "group_size": 2}}, "teacher/reverse_kl"),
}


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with ray_head.running(tmp_path_factory.mktemp("ray") / "head.log") as address:
        yield address


@pytest.mark.parametrize("name", [*RUNS, pytest.param("lora", marks=pytest.mark.long)])
def test_two_steps_change_the_policy_and_say_what_the_flow_did(name: str, tmp_path: Path, address: str) -> None:
    sections, metric = (LORA, "actor/entropy") if name == "lora" else RUNS[name]
    if name == "distill":
        make_random_model(TEACHER, tmp_path / "teacher", seed=5)
        sections = {"algo": sections["algo"] | {"teacher_path": str(tmp_path / "teacher")}}
    files = runs.make_run(
        tmp_path / "run",
        **sections,
        ray={"address": address},
        trainer={"num_steps": 2},
        validation={"every_steps": 0},
        checkpoint={"every_steps": 0, "export_hf": False},
    )
    assert runs.run(files) == 0, runs.log(files)
    lines = runs.lines(files)
    assert len(lines) == 2 and lines[-1]["actor/grad_norm"] > 0 and metric in lines[-1]
    assert lines[0].get("health/logprob_gap", 0.0) < 1e-4
