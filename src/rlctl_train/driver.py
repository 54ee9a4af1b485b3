"""One run from its folder to its summary: prepare, connect, warm start, train, export, measure, report."""

from __future__ import annotations

import gc
import json
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace

import ray
from ray.exceptions import RayTaskError
from rlctl_hw.types import Plan

from rlctl_train.checkpoint.lock import sole_writer
from rlctl_train.checkpoint.manifest import Keep
from rlctl_train.checkpoint.remote import RemoteError, RemoteStore
from rlctl_train.checkpoint.store import CheckpointStore
from rlctl_train.checkpoint.uploads import Uploads
from rlctl_train.cluster import connect
from rlctl_train.config import RunConfig
from rlctl_train.config.errors import FAILED, PREFLIGHT, UserError
from rlctl_train.config.layout import RunFiles, write_json
from rlctl_train.config.trainer import WarmStartConfig
from rlctl_train.crew import WorkersLost
from rlctl_train.importing import keep_for_good
from rlctl_train.placement import lay_out
from rlctl_train.prepare import Materials, prepare
from rlctl_train.recovery import Restarts
from rlctl_train.status import SETUP, Status
from rlctl_train.store_watch import StoreWatch
from rlctl_train.sync.transfer import SyncError
from rlctl_train.telemetry.metrics import MetricsWriter
from rlctl_train.training import STATE, Context, Stage, StopFlag, Totals, best_of, warm_start_config
from rlctl_train.watchdog import Watchdog


def drive(files: RunFiles, config: RunConfig, status: Status, stop: StopFlag) -> None:
    """Run everything that is left to do in a run folder, of which it is the only writer."""
    files.logs.mkdir(exist_ok=True)
    watchdog = Watchdog(files, status, config)
    with sole_writer(files.checkpoints, files.root.name), watchdog.looking(), _uploads(files, config) as uploads:
        _through_losses(files, config, status, stop, watchdog, uploads)


def _through_losses(
    files: RunFiles, config: RunConfig, status: Status, stop: StopFlag, watchdog: Watchdog, uploads: Uploads | None
) -> None:
    """Train and finish, through losses of workers as many as it may bear."""
    start = time.time()
    plan = plan_of(files)
    materials = prepare(files, config)
    gc.collect()  # the model that was made
    keep_for_good()
    restarts = Restarts(config.launch.max_restarts, status)
    while True:
        try:
            with _context(files, config, plan, materials, status, stop, watchdog, restarts) as context:
                return _train(replace(context, uploads=uploads), start)
        except WorkersLost as loss:
            if stop.requested:
                raise KeyboardInterrupt from loss
            if not restarts.left:
                limit = f"launch.max_restarts={config.launch.max_restarts}"
                raise WorkersLost(f"{loss.what}; {limit} leaves no further restart") from loss
            status.update(state="starting", phase=SETUP)
            restarts.spend(loss.what, f"going on {_where_to_go_on(files)}")


def _uploads(files: RunFiles, config: RunConfig) -> AbstractContextManager[Uploads | None]:
    """Reach the remote place, if there is one; where nothing is saved here, fetch what is saved there."""
    checkpoint = config.checkpoint
    if checkpoint.remote is None:
        return nullcontext()
    remote = RemoteStore(checkpoint.remote, files.root.name, Keep(checkpoint.keep_last, best_of(checkpoint)))
    if CheckpointStore(files.checkpoints, 1).latest() is None:
        try:
            fetched = remote.fetch(files.checkpoints)
        except RemoteError as error:
            raise UserError(
                str(error),
                f"try again, or set checkpoint.remote=null to begin without what lies in {remote.place}",
                exit_code=PREFLIGHT,
            ) from error
        if fetched is not None:
            print(f"going on from {fetched.name}, fetched from {remote.place}", file=sys.stderr)
    return Uploads(remote)


@contextmanager
def _context(
    files: RunFiles,
    config: RunConfig,
    plan: Plan,
    materials: Materials,
    status: Status,
    stop: StopFlag,
    watchdog: Watchdog,
    restarts: Restarts,
) -> Iterator[Context]:
    """Connect to Ray, and continue the metrics where the last checkpoint stands; end whatever of both is left."""
    telemetry = config.telemetry
    writer = MetricsWriter(
        files, telemetry.trackers, telemetry.project, files.root.name, resume_step=_keep_metrics_until(files, config)
    )
    try:
        needed = lay_out(plan, config).needed
        wait_s = config.ray.start_timeout_s if restarts.spent else 0.0  # a lost node may come back
        address = connect(config.ray, needed=needed, object_store_gib=plan.object_store_gib, wait_s=wait_s)
        status.update(address=address)
        stop.listen()
        stores = StoreWatch()
        with stores.asking():
            yield Context(files, config, plan, materials, status, stop, watchdog, stores, writer, restarts)
    finally:
        writer.close()
        ray.shutdown()  # of a private cluster all processes end, of another all workers of this run


