"""Trackers: where metrics go besides metrics.jsonl. Each package is imported only when its tracker is asked for.

Credentials come from the environment alone (WANDB_API_KEY, MLFLOW_TRACKING_URI, SWANLAB_API_KEY ...): the
packages read it themselves, and nothing of it is written here.
"""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from rlctl_train.config.errors import PREFLIGHT, UserError
from rlctl_train.config.layout import RunFiles


class Tracker(Protocol):
    """Receives every metric of a run."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Take the metrics of one step; may be called several times with the same step."""
        ...

    def close(self) -> None:
        """Finish sending."""
        ...


@dataclass(frozen=True)
class RunLabel:
    """What a tracker is told about the run. `resume_step` is the last step that stays valid; None: a fresh run."""

    files: RunFiles
    project: str
    name: str
    resume_step: int | None

    @property
    def id(self) -> str:
        """Return a name for this run folder that stays the same when the run is resumed."""
        return hashlib.sha256(str(self.files.root.resolve()).encode()).hexdigest()[:16]

    @property
    def config(self) -> dict[str, Any]:
        """Return the run's configuration, empty when it is not there."""
        return json.loads(self.files.config.read_text()) if self.files.config.is_file() else {}


def open_trackers(
    names: Sequence[str], files: RunFiles, project: str, run_name: str, resume_step: int | None
) -> list[Tracker]:
    """Open the named trackers in order; when one cannot open, those already open are closed again."""
    label = RunLabel(files, project, run_name, resume_step)
    opened: list[Tracker] = []
    try:
        for name in names:
            opened.append(TRACKERS[name](label))
    except UserError:
        for tracker in opened:
            tracker.close()
        raise
    return opened


class TensorboardTracker:
    """Write event files to the run folder's `tensorboard/`."""

    def __init__(self, run: RunLabel) -> None:
        _import("tensorboard")
        writer = importlib.import_module("torch.utils.tensorboard").SummaryWriter
        beyond = None if run.resume_step is None else run.resume_step + 1
        self._writer = writer(str(run.files.tensorboard), purge_step=beyond)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WandbTracker:
    """Send to Weights & Biases; `WANDB_MODE=offline` keeps everything in the run folder."""

    def __init__(self, run: RunLabel) -> None:
        wandb = _import("wandb")
        try:
            self._run = wandb.init(
                project=run.project,
                name=run.name,
                id=run.id,
                resume="allow",
                config=run.config,
                dir=str(run.files.root),
            )
        except wandb.errors.Error as error:
            raise _refused("wandb", error, "set WANDB_API_KEY, or WANDB_MODE=offline") from error
        # Steps count anew after a warm start and after a resume; wandb's own counter may only grow.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log({"step": step, **metrics})

    def close(self) -> None:
        self._run.finish()


class MlflowTracker:
    """Send to the MLflow server of MLFLOW_TRACKING_URI; a resumed run is found again by its tag."""

    def __init__(self, run: RunLabel) -> None:
        self._mlflow = _import("mlflow")
        try:
            experiment = self._mlflow.set_experiment(run.project)
            found = self._mlflow.search_runs(
                experiment_ids=[experiment.experiment_id],
                filter_string=f"tags.rlctl_id = '{run.id}'",
                max_results=1,
                output_format="list",
            )
            known = found[0].info.run_id if found else None
            self._mlflow.start_run(run_id=known, run_name=run.name, tags={"rlctl_id": run.id})
            if known is None:
                self._mlflow.log_dict(run.config, "config.json")
        except self._mlflow.exceptions.MlflowException as error:
            raise _refused("mlflow", error, "check MLFLOW_TRACKING_URI") from error

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        # MLflow refuses "@" in names: val-core/gsm8k/acc/mean@1 arrives as val-core/gsm8k/acc/mean:1.
        named = {name.replace("@", ":"): value for name, value in metrics.items()}
        self._mlflow.log_metrics(named, step=step, synchronous=False)

    def close(self) -> None:
        self._mlflow.flush_async_logging()
        self._mlflow.end_run()


class SwanlabTracker:
    """Send to SwanLab; `SWANLAB_MODE=offline` keeps everything in the run folder."""

    def __init__(self, run: RunLabel) -> None:
        swanlab = _import("swanlab")
        try:
            self._run = swanlab.init(
                project=run.project,
                name=run.name,
                id=run.id,
                resume="allow",
                config=run.config,
                log_dir=str(run.files.root / "swanlab"),
            )
        except (swanlab.exceptions.AuthenticationError, swanlab.exceptions.ApiError) as error:
            raise _refused("swanlab", error, "set SWANLAB_API_KEY, or SWANLAB_MODE=offline") from error
        self._shift = 0

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        # A warm start counts up to step 0; SwanLab drops negative steps, so its curve begins at 0 here.
        self._shift = max(self._shift, -step)
        warm = any(name.startswith("warm_start/") for name in metrics)
        self._run.log(dict(metrics), step=step + self._shift if warm else step)

    def close(self) -> None:
        self._run.finish()


TRACKERS = {
    "tensorboard": TensorboardTracker,
    "wandb": WandbTracker,
    "mlflow": MlflowTracker,
    "swanlab": SwanlabTracker,
}


def _import(package: str) -> Any:
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != package:
            raise
        raise UserError(
            f"telemetry.trackers names {package!r}, which is not installed",
            f"python3 -m pip install {package}, or leave {package!r} out of telemetry.trackers",
            exit_code=PREFLIGHT,
        ) from error


def _refused(tracker: str, error: Exception, remedy: str) -> UserError:
    """Return the refusal of a tracker's service as a user error, with the first line of its own words."""
    reason = str(error).strip().partition("\n")[0]
    return UserError(
        f"telemetry.trackers: {tracker} did not start: {reason}",
        f"{remedy}, or leave {tracker!r} out of telemetry.trackers",
        exit_code=PREFLIGHT,
    )
