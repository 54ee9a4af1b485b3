"""The course of a run: warm start, steps, validation, checkpoints, export. One stage is one loop over one flow."""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from types import FrameType
from typing import Any, Literal

import ray
from rlctl_hw.types import Plan

from rlctl_train.checkpoint.manifest import Best, read_manifest
from rlctl_train.checkpoint.probe import PROBE, read_probe
from rlctl_train.checkpoint.store import CheckpointStore
from rlctl_train.checkpoint.uploads import Uploads
from rlctl_train.config import RunConfig
from rlctl_train.config.algo import SftConfig
from rlctl_train.config.errors import PREFLIGHT, UserError
from rlctl_train.config.layout import RunFiles, write_json
from rlctl_train.config.trainer import CheckpointConfig, TrainerConfig, ValidationConfig, WarmStartConfig
from rlctl_train.controller import Controller
from rlctl_train.crew import Crew
from rlctl_train.data.loader import PromptLoader, PromptRow
from rlctl_train.fleet import Fleet
from rlctl_train.placement import lay_out
from rlctl_train.prepare import Materials
from rlctl_train.profiling import ray_timeline
from rlctl_train.profiling.ranges import mark
from rlctl_train.profiling.recorder import recorded
from rlctl_train.profiling.steps import PARTS, step_folder
from rlctl_train.profiling.tools import Profiling
from rlctl_train.recovery import Restarts, losses_told
from rlctl_train.registry import FLOWS, load
from rlctl_train.saving import Saver
from rlctl_train.status import SETUP, Status
from rlctl_train.store_watch import StoreWatch
from rlctl_train.telemetry.metrics import MetricsWriter, Phase
from rlctl_train.watchdog import Watchdog
from rlctl_train.workers import WorkerSpec

STATE = "state.json"


class Stopped(Exception):
    """The run was told to stop and has saved."""


class StopFlag:
    """Set by the first SIGTERM or Ctrl-C, read between steps; the second leaves at once."""

    requested = False

    def listen(self) -> None:
        """Take both signals over. Ray does so too when it starts: call this again afterwards."""
        signal.signal(signal.SIGTERM, self._handle)
        signal.signal(signal.SIGINT, self._handle)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        print(f"{signal.Signals(number).name}: saving after this step; once more leaves at once", file=sys.stderr)


@dataclass
class Totals:
    """What the summary adds up over all steps, also across resumes."""

    tokens: float = 0.0
    seconds: float = 0.0
    val_accuracy_start: float | None = None


@dataclass(frozen=True)
class Context:
    """What every stage of a run works with."""

    files: RunFiles
    config: RunConfig
    plan: Plan
    materials: Materials
    status: Status
    stop: StopFlag
    watchdog: Watchdog
    stores: StoreWatch
    writer: MetricsWriter
    restarts: Restarts
    uploads: Uploads | None = None
    """Where checkpoints go besides; None keeps them here alone."""


