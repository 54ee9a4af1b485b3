"""The crew without Ray: which failures mean that a worker is lost, whom it concerns, and when workers are asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast
from unittest.mock import MagicMock

import pytest
from ray.exceptions import ActorDiedError, ObjectLostError, RayTaskError

from rlctl_train import crew as crew_module
from rlctl_train.config.errors import UserError
from rlctl_train.crew import Crew
from rlctl_train.memory_watch import Usage
from rlctl_train.sync import relay
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


class Worker:
    """Tells of one more second of work with every report, and of the phases between them."""

    def __init__(self, told: list[Usage]) -> None:
        self.memory, self.told = self, told

    def remote(self) -> Usage:
        return self.told.pop(0)


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Crew:
    """A crew of two whose workers tell first of generation or an update, then of handing over weights."""
    monkeypatch.setattr(crew_module.ray, "get", lambda refs: refs)
    made = crew(tmp_path, {})
    made._beside_gib = 0.0
    made.engines = {
        "actor": [Worker([Usage("a", {"actor_update": 3.0}, 1.0, busy_s=2.0), Usage("a", {"weight_sync": 2.0}, 1.0)])]
    }
    made.rollouts = [
        Worker([Usage("b", {"generation": 4.0}, 1.0, busy_s=1.0), Usage("b", {"weight_sync": 9.0}, 1.0, busy_s=1.0)])
    ]
    return made


def test_workers_that_were_asked_ahead_are_not_asked_again_unless_they_have_worked_since(asked: Crew) -> None:
    asked.ask()
    assert set(asked.memory()) == {"memory_gib/actor_update", "memory_gib/generation", "busy/actor", "busy/rollout"}
    assert asked.rollouts[0].told  # one report is left
    asked.has_worked = True
    assert asked.memory()["memory_gib/weight_sync"] == 9.0


def test_work_after_the_asking_counts_into_the_same_step(asked: Crew) -> None:
    asked.ask()
    asked.has_worked = True
    told = asked.memory()
    assert (told["memory_gib/generation"], told["memory_gib/weight_sync"]) == (4.0, 9.0)
    assert told["busy/rollout"] == told["busy/actor"]  # two seconds each, over the same time


def test_what_goes_with_a_hand_over_is_asked_between_its_last_request_and_its_last_wait(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sender, receiver, waits = MagicMock(), MagicMock(), []
    sender.stream_weights.options().remote.return_value = iter(["bucket", "sum"])
    monkeypatch.setattr(relay, "collect", lambda refs: waits.append(refs) or ["sum"])
    monkeypatch.setattr(relay.ray, "get", lambda ref: ref)
    seen: list[tuple[bool, int]] = []
    relay.hand_over(
        [sender], [receiver], "float32", 1, lambda: seen.append((receiver.finish_update.remote.called, len(waits)))
    )
    assert seen == [(True, len(waits) - 1)] and waits[-1] == [receiver.finish_update.remote.return_value]