def _train(context: Context, start: float) -> None:
    """Train what is left to train, export, measure; `start` is when the job began, in unix seconds."""
    context = _warm_start(context)
    stage = Stage(context)
    totals, accuracy = stage.train(), None
    if context.config.checkpoint.export_hf:
        stage.export(context.files.hf)
        accuracy = stage.measure(context.files.hf)
    stage.end()
    _finish(context, totals, accuracy, time.time() - start)


def _warm_start(context: Context) -> Context:
    """Train the warm-start stage unless it is done; return the context of the main stage, with its model."""
    warm = context.config.warm_start
    if warm is None:
        return context
    folder = RunFiles(context.files.root / "warm_start")
    if not folder.hf.exists():
        folder.logs.mkdir(parents=True, exist_ok=True)
        config = warm_start_config(context.config, warm)
        materials = replace(context.materials, val_path=None)
        inner = replace(context, files=folder, config=config, materials=materials, uploads=None)
        stage = Stage(inner, phase="warm_start", metric_offset=_warm_start_offset(warm))
        stage.train()
        stage.export(folder.hf)
        stage.end()
    shutil.rmtree(folder.checkpoints, ignore_errors=True)
    return replace(context, materials=replace(context.materials, model_path=str(folder.hf)))


def _finish(context: Context, totals: Totals, accuracy: float | None, seconds: float) -> None:
    """Write the summary."""
    write_json(
        context.files.summary,
        {
            "schema_version": 1,
            "val_accuracy_start": totals.val_accuracy_start,
            "val_accuracy_end": accuracy,
            "steps": context.config.trainer.num_steps,
            "wall_s": round(seconds, 2),
            "tokens_per_s": round(totals.tokens / totals.seconds, 1) if totals.seconds else None,
        },
    )


def plan_of(files: RunFiles) -> Plan:
    """Return the plan of a run folder."""
    return Plan.from_json(json.loads(files.plan.read_text()))


def explain(error: Exception) -> UserError:
    """Turn whatever ended the run into what a person can act on."""
    cause = getattr(error, "cause", None) if isinstance(error, RayTaskError) else None
    if isinstance(cause, UserError):
        return cause
    if isinstance(error, UserError):
        return error
    if isinstance(error, SyncError):
        return UserError(
            str(error),
            "a fault of the transport or the rollout engine, not of the config: `rlctl runs resume` goes back to the "
            "last checkpoint",
            exit_code=FAILED,
        )
    return UserError(
        f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}",
        "the traceback is in logs/driver.log of the run folder; `rlctl runs resume` continues from the last checkpoint",
        exit_code=FAILED,
    )


def _warm_start_offset(warm: WarmStartConfig) -> int:
    """Return what is added to warm-start steps in metrics: they count up to -1, the main stage begins at 0."""
    return -warm.num_steps - 1


def _keep_metrics_until(files: RunFiles, config: RunConfig) -> int | None:
    """Return the last step whose metrics a resume keeps; None when nothing was saved before."""
    step = _saved_step(files)
    if step is not None or config.warm_start is None:
        return step
    folder = RunFiles(files.root / "warm_start")
    if folder.hf.exists():
        return -1
    warm_step = _saved_step(folder)
    return None if warm_step is None else warm_step + _warm_start_offset(config.warm_start)


def _where_to_go_on(files: RunFiles) -> str:
    """Say from which step a resume continues."""
    warm = RunFiles(files.root / "warm_start")
    if (step := _saved_step(files)) is not None:
        return f"from step {step}"
    if warm.hf.exists():
        return "from the end of the warm start"
    step = _saved_step(warm)
    return "from the start" if step is None else f"from step {step} of the warm start"


def _saved_step(files: RunFiles) -> int | None:
    latest = CheckpointStore(files.checkpoints, 1).latest()
    return None if latest is None else json.loads((latest / STATE).read_text())["step"]
