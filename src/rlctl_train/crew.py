"""The crew: makes the actors of a run, knows them by name, and ends them."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, remove_placement_group

from rlctl_train.cluster import collect
from rlctl_train.memory_watch import by_phase, others_gib
from rlctl_train.placement import SCORE_CPUS, Layout, actor_options, reserve, settle
from rlctl_train.scoring import ScoreWorker
from rlctl_train.workers import EngineWorker, RolloutWorker, WorkerSpec


class Crew:
    """Every worker of one run."""

    def __init__(self, spec: WorkerSpec, layout: Layout) -> None:
        self._spec, self._layout = spec, layout
        self.engines: dict[str, list[Any]] = {}
        """The ranks of every model role."""
        self.rollouts: list[Any] = []
        """The ranks of all rollout engines, engine by engine."""
        self.scorer: Any = None
        self._group: PlacementGroup | None = None
        self.names: dict[str, str] = {}
        """Actor id -> what a person calls it, for messages about dead workers."""

    def start(self) -> None:
        """Make every actor, form the trainer's process groups, and load the models."""
        config = self._spec.config
        group = self._group = reserve(self._layout, timeout_s=config.ray.start_timeout_s)
        self._layout = settle(self._layout, group)
        spec = ray.put(self._spec)
        for role, slots in self._layout.slots.items():
            kind: Any = RolloutWorker if role == "rollout" else EngineWorker
            for rank, slot in enumerate(slots):
                size = self._layout.engine_size
                arguments = (spec, rank % size, size) if role == "rollout" else (spec, role, rank, len(slots))
                actor = ray.remote(kind).options(**actor_options(self._layout, group, slot)).remote(*arguments)
                self._keep(role, rank, actor)
        if config.reward is not None:
            self.scorer = (
                ray.remote(ScoreWorker)
                .options(num_cpus=SCORE_CPUS)
                .remote(config, self._spec.tokenizer_path, trust_remote_code=self._spec.trust_remote_code)
            )
            self.names[self.scorer._actor_id.hex()] = "score worker"
        generating = [start for ranks in self.rollout_engines() for start in _start_together(ranks)]
        for actors in self.engines.values():
            collect(_start_together(actors))
        collect([*generating, *(actor.pid.remote() for actor in self._everyone())])

    def rollout_engines(self) -> list[list[Any]]:
        """Return the ranks of each rollout engine."""
        size = self._layout.engine_size
        return [self.rollouts[first : first + size] for first in range(0, len(self.rollouts), size)]

    def pids(self) -> dict[str, int]:
        """Return the process id of every worker, by name."""
        everyone = self._everyone()
        pids = collect([actor.pid.remote() for actor in everyone])
        return {self.names[actor._actor_id.hex()]: pid for actor, pid in zip(everyone, pids, strict=True)}

    def memory(self) -> dict[str, float]:
        """Return how full the fullest device (on CPU: the host) was in each phase since the last call, in GiB."""
        workers = [actor for actors in self.engines.values() for actor in actors] + self.rollouts
        usages = collect([actor.memory.remote() for actor in workers])
        metrics = {f"memory_gib/{name}": gib + self._beside_gib for name, gib in by_phase(usages).items()}
        allocated = [usage.allocated_gib for usage in usages if usage.allocated_gib is not None]
        return metrics | ({"perf/max_memory_allocated_gb": max(allocated)} if allocated else {})

    def stop(self) -> None:
        """End every worker and give its devices back."""
        for actor in self._everyone():
            ray.kill(actor)
        if self._group is not None:
            remove_placement_group(self._group)

    @cached_property
    def _beside_gib(self) -> float:
        """What driver, Ray and graders take of the memory that workers on CPU share with them."""
        return others_gib(self.pids().values()) if self._spec.device == "cpu" else 0.0

    def _keep(self, role: str, rank: int, actor: Any) -> None:
        (self.rollouts if role == "rollout" else self.engines.setdefault(role, [])).append(actor)
        self.names[actor._actor_id.hex()] = f"{role} worker {rank}"

    def _everyone(self) -> list[Any]:
        scorer = [] if self.scorer is None else [self.scorer]
        return [actor for actors in self.engines.values() for actor in actors] + self.rollouts + scorer


def _start_together(ranks: list[Any]) -> list[ray.ObjectRef]:
    """Let the ranks of one engine meet, where there are several, and build it."""
    address = ray.get(ranks[0].open_store.remote()) if len(ranks) > 1 else None
    return [rank.start.remote(address) for rank in ranks]
