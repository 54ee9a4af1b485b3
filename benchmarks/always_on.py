"""What the measurements that every run makes cost in a step of the quickstart; write `always_on.md`.

    python benchmarks/always_on.py

A run of the quickstart is profiled by its ranges alone. What asking all workers for peaks, busy time and parts adds to
a step is timed at its last phase: the quickstart's workers hand over weights many times, and every second time they are
asked too. What each phase of a worker costs beside its work is timed on a trainer with the quickstart's model, and
multiplied by the phases of a step.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from datetime import date
from pathlib import Path
from statistics import median

import ray

from rlctl_train.cluster import connect
from rlctl_train.config import RunConfig
from rlctl_train.config.layout import RunFiles
from rlctl_train.crew import Crew
from rlctl_train.driver import plan_of
from rlctl_train.fleet import Fleet
from rlctl_train.placement import lay_out
from rlctl_train.prepare import prepare
from rlctl_train.profiling.steps import Worker, read_steps
from rlctl_train.recovery import Restarts
from rlctl_train.status import Status
from rlctl_train.workers import EngineWorker, WorkerSpec

PAGE = Path(__file__).with_name("always_on.md")
RLCTL = str(Path(sys.executable).with_name("rlctl"))
FIRST, LAST = 6, 25
CALLS = 500
HAND_OVERS = 400


class QuietCrew(Crew):
    """A crew that can be told not to ask."""

    asks = True

    def ask(self) -> None:
        """Ask, or do nothing."""
        if self.asks:
            super().ask()


def main() -> None:
    """Profile, time, and write the page."""
    with tempfile.TemporaryDirectory() as folder:
        words = ("quickstart", "--steps", f"{FIRST}:{LAST}", "--tool", "ranges", "--name", "always-on", "-y")
        settings = {"RLCTL_HOME": f"{folder}/home", "RLCTL_RUNS_DIR": folder, "OMP_NUM_THREADS": "1"}
        subprocess.run([RLCTL, "profile", *words], check=True, env=os.environ | settings, stdout=subprocess.DEVNULL)
        files = RunFiles(Path(folder) / "always-on")
        steps = read_steps(files.profile)
        config = RunConfig.model_validate(json.loads(files.config.read_text()))
        materials = prepare(files, config)
        spec = WorkerSpec(config, plan_of(files), materials.model_path, materials.tokenizer_path, 8)
        phase_s = cost_of_a_phase(spec)
        hand_over_s, asking_s = cost_of_asking(files, spec, materials.tokenizer)
    step_s = median(step.seconds for step in steps)
    num_phases = max(_num_phases(step.workers) for step in steps)
    beside_s = num_phases * phase_s
    whole = asking_s + beside_s
    PAGE.write_text(
        f"""\
# What every run's measurements cost

<!-- Made by `nox -s bench` (benchmarks/always_on.py). -->

Measured {date.today()} on two CPU cores: the quickstart, steps {FIRST} to {LAST}, {step_s * 1e3:.0f} ms at median.

| | a step | share |
|---|---|---|
| asking the workers while weights are handed over | {asking_s * 1e3:.2f} ms | {asking_s / step_s:.2%} |
| peaks, parts and time of {num_phases} phases, each | {phase_s * 1e3:.2f} ms | {phase_s / step_s:.2%} |
| together | {whole * 1e3:.2f} ms | {whole / step_s:.2%} |

A hand-over without being asked takes {hand_over_s * 1e3:.1f} ms.

Neither grows with the length of a step: of one of ten seconds it is {whole / 10:.3%}.
"""
    )
    print(PAGE.read_text())


def cost_of_asking(files: RunFiles, spec: WorkerSpec, tokenizer: object) -> tuple[float, float]:
    """Return the seconds that a hand-over of weights takes, and what asking all workers adds."""
    layout = lay_out(spec.plan, spec.config)
    connect(spec.config.ray, needed=layout.needed, object_store_gib=spec.plan.object_store_gib)
    status = Status(files, 1)
    crew = QuietCrew(spec, layout, tokenizer, files.root / "workers.json")
    fleet = Fleet(crew, spec, status, Restarts(0, status))
    crew.start()
    seconds: dict[bool, list[float]] = {False: [], True: []}
    for number in range(2 * HAND_OVERS):
        crew.asks = number % 2 == 1
        start = time.perf_counter()
        fleet.take_weights()
        if crew.asks:
            fleet.memory()
        seconds[crew.asks].append(time.perf_counter() - start)
    crew.stop()
    ray.shutdown()
    silent, asked = (median(seconds[asks]) for asks in (False, True))
    return silent, asked - silent


def cost_of_a_phase(spec: WorkerSpec) -> float:
    """Return the seconds that a phase takes which does nothing, on a trainer of this run."""
    worker = EngineWorker(spec, "actor", 0, 1)
    worker.start(None)
    rounds = []
    for _ in range(7):
        start = time.perf_counter()
        for _ in range(CALLS):
            with worker._memory.phase("actor_update"):
                pass
        rounds.append((time.perf_counter() - start) / CALLS)
    return median(rounds)


def _num_phases(workers: Iterable[Worker]) -> int:
    """Return the phases of all workers that a step waits for."""
    names = ("logprobs", "values", "actor_update", "critic_update", "optimizer_step", "generation", "weight_sync")
    return sum(one.name in names for worker in workers for one in worker.ranges)


if __name__ == "__main__":
    main()