class Stage:
    """One training loop: a flow over its workers, with validation and checkpoints in their rhythm."""

    def __init__(self, context: Context, *, phase: Phase = "train", metric_offset: int = 0) -> None:
        self._files, self._config, self._materials = context.files, context.config, context.materials
        self._status, self._stop, self._writer = context.status, context.stop, context.writer
        self._stores = context.stores
        self._watchdog = context.watchdog
        self._phase: Phase = phase
        self._offset = metric_offset
        config, plan = context.config, context.plan
        materials = self._materials
        spec = WorkerSpec(
            config, plan, materials.model_path, materials.tokenizer_path, num_updates(config), materials.teacher,
            logs=self._files.logs,
        )  # fmt: skip
        self._num_devices = max(plan.trainer_devices, plan.rollout_devices)
        self._flow = load(FLOWS, config.algo.type)
        self._uploads = context.uploads
        in_use = self._uploads.in_use if self._uploads else frozenset()
        self._store = CheckpointStore(
            self._files.checkpoints, config.checkpoint.keep_last, best_of(config.checkpoint), in_use
        )
        self._saver = Saver(self._store, self._uploads)
        self._num_bytes = 0
        """Of one checkpoint, by the parameters."""
        self._loader = PromptLoader(
            self._materials.train_path, self._materials.tokenizer, config.data, config.seed, needs=_needs(config)
        )
        self._profiling = Profiling(config.profile, plan.device, self._files.profile) if config.profile else None
        roster = self._files.logs / "workers.json"
        self._crew = Crew(spec, lay_out(plan, config), materials.tokenizer, roster, self._profiling)
        self._restarts = context.restarts
        self._fleet = Fleet(self._crew, spec, self._status, self._restarts)
        self._run = Controller(self._crew, self._fleet, spec, self._materials, self._status, self._loader.next_batch)
        self._val_rows = self._read_val_rows()
        self._saved_step = 0
        self._validated: dict[str, float] = {}
        """What the last validation measured."""
        self.totals = Totals()

    def train(self) -> Totals:
        """Run every remaining step; leave by `Stopped` after saving when told to stop."""
        with self._watched(), self._saver:
            return self._train()

    def _train(self) -> Totals:
        run, trainer = self._run, self._config.trainer
        self._status.update(phase=SETUP)
        self._crew.start()
        self._resume()
        self._look_for_room()
        self._status.update(state="running", step=run.step, num_steps=trainer.num_steps)
        run.sync()
        if run.step == 0:
            self.totals.val_accuracy_start = self._validate()
        check_best(self._config.checkpoint, self._validated)
        run.take_metrics()
        while run.step < trainer.num_steps:
            if self._stop.requested:
                self._save()
                self._finish_saving()
                raise Stopped
            run.step += 1
            self._status.update(step=run.step)
            self._one_step()
            self._keep_timeline()
            self._saver.check()
            last = run.step == trainer.num_steps
            if last or (_due(run.step, self._config.validation.every_steps) and not self._stop.requested):
                self._validate()
            if last or _due(run.step, self._config.checkpoint.every_steps):
                self._save()
        self._finish_saving()
        return self.totals

    def export(self, folder: Path) -> None:
        """Write the trained policy as a Hugging Face folder."""
        if not folder.exists():
            with self._watched():
                latest, probe = self._store.latest(), self._run.probe()
                if not probe["sequences"] and latest is not None:  # all was trained before a resume
                    probe = read_probe(latest) or probe
                self._run.export(folder, probe)

    def measure(self, folder: Path) -> float | None:
        """Return the accuracy on held-out prompts of greedy decoding with the weights of an exported folder, by the
        rollout engines; None without such prompts or rewards."""
        if not self._val_rows or self._config.reward is None:
            return None
        self._status.update(phase="evaluate")
        with self._watched():
            self._fleet.take_folder(folder)
            records = self._generated(temperature=0.0)
        return fmean(record["accuracy"] for record in records)

    def end(self) -> None:
        """End the workers."""
        self._crew.stop()

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """Raise `WorkersLost` when workers die or stand still."""
        with losses_told(self._crew, self._status), self._watchdog.over(self._crew):
            yield

    def _one_step(self) -> None:
        with self._recorded(), mark("step"):
            start = time.perf_counter()
            with mark("data"):
                rows = self._loader.next_batch(self._config.trainer.prompts_per_step)
            self._flow(self._run, rows)
            with mark("memory"):
                metrics = self._run.take_metrics() | self._fleet.memory()
            seconds = time.perf_counter() - start
        if self._is_recorded:
            write_json(step_folder(self._files.profile, self._run.step) / PARTS, self._crew.memory_parts())
        tokens = metrics["perf/total_num_tokens"]
        self.totals.tokens += tokens
        self.totals.seconds += seconds
        metrics |= {
            "timing_s/step": seconds,
            "perf/time_per_step": seconds,
            "perf/throughput": tokens / seconds / self._num_devices,
            "health/restarts": float(self._restarts.spent),
            **self._saver.take_metrics(),
        }
        if (store_gib := self._stores.take()) is not None:
            metrics["perf/object_store_gib"] = store_gib
        if self._uploads is not None:
            metrics["health/remote_save_failures"] = float(self._uploads.failures)
        self._writer.log(self._run.step + self._offset, self._phase, metrics)

    def _recorded(self) -> AbstractContextManager[None]:
        """Record the step, where the run's profile says so."""
        if self._profiling is None or not self._is_recorded:
            return nullcontext()
        config, folder = self._profiling.config, step_folder(self._files.profile, self._run.step)
        return recorded(config, folder, lambda: self._crew.start_recording(config, folder), self._crew.stop_recording)

    @property
    def _is_recorded(self) -> bool:
        config = None if self._profiling is None else self._profiling.config
        return config is not None and config.first_step <= self._run.step <= config.last_step

    def _keep_timeline(self) -> None:
        """Write Ray's timeline of the recorded steps once they are over."""
        if self._profiling is not None and self._run.step == self._profiling.config.last_step:
            ray_timeline.keep(self._files.profile, self._crew.processes())

    def _validate(self) -> float | None:
        """Measure on held-out prompts, write metrics and samples, return the accuracy (None without such prompts)."""
        if not self._val_rows:
            return None
        self._status.update(phase="validate")
        start = time.perf_counter()
        if self._config.reward is None:
            metrics, accuracy = {"val/loss": self._run.loss(self._run.read(self._val_rows))}, None
        else:
            metrics, accuracy = self._validate_by_generating()
        self._run.take_metrics()
        self._validated = metrics
        self._writer.log(
            self._run.step + self._offset,
            "validation",
            metrics | {"timing_s/testing": time.perf_counter() - start},
        )
        return accuracy

    def _validate_by_generating(self) -> tuple[dict[str, float], float]:
        records = self._generated(self._config.validation.temperature)
        correct: dict[str, list[float]] = {}
        for record in records:
            correct.setdefault(record["data_source"], []).append(record["accuracy"])
        metrics = {f"val-core/{source}/acc/mean@1": sum(c) / len(c) for source, c in correct.items()}
        everything = [c for group in correct.values() for c in group]
        accuracy = sum(everything) / len(everything)
        metrics["val/accuracy"] = accuracy
        metrics["val/score"] = sum(record["score"] for record in records) / len(records)
        self._keep_samples(records)
        return metrics, accuracy

    def _generated(self, temperature: float) -> tuple[dict[str, Any], ...]:
        """Return the held-out rows with a response and its grade each."""
        batch = self._run.score(self._run.sample_greedy(self._val_rows, temperature))
        return ray.get(batch.parts[-1].ref).records

    def _keep_samples(self, records: tuple[dict[str, Any], ...]) -> None:
        self._files.samples.mkdir(exist_ok=True)
        kept = records[: self._config.validation.num_samples_kept]
        lines = [
            json.dumps(
                {
                    "prompt": record["prompt"],
                    "response": record["response_text"],
                    "ground_truth": record["ground_truth"],
                    "score": record["score"],
                    "reason": record["reason"],
                }
            )
            for record in kept
        ]
        (self._files.samples / f"step_{self._run.step:06d}.jsonl").write_text("".join(line + "\n" for line in lines))

    def _save(self) -> None:
        step = self._run.step
        if step == self._saved_step:
            return
        start = time.perf_counter()
        self._saver.wait()
        metrics = self._saver.take_metrics()  # of the save before
        folder = self._store.begin(step, self._num_bytes)
        probe = self._run.probe()
        state = self._run.save(folder)
        state |= {"step": step, "loader": self._loader.state(), "totals": vars(self.totals)}
        texts = {STATE: json.dumps(state, indent=2), PROBE: json.dumps(probe)}
        self._saver.complete(step, folder, self._run.writers(), texts, {"metrics": self._validated})
        if not self._config.checkpoint.asynchronous:
            self._saver.wait()
            self._saver.take_metrics()  # nothing was written beside training
        self._saved_step = step
        metrics |= {"timing_s/save_checkpoint": time.perf_counter() - start}
        self._writer.log(step + self._offset, "checkpoint", self._run.take_metrics() | metrics)

    def _finish_saving(self) -> None:
        """Wait for the save under way."""
        self._saver.wait()
        metrics = self._saver.take_metrics()
        if metrics:
            self._writer.log(self._run.step + self._offset, "checkpoint", metrics)

    def _look_for_room(self) -> None:
        """Refuse a disk that has no room for one checkpoint, and say where it has not for all that are kept."""
        self._num_bytes = self._run.state_bytes()
        warning = self._store.room(self._num_bytes)
        if warning is not None:
            self._status.update(notice=warning)
            print(f"warning: {warning}", file=sys.stderr)

    def _resume(self) -> None:
        """Continue from the newest complete checkpoint, if there is one."""
        folder = self._store.latest()
        if folder is None:
            return
        state = json.loads((folder / STATE).read_text())
        self._run.load(folder, state)
        self._run.step = self._saved_step = state["step"]
        self._loader.load_state(state["loader"])
        self.totals = Totals(**state["totals"])
        self._validated = (read_manifest(folder) or {}).get("metrics", {})

    def _read_val_rows(self) -> list[PromptRow]:
        path = self._materials.val_path
        if path is None:
            return []
        in_order = self._config.data.model_copy(update={"shuffle": False})
        needs = "response" if self._config.reward is None else None
        loader = PromptLoader(path, self._materials.tokenizer, in_order, self._config.seed, needs=needs)
        return loader.next_batch(min(self._config.validation.max_prompts, len(loader)))


