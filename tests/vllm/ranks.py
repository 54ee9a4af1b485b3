"""Rollout engines split over processes, for tests: each rank is a process that does what it is told over a pipe."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

from rlctl_train.config.rollout import VllmRollout
from rlctl_train.rollout.base import Peers
from rlctl_train.rollout.vllm import VllmRolloutEngine

Task = Callable[[VllmRolloutEngine], Any]


class SplitEngine:
    """One engine over several processes."""

    def __init__(self, folder: Path, num_ranks: int) -> None:
        self._store = TCPStore("127.0.0.1", 0, num_ranks, is_master=True, wait_for_workers=False)
        context = multiprocessing.get_context("spawn")
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(num_ranks):
            ours, theirs = context.Pipe()
            peers = Peers(rank, num_ranks, self._store.host, self._store.port)
            process = context.Process(target=_serve, args=(theirs, str(folder), peers), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def on_all(self, task: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Call `task(engine, *arguments)` on every rank and return the results by rank."""
        for pipe in self._pipes:
            pipe.send((task, arguments))
        results = [pipe.recv() for pipe in self._pipes]
        for result in results:
            if isinstance(result, Exception):
                raise result
        return results

    def end(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.kill()
            process.join()


def _serve(pipe: Connection, folder: str, peers: Peers) -> None:
    settings: dict[str, Any] = {"dtype": "float32", "device": "cpu", "max_model_len": 64, "max_concurrent": 8}
    engine = VllmRolloutEngine(folder, VllmRollout(kv_cache_gib=0.05), peers=peers, **settings)
    while True:
        task, arguments = pipe.recv()
        try:
            pipe.send(task(engine, *arguments))
        except Exception as error:  # the test that asked raises it
            pipe.send(error)
