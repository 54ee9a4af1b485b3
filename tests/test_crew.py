"""The crew without Ray: which failures mean that a worker is lost, and which engines its loss concerns."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
from ray.exceptions import ActorDiedError, ObjectLostError, RayTaskError

from rlctl_train.config.errors import UserError
from rlctl_train.crew import Crew
from rlctl_train.workers import WorkerSpec

DEAD = {"actor worker 1": "died (its worker process has died)"}


def crew(root: Path, dead: dict[str, str], engine_size: int = 1) -> Crew:
    made = Crew(
        cast(WorkerSpec, None), cast(Any, type("Layout", (), {"engine_size": engine_size})), None, root / "roster"
    )
    made._dead = lambda: dead
    made._members = dict.fromkeys([*(f"rollout worker {rank}" for rank in range(6)), "actor worker 0"])
    return made


def raised(cause: Exception) -> RayTaskError:
    return RayTaskError("update", "Traceback ...", cause)


def test_a_peer_that_fails_because_another_died_is_a_loss_and_its_own_exception_is_not(tmp_path: Path) -> None:
    error = raised(RuntimeError("Connection closed by peer"))
    assert crew(tmp_path, DEAD).lost(error) == DEAD
    assert crew(tmp_path, {}).lost(error) == {}


@pytest.mark.parametrize(
    "error", [raised(UserError("a reward that is wrong", "mend it")), ActorDiedError(raised(ValueError("no model")))]
)
def test_what_a_person_must_mend_and_what_fails_at_birth_is_not_tried_again(tmp_path: Path, error: Any) -> None:
    assert crew(tmp_path, DEAD).lost(error) == {}


def test_data_that_went_with_their_node_are_a_loss_though_nobody_is_dead(tmp_path: Path) -> None:
    assert "was lost" in crew(tmp_path, {}).lost(ObjectLostError("ff", None, ""))["a worker"]


def test_an_engine_of_several_ranks_goes_as_a_whole_and_not_with_another_worker(tmp_path: Path) -> None:
    several = crew(tmp_path, {}, engine_size=2)
    assert several.engines_of(["rollout worker 3", "rollout worker 2"]) == [1]
    assert several.engines_of(["rollout worker 0", "rollout worker 5"]) == [0, 2]
    assert several.engines_of(["rollout worker 0", "actor worker 0"]) == []
    assert several.engines_of([]) == []