def best_of(config: CheckpointConfig) -> Best | None:
    """Return which checkpoints are kept for what they reached, if any are."""
    return Best(config.keep_best, config.best_metric, config.best_mode) if config.keep_best else None


def check_best(config: CheckpointConfig, validated: Mapping[str, float]) -> None:
    """Refuse to keep the best by what no validation measures, which is known before the first step."""
    if config.keep_best and config.best_metric not in validated:
        raise UserError(
            f"checkpoint.best_metric={config.best_metric!r} is not measured by this run's validation",
            f"name one of these: {', '.join(sorted(validated)) or 'none'}; or set checkpoint.keep_best=0",
            exit_code=PREFLIGHT,
        )


def num_updates(config: RunConfig) -> int:
    """Return the optimizer steps of the whole loop, over which schedules run."""
    trainer = config.trainer
    return trainer.num_steps * trainer.mini_batches_per_step * trainer.epochs_per_step


def warm_start_config(config: RunConfig, warm: WarmStartConfig) -> RunConfig:
    """Return the run's config as its warm-start stage sees it: supervised, of every weight, without validation."""
    trainer = TrainerConfig(
        num_steps=warm.num_steps,
        prompts_per_step=warm.rows_per_step,
        mini_batches_per_step=warm.mini_batches_per_step,
        optim=warm.optim,
        num_devices=config.trainer.num_devices,
        threads_per_worker=config.trainer.threads_per_worker,
    )
    return config.model_copy(
        update={
            "model": config.model.model_copy(update={"lora": None}),
            "algo": SftConfig(),
            "reward": None,
            "trainer": trainer,
            "warm_start": None,
            "profile": None,
            "validation": ValidationConfig(every_steps=0),
            "checkpoint": config.checkpoint.model_copy(update={"keep_best": 0, "remote": None}),
        }
    )


def _needs(config: RunConfig) -> Literal["ground_truth", "response"] | None:
    """Return what every row must have: a response to learn from, or an answer to compare with."""
    if isinstance(config.algo, SftConfig):
        return "response"
    return None if config.reward is not None and config.reward.type == "custom" else "ground_truth"


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
