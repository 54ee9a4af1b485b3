"""The crew: makes the actors of a run, knows them by name, tells which have died, and ends them."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable
from pathlib import Path
from statistics import fmean
from typing import Any

import ray
from ray.exceptions import (
    ActorUnavailableError,
    GetTimeoutError,
    LocalRayletDiedError,
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    RayError,
    RayTaskError,
)
from ray.util.placement_group import PlacementGroup, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rlctl_train.cluster import collect
from rlctl_train.config.errors import FAILED, UserError
from rlctl_train.config.layout import write_json
from rlctl_train.config.profile import ProfileConfig
from rlctl_train.memory_watch import Usage, by_phase, others_gib, parts_by_phase, together
from rlctl_train.placement import SCORE_CPUS, Layout, actor_options, reserve, settle
from rlctl_train.profiling.recorder import Who
from rlctl_train.profiling.tools import Profiling
from rlctl_train.scoring import ScoreWorker
from rlctl_train.stacks import Whereabouts, read_stacks
from rlctl_train.workers import EngineWorker, RolloutWorker, WorkerSpec

ROLLOUT = "rollout worker"
DEATH_IS_KNOWN_S = 30.0
"""Ray notices a dead process at once, and a dead node within this time."""
TOGETHER_S = 1.0
"""Workers that die within this time died together."""
BECAUSE = "The actor is dead because "
"""How Ray begins the reason of a death."""
ANSWER_S = 5.0
"""Longest wait for an answer of workers that have nothing to do."""
STACKS_S = 60.0
"""Longest wait for the stacks of all workers: each node starts a process that reads them."""
WITHOUT_ACTOR = (ObjectLostError, NodeDiedError, LocalRayletDiedError, OutOfMemoryError)
"""Losses that Ray tells of without naming an actor."""


class WorkersLost(UserError):
    """Workers died or stood still. What was wanted of them can be done again."""

    def __init__(self, what: str) -> None:
        super().__init__(
            what,
            "look into logs/ of the run folder, then continue from the last checkpoint with `rlctl runs resume`",
            exit_code=FAILED,
        )


class Crew:
    """Every worker of one run."""

    def __init__(
        self, spec: WorkerSpec, layout: Layout, tokenizer: Any, roster: Path, profiling: Profiling | None = None
    ) -> None:
        """`roster` is the file that lists every worker and its process id."""
        self._spec, self._layout, self._tokenizer, self._roster = spec, layout, tokenizer, roster
        self._profiling = profiling
        self.engines: dict[str, list[Any]] = {}
        """The ranks of every model role."""
        self.rollouts: list[Any] = []
        """The ranks of all rollout engines, engine by engine."""
        self.scorer: Any = None
        self._group: PlacementGroup | None = None
        self._members: dict[str, Any] = {}
        """What a person calls a worker -> its actor."""
        self._where: dict[str, ray.ObjectRef] = {}
        self._ended: dict[str, str] = {}
        """Why workers were ended from here, by name."""
        self._beside_gib: float | None = None
        self._asked_at = time.perf_counter()
        """When the workers were last asked what their phases took."""
        self._asked: list[list[ray.ObjectRef]] = []
        """What they were asked since."""
        self._usages: list[Usage] = []
        """What they answered."""
        self.has_worked = True
        """Whether the workers were given work since they were last asked."""

    # Making

    def start(self) -> None:
        """Make every actor, form the trainer's process groups, and load the models."""
        config = self._spec.config
        self._group = reserve(self._layout, timeout_s=config.ray.start_timeout_s)
        self._layout = settle(self._layout, self._group)
        self._told = ray.put(self._spec)
        for role, slots in self._layout.slots.items():
            actors = [self._make(role, rank) for rank in range(len(slots))]
            if role == "rollout":
                self.rollouts = actors
            else:
                self.engines[role] = actors
        if config.reward is not None:
            make = ray.remote(ScoreWorker).options(num_cpus=SCORE_CPUS, **self._around("score", 0)).remote
            tokenizer = self._spec.tokenizer_path if self._spec.trust_remote_code else self._tokenizer
            self.scorer = self._keep("score worker", make(config, tokenizer))
        generating = [start for ranks in self.rollout_engines() for start in _start_together(ranks)]
        for actors in self.engines.values():
            collect(_start_together(actors))
        collect([*generating, *self._where.values()])
        self._write_roster()

    def rollout_engines(self) -> list[list[Any]]:
        """Return the ranks of each rollout engine."""
        size = self._layout.engine_size
        return [self.rollouts[first : first + size] for first in range(0, len(self.rollouts), size)]

    def renew(self, engines: Collection[int]) -> list[Any]:
        """Make rollout engines anew, by number, each in its place; return their ranks, with the first weights."""
        size, limit_s = self._layout.engine_size, self._spec.config.ray.start_timeout_s
        ranks = [rank for engine in engines for rank in range(engine * size, (engine + 1) * size)]
        for rank in ranks:
            ray.kill(self.rollouts[rank])
            self.rollouts[rank] = self._make("rollout", rank)
        self._asked, self.has_worked = [], True  # the dead will not answer
        where = [self._where[f"{ROLLOUT} {rank}"] for rank in ranks]
        if ray.wait(where, num_returns=len(where), timeout=limit_s)[1]:
            raise WorkersLost(f"{ROLLOUT} {ranks[0]} found no place within ray.start_timeout_s={limit_s:g} s")
        collect([start for engine in engines for start in _start_together(self.rollout_engines()[engine])])
        self._write_roster()
        return [self.rollouts[rank] for rank in ranks]

    def stop(self) -> None:
        """End every worker and give its devices back; profilers around workers are let write first."""
        if self._profiling is not None and self._profiling.wrapped:
            for actor in self._members.values():
                actor.__ray_terminate__.remote()  # by itself, where a kill would leave nothing to write
            self._profiling.await_reports()
        for actor in self._members.values():
            ray.kill(actor)
        if self._group is not None:
            remove_placement_group(self._group)

    # Looking after

    def ask(self) -> None:
        """Ask every worker what its phases took, once it has done what it was given. `memory` reads the answers.

        Asked before the last wait of a step, they are there when it is over.
        """
        self._asked.append([actor.memory.remote() for actors in self._everyone.values() for actor in actors])
        self.has_worked = False

    def memory(self) -> dict[str, float]:
        """Return what the workers' phases took since the last call: memory of the fullest device (on CPU: the host) in
        GiB, and the share of the time that each role was at work, mean over its ranks."""
        if self.has_worked:
            self.ask()
        asked, self._asked = self._asked, []
        # One call: all have ended their work, so none waits for a dead one.
        told: list[Usage] = ray.get([ref for refs in asked for ref in refs])
        roles = [role for role, actors in self._everyone.items() for _ in actors]
        usages = self._usages = [together(told[rank :: len(roles)]) for rank in range(len(roles))]
        metrics = {f"memory_gib/{name}": gib + self._beside() for name, gib in by_phase(usages).items()}
        allocated = [usage.allocated_gib for usage in usages if usage.allocated_gib is not None]
        passed_s, self._asked_at = time.perf_counter() - self._asked_at, time.perf_counter()
        for role in dict.fromkeys(roles):
            own = [usage for usage, of in zip(usages, roles, strict=True) if of == role]
            busy_s = fmean(usage.busy_s for usage in own)
            metrics[f"busy/{role}"] = busy_s / passed_s
            computed = [usage.device_s for usage in own if usage.device_s is not None]
            if computed and busy_s:
                metrics[f"device_busy/{role}"] = fmean(computed) / busy_s
        return metrics | ({"perf/max_memory_allocated_gb": max(allocated)} if allocated else {})

    def memory_parts(self) -> dict[str, dict[str, float]]:
        """Return the parts, in GiB, of what `memory` has last told, by phase."""
        return parts_by_phase(self._usages, self._beside())

    def start_recording(self, config: ProfileConfig, folder: Path) -> None:
        """Have every worker record what it does from here on, into files of a folder that all nodes see."""
        asked = [
            actor.start_recording.remote(config, Who(role, rank, self._spec.device, slot.bundle), folder)
            for role, actors in self._everyone.items()
            for rank, (actor, slot) in enumerate(zip(actors, self._layout.slots.get(role, ()), strict=True))
        ]
        if self.scorer is not None:
            asked.append(self.scorer.start_recording.remote(config, Who("score", 0, "cpu"), folder))
        collect(asked)

    def stop_recording(self) -> None:
        """Have every worker write what it recorded."""
        collect([actor.stop_recording.remote() for actor in self._members.values()])

    def processes(self) -> dict[str, str]:
        """Return what a person calls each worker, by Ray's id of its process."""
        return {at.process: name for name, at in self._known().items()}

    def lost(self, error: RayError) -> dict[str, str]:
        """Return which workers are lost, by name, and how, when that is why a call failed; else nothing."""
        cause = error.cause if isinstance(error, RayTaskError) else error
        if isinstance(cause, UserError) or (isinstance(cause, RayActorError) and cause.actor_init_failed):
            return {}
        dead = self._dead()
        if not dead and isinstance(cause, WITHOUT_ACTOR):
            return {"a worker": f"was lost: {str(cause).strip().splitlines()[0]}"}
        return dead

    def engines_of(self, names: Iterable[str]) -> list[int]:
        """Return the numbers of the rollout engines that the named workers are ranks of; none if any is of another."""
        ranks = [name.removeprefix(ROLLOUT) for name in names]
        if not all(rank.strip().isdigit() and f"{ROLLOUT}{rank}" in self._members for rank in ranks):
            return []
        return sorted({int(rank) // self._layout.engine_size for rank in ranks})

    def busy(self) -> list[str]:
        """Return the workers that are at work, or stuck in it: those that do not answer."""
        asked = {actor.ping.remote(): name for name, actor in dict(self._members).items()}
        if not asked:
            return []
        _, silent = ray.wait(list(asked), num_returns=len(asked), timeout=ANSWER_S)
        return [asked[ref] for ref in silent]

    def end(self, names: Iterable[str], why: str) -> None:
        """End workers, so that whoever waits for them learns that they are lost."""
        for name in names:
            self._ended[name] = why
            ray.kill(self._members[name])

    def stacks(self) -> dict[str, str]:
        """Return, by name, the state of every worker and the stacks of its threads, each as its node reads them."""
        asked = {
            name: ray.remote(read_stacks)
            .options(num_cpus=0, max_retries=0, scheduling_strategy=NodeAffinitySchedulingStrategy(at.node, soft=False))
            .remote(at.pid, at.descriptor)
            for name, at in self._known().items()
        }
        ray.wait(list(asked.values()), num_returns=max(1, len(asked)), timeout=STACKS_S)
        return {name: _text(ref) for name, ref in asked.items()}

    # Helpers

    @property
    def _everyone(self) -> dict[str, list[Any]]:
        """The ranks of every role that holds a model."""
        return {**self.engines, "rollout": self.rollouts}

    def _make(self, role: str, rank: int) -> Any:
        slots, size = self._layout.slots[role], self._layout.engine_size
        assert self._group is not None
        kind: Any = RolloutWorker if role == "rollout" else EngineWorker
        arguments = (self._told, rank % size, size) if role == "rollout" else (self._told, role, rank, len(slots))
        options = actor_options(self._layout, self._group, slots[rank]) | self._around(role, rank)
        return self._keep(f"{role} worker {rank}", ray.remote(kind).options(**options).remote(*arguments))

    def _around(self, role: str, rank: int) -> dict[str, Any]:
        """Return the Ray option that starts a worker under the profiler that is to record it."""
        command = None if self._profiling is None else self._profiling.around(role, rank)
        return {} if command is None else {"runtime_env": {"py_executable": command}}

    def _keep(self, name: str, actor: Any) -> Any:
        self._ended.pop(name, None)
        self._members[name] = actor
        self._where[name] = actor.whereabouts.remote()
        return actor

    def _write_roster(self) -> None:
        write_json(self._roster, {name: at.pid for name, at in self._known().items()})

    def _known(self) -> dict[str, Whereabouts]:
        """Return where the workers are that have said so."""
        where = dict(self._where)  # the watchdog asks while workers are made
        ready, _ = ray.wait(list(where.values()), num_returns=max(1, len(where)), timeout=ANSWER_S)
        found: dict[str, Whereabouts] = {}
        for name, ref in where.items():
            if ref in ready:
                try:
                    found[name] = ray.get(ref)
                except RayError:  # it died before it could
                    continue
        return found

    def _dead(self) -> dict[str, str]:
        """Return how workers have died, by name; wait for the first death while some do not answer."""
        waiting = {actor.ping.remote(): name for name, actor in self._members.items()}
        dead: dict[str, str] = {}
        deadline = time.monotonic() + DEATH_IS_KNOWN_S
        while waiting and (left_s := deadline - time.monotonic()) > 0:
            ready, _ = ray.wait(list(waiting), num_returns=1, timeout=left_s)
            for ref in ready:
                name = waiting.pop(ref)
                if (why := _death(ref)) is not None:
                    deadline = min(deadline, time.monotonic() + TOGETHER_S)
                    dead[name] = self._ended.get(name, why)
        return dead

    def _beside(self) -> float:
        """Return what driver, Ray and graders take of the memory that workers on CPU share with them, in GiB."""
        if self._beside_gib is None:
            pids = [at.pid for at in self._known().values()]
            self._beside_gib = others_gib(pids) if self._spec.device == "cpu" else 0.0
        return self._beside_gib


def _start_together(ranks: list[Any]) -> list[ray.ObjectRef]:
    """Let the ranks of one engine meet, where there are several, and build it."""
    address = ray.get(ranks[0].open_store.remote()) if len(ranks) > 1 else None
    return [rank.start.remote(address) for rank in ranks]


def _death(ping: ray.ObjectRef) -> str | None:
    """Return how the worker died that was asked; None for one that answered."""
    try:
        ray.get(ping)
    except ActorUnavailableError:
        return "is out of reach"
    except RayActorError as error:
        reasons = [line for line in str(error).splitlines() if line.startswith(BECAUSE)]
        return f"died ({reasons[0].removeprefix(BECAUSE).split('.')[0]})" if reasons else "died"
    return None


def _text(stacks: ray.ObjectRef) -> str:
    try:
        return str(ray.get(stacks, timeout=0))
    except (GetTimeoutError, RayError) as error:
        return f"no stacks: its node does not answer ({type(error).__name__})"
