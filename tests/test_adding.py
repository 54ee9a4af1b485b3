"""The examples of docs/adding.md are code that works."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from pydantic import NonNegativeFloat
from torch import Tensor

from rlctl_train.algos import ops
from rlctl_train.algos.objective import PolicyObjective
from rlctl_train.batch import Batch
from rlctl_train.config.algo import GrpoConfig
from rlctl_train.config.base import Config
from tests.test_flow_dapo import EQUAL, MIXED, FakeRun

TEXT = (Path(__file__).parents[1] / "docs" / "adding.md").read_text()


def example(word: str, **names: Any) -> dict[str, Any]:
    """Execute the example that has a word in it, with what it imports, and return the names it defines."""
    (code,) = [part for part in re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL) if word in part]
    names["__name__"] = __name__
    exec(code, names)
    return names


def test_the_flow_learns_from_the_better_half() -> None:
    step = example("ResamplingRun", ResamplingRun=Any, Sequence=Sequence, PromptRow=Any)["step"]
    run = FakeRun([EQUAL, MIXED, EQUAL, MIXED])
    step(run, run.more_prompts(4))
    assert run.learnt == [0, 2] and run.called == ["logprobs", "advantages", "update_actor", "sync"]


def test_the_algorithm_compares_with_the_batch() -> None:
    made = example("class Reinforce", ReinforceConfig=Any, Tensor=Tensor, Batch=Batch, Advantages=ops.Advantages)
    mask = torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    batch = Batch({"response_mask": mask, "rewards": torch.tensor([[0.0, 1.0, 9.0], [0.0, 0.0, 0.0]])})
    assert made["Reinforce"](None).advantages(batch).advantages.tolist() == [[0.5, 0.5, 0.0], [-0.5, 0.0, 0.0]]


def test_the_loss_is_that_of_its_formula_and_trains() -> None:
    names = {"Config": Config, "Literal": Literal, "NonNegativeFloat": NonNegativeFloat}
    made = example("class Trust", **names, Tensor=Tensor, Batch=Batch, log_ratio=ops.log_ratio)
    made["TrustLoss"].model_rebuild(_types_namespace=names)
    advantages = torch.tensor([[1.0, -1.0, 2.0]], dtype=torch.float64)
    mask = torch.tensor([[1.0, 1.0, 0.0]], dtype=torch.float64)
    batch = Batch({"response_mask": mask, "old_logp": torch.zeros_like(mask), "advantages": advantages})
    logp = torch.tensor([[-0.5, 0.2, float("nan")]], dtype=torch.float64, requires_grad=True)
    objective = PolicyObjective(made["Trust"](made["TrustLoss"](coef=0.4)), GrpoConfig(), max_response_tokens=3)
    loss, metrics = objective(ops.TokenOutputs(logp=logp), batch, ops.count(mask))
    x = logp.detach()[0, :2]
    assert loss.item() == pytest.approx(((-advantages[0, :2] * x.exp() + 0.2 * x**2).mean()).item())
    assert metrics["actor/distance"].item() == pytest.approx(0.35)
    loss.backward()
    assert logp.grad is not None and logp.grad[0, 2] == 0
    torch.testing.assert_close(logp.grad[0, :2], (-advantages[0, :2] * x.exp() + 0.4 * x) / 2)


def test_the_reward_gives_what_a_grader_may_give() -> None:
    score = example("def score")["score"]
    assert score("so it is 42 ", "42", difficulty=2)["score"] == 2
    assert score("43", "42") == {"score": 0, "acc": False, "reason": "does not"}
