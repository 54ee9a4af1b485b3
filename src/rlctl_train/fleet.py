"""The fleet: all rollout engines as one, which samples, takes weights, and survives the death of any of them.

An engine that dies is made anew in its place, gets the weights that the others have, and samples its share again, with
the same seeds and row numbers: the step's data are those that it would have had.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import ray
from ray.exceptions import RayError

from rlctl_train.batch_ref import BatchRef, Part
from rlctl_train.cluster import collect
from rlctl_train.crew import Crew
from rlctl_train.data.loader import PromptRow
from rlctl_train.recovery import Restarts, tell
from rlctl_train.rollout.base import Sampling
from rlctl_train.status import Status
from rlctl_train.sync.relay import hand_over
from rlctl_train.workers import WorkerSpec

T = TypeVar("T")


class Fleet:
    """The rollout engines of one run."""

    def __init__(self, crew: Crew, spec: WorkerSpec, status: Status, restarts: Restarts) -> None:
        self._crew, self._spec, self._status, self._restarts = crew, spec, status, restarts
        self.version = -1
        """Of the weights that sample."""
        self.is_stale = True
        """Whether the policy has moved since its weights were handed over."""

    def sample(self, prompts: Sequence[PromptRow], group_size: int, sampling: Sampling, first_row: int = 0) -> BatchRef:
        """Sample `group_size` responses for each prompt, in rows numbered from `first_row` on."""
        rows = [row for row in prompts for _ in range(group_size)]
        asked: dict[int, tuple[Part, list[ray.ObjectRef]]] = {}

        def ask(engine: int, share: range) -> tuple[Part, list[ray.ObjectRef]]:
            leader, *others = self._crew.rollout_engines()[engine]
            texts, numbers = [rows[i].prompt_ids for i in share], [first_row + i for i in share]
            groups = [number // group_size for number in numbers]
            ref, sizes = leader.generate.options(num_returns=2).remote(texts, groups, numbers, sampling)
            followed = [other.follow.remote(texts, numbers, sampling) for other in others]
            return Part(tuple(share), ref), [sizes, *followed]

        def answers() -> list[np.ndarray]:
            for engine, share in enumerate(shares):
                if share and engine not in asked:
                    asked[engine] = ask(engine, share)
            waited = [ref for _, refs in asked.values() for ref in refs]
            collect(waited, on_each=self._status.progress)
            return [ray.get(asked[engine][1][0]) for engine in sorted(asked)]

        shares = _contiguous_shares(len(prompts), len(self._crew.rollout_engines()), group_size)
        self._surviving(lambda: self._each("wake", self._crew.rollouts))
        sizes = np.concatenate(self._surviving(answers, forget=lambda engine: asked.pop(engine, None)))
        self._surviving(lambda: self._each("sleep", self._crew.rollouts))
        parts = tuple(asked[engine][0] for engine in sorted(asked))
        return BatchRef(parts, sizes, tuple(row.record for row in rows), group_size)

    def take_weights(self) -> None:
        """Take the policy's weights, as the next version, and compare checksums."""
        self.is_stale = True
        self._surviving(lambda: self._hand_over(self._crew.rollouts, self.version + 1))
        self.version += 1
        self.is_stale = False

    def take_folder(self, folder: Path) -> None:
        """Take the weights that the trainer has exported to a folder, as the next version, and compare checksums."""
        self._surviving(lambda: self._hand_over(self._crew.rollouts, self.version + 1, folder))
        self.version += 1
        self.is_stale = False

    def memory(self) -> dict[str, float]:
        """Return what `Crew.memory` does; engines that died since they were last needed are made anew."""
        return self._surviving(self._crew.memory)

    def _hand_over(self, receivers: list[Any], version: int, folder: Path | None = None) -> None:
        self._each("wake", receivers)
        dtype = self._spec.plan.rollout_dtype
        hand_over(self._crew.engines["actor"], receivers, dtype, version, self._crew.ask, folder)

    def _surviving(self, work: Callable[[], T], forget: Callable[[int], object] = lambda engine: None) -> T:
        """Return what `work` does; where engines die of it, make them anew, forget their part, and work again."""
        while True:
            try:
                return work()
            except RayError as error:
                for engine in self._renewed(error):
                    forget(engine)

    def _renewed(self, error: RayError) -> list[int]:
        """Make the engines anew whose death was the error, and return their numbers; raise any other error."""
        lost = self._crew.lost(error)
        engines = self._crew.engines_of(lost)
        if not engines or not self._restarts.left:
            raise error
        self._restarts.spend(tell(lost, self._status), "made anew, the step goes on")
        ranks = self._crew.renew(engines)
        if not self.is_stale:
            self._hand_over(ranks, self.version)
        return engines

    def _each(self, verb: str, actors: list[Any]) -> None:
        """Have engines that share their devices with the trainer `wake` or `sleep`."""
        if self._spec.device != "cpu" and self._spec.config.placement == "colocated":
            collect([getattr(actor, verb).remote() for actor in actors])


def _contiguous_shares(num_prompts: int, num_workers: int, group_size: int) -> list[range]:
    """Split rows into contiguous runs of whole groups, one per worker, as even as they come."""
    edges = [num_prompts * worker // num_workers * group_size for worker in range(num_workers + 1)]
    return [range(a, b) for a, b in pairwise(edges)]
