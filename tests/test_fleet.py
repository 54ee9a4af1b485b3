"""The fleet without Ray: when an engine dies, only its share is sampled again, as it would have been."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from ray.exceptions import ActorDiedError

from rlctl_train import fleet as fleet_module
from rlctl_train.config.layout import RunFiles
from rlctl_train.crew import Crew
from rlctl_train.data.loader import PromptRow
from rlctl_train.fleet import Fleet
from rlctl_train.recovery import Restarts
from rlctl_train.rollout.base import Sampling
from rlctl_train.status import Status
from rlctl_train.workers import WorkerSpec

PROMPTS = [PromptRow([number], {"number": number}) for number in range(4)]


class Engine:
    """Answers at once, unless it is dead."""

    def __init__(self, name: str, asked: list[tuple[Any, ...]], *, is_dead: bool) -> None:
        self.name, self.asked, self.is_dead = name, asked, is_dead
        self.generate = self

    def options(self, num_returns: int) -> Engine:
        return self

    def remote(self, texts: Any, groups: Any, rows: Any, sampling: Sampling) -> tuple[Any, Any]:
        self.asked.append((self.name, texts, groups, rows, sampling.seed))
        return f"part of {self.name}", ActorDiedError() if self.is_dead else np.ones((len(rows), 2))


class FakeCrew:
    """Two engines, of which the second dies."""

    def __init__(self, victim: str = "rollout worker 1") -> None:
        self.asked: list[tuple[Any, ...]] = []
        self.engines = {"actor": ["trainer"]}
        self.ranks = [Engine("first", self.asked, is_dead=False), Engine("second", self.asked, is_dead=True)]
        self.victim = victim

    @property
    def rollouts(self) -> list[Engine]:
        return self.ranks

    def rollout_engines(self) -> list[list[Engine]]:
        return [[rank] for rank in self.ranks]

    def ask(self) -> None:
        """No worker of this crew has anything to tell."""

    def lost(self, error: Exception) -> dict[str, str]:
        return {self.victim: "died"}

    def engines_of(self, names: dict[str, str]) -> list[int]:
        return [1] if "rollout worker 1" in names else []

    def renew(self, engines: list[int]) -> list[Engine]:
        self.ranks[1] = Engine("new", self.asked, is_dead=False)
        return self.ranks[1:]


@pytest.fixture
def handed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Replace what needs Ray; return to whom weights were handed, and their version."""

    def values(refs: Any, on_each: Any = None) -> list[Any]:
        for ref in refs:
            if isinstance(ref, Exception):
                raise ref
        return list(refs)

    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr(fleet_module, "collect", values)
    monkeypatch.setattr(fleet_module.ray, "get", lambda ref: ref)
    monkeypatch.setattr(fleet_module, "hand_over", lambda *call: calls.append(call))
    return calls


def make(crew: FakeCrew, root: Path, most: int) -> tuple[Fleet, Status]:
    status = Status(RunFiles(root), 1)
    spec = cast(WorkerSpec, type("Spec", (), {"device": "cpu", "plan": type("P", (), {"rollout_dtype": "float32"})}))
    fleet = Fleet(cast(Crew, crew), spec, status, Restarts(most, status))
    fleet.version, fleet.is_stale = 7, False
    return fleet, status


def test_only_the_dead_engines_share_is_sampled_again_with_the_same_rows_and_seed(
    tmp_path: Path, handed: list[tuple[Any, ...]]
) -> None:
    crew = FakeCrew()
    fleet, _ = make(crew, tmp_path, most=1)
    batch = fleet.sample(PROMPTS, 2, Sampling(4, seed=5), first_row=8)
    first, second, again = crew.asked
    assert again == ("new", *second[1:]) and first[0] == "first" and again[3] == [12, 13, 14, 15]
    assert [part.ref for part in batch.parts] == ["part of first", "part of new"]
    assert handed == [(["trainer"], crew.ranks[1:], "float32", 7, crew.ask, None)]


@pytest.mark.parametrize(("victim", "most"), [("rollout worker 1", 0), ("actor worker 0", 1)])
def test_without_a_restart_left_or_for_another_worker_the_error_goes_up(
    tmp_path: Path, handed: list[tuple[Any, ...]], victim: str, most: int
) -> None:
    fleet, status = make(FakeCrew(victim), tmp_path, most)
    with pytest.raises(ActorDiedError):
        fleet.sample(PROMPTS, 2, Sampling(4))
    assert handed == [] and status.exit_code is None
