"""The launcher for a Ray cluster that runs already: one submitted job, whose driver keeps its folder on the cluster.

Small files come home inside the job's output; see `rlctl_train.courier` for the other side.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import shlex
import socket
import time
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from rlctl.launchers import home, ray_size, ray_upload
from rlctl.launchers.base import Job, JobStatus, Order
from rlctl.launchers.ray_api import Missing, NoAnswer, dashboard_at, unreachable
from rlctl.rundir import Run, read_json
from rlctl_train.config.errors import UserError
from rlctl_train.config.launch_environment import SameEnvironment
from rlctl_train.config.launch_ray import RayLaunch
from rlctl_train.config.layout import RunFiles, write_json
from rlctl_train.config.parcel import unpack

NAME = "ray"
FOLDER = "~/rlctl-runs"
COURIER = "-m rlctl_train.courier"
STOP_VARIABLE = "RAY_JOB_STOP_WAIT_TIME_S"
"""In which Ray reads how long a stopped job may take; its own default is 3 s."""
PAUSES = 5
"""Times that a pause between two fetches is longer than the fetch."""
LAST_WORD = "ray_job.json"
"""In logs/: how a job ended that was fetched whole. The cluster need not be asked again, or exist."""


@dataclass
class _Seen:
    """What this process knows of a job, so that a view which looks often asks seldom."""

    standing: JobStatus = field(default_factory=lambda: JobStatus("unknown"))
    asked: float = -1e9
    fetched: float = -1e9
    """Both in seconds of the monotonic clock."""
    took_s: float = 0.0
    """Time of the last fetch, which reads the whole output of the job: Ray gives no part of it."""


_seen: dict[str, _Seen] = {}


class RayLauncher:
    """Runs as jobs of an existing Ray cluster."""

    poll_s = 2.0

    def check(self, order: Order) -> None:
        """Refuse a cluster that is too small or cannot be asked, and what could not be found there."""
        config = _config(order)
        if order.config.ray.address is not None:
            raise UserError(
                f"ray.address={order.config.ray.address} and launch.type=ray name two clusters",
                "unset ray.address (RLCTL_RAY_ADDRESS, or ray_address in settings.toml)",
            )
        if config.folder is None and order.plan.num_nodes > 1:
            raise UserError(
                f"launch.folder is unset, and {order.plan.num_nodes} nodes write their checkpoints together",
                "name a folder that every node sees, such as launch.folder=/shared/rlctl-runs",
            )
        if not isinstance(config.environment, SameEnvironment):
            raise UserError(
                f"launch.environment.type={config.environment.type}: a Ray cluster has its interpreter already",
                "install rlctl on its nodes, or add packages by launch.runtime_env, and unset launch.environment",
            )
        ray_upload.contents(order)
        ray_size.require(order.plan, order.config, nodes(config), config.address)

    def preview(self, order: Order) -> dict[str, str]:
        """Return the job as it would be submitted, and the files that would be uploaded."""
        request = _request(order, package="_ray_pkg_CONTENT.zip", suffix="RANDOM", folder=None)
        files = [*ray_upload.contents(order), *(f"run/{name}" for name in ray_upload.RUN_FILES)]
        return {f"job to {_config(order).address}": json.dumps(request, indent=2), "upload": "\n".join(files)}

    def submit(self, order: Order) -> Job:
        """Upload the run's files and submit the job; a resumed run keeps its folder on the cluster."""
        config, files = _config(order), RunFiles(order.root)
        dashboard, before = dashboard_at(config.address), Run(files).job()
        data = ray_upload.archive(order)
        package = ray_upload.package_name(data)
        folder = before.facts["folder"] if before is not None and before.launcher == NAME else None
        request = _request(order, package=package, suffix=secrets.token_hex(3), folder=folder)
        try:
            if not dashboard.has_package(package):
                dashboard.upload(package, data)
            dashboard.submit(request)
        except (NoAnswer, Missing) as error:
            raise unreachable(error) from error
        facts = {
            "address": config.address,
            "folder": request["metadata"]["folder"],
            "python": _python(config),
            "log_bytes": files.driver_log.stat().st_size if files.driver_log.is_file() else 0,
        }
        return Job(NAME, request["submission_id"], socket.gethostname(), str(order.cwd), time.time(), facts)

    def status(self, run: Run) -> JobStatus:
        """Return where the job stands: from its last word here, from a moment ago, or from the cluster."""
        job = run.job()
        if job is None:
            return JobStatus("ended")
        if (last := _last_word(run, job)) is not None:
            return last
        seen = _seen.setdefault(job.id, _Seen())
        if seen.standing.state != "ended" and time.monotonic() - seen.asked > self.poll_s:
            seen.standing, seen.asked = _ask(job), time.monotonic()
        return seen.standing

    def fetch(self, run: Run) -> None:
        """Write what the job has sent home so far; once it has ended, for the last time."""
        job = run.job()
        if job is None or _last_word(run, job) is not None:
            return
        standing, seen = self.status(run), _seen.setdefault(job.id, _Seen())
        lately = time.monotonic() - seen.fetched < max(self.poll_s, PAUSES * seen.took_s)
        if standing.state == "unknown" or (lately and standing.state != "ended"):
            return
        began = time.monotonic()
        with contextlib.suppress(NoAnswer, UserError):
            # A job that the cluster has forgotten: what is here already is all there will be.
            with contextlib.suppress(Missing):
                _write_home(run, job, dashboard_at(job.facts["address"]).log(job.id))
            seen.fetched = time.monotonic()
            seen.took_s = seen.fetched - began
            if standing.state == "ended":
                run.files.logs.mkdir(exist_ok=True)
                word = {"id": job.id, "detail": standing.detail, "exit_code": standing.exit_code}
                write_json(run.files.logs / LAST_WORD, word)

    def interrupt(self, run: Run) -> None:
        """Have Ray stop the job: SIGTERM, on which the driver saves and leaves."""
        job = run.job()
        if job is None or self.status(run).state == "ended":
            return
        try:
            dashboard_at(job.facts["address"]).stop(job.id)
        except Missing:
            return
        except NoAnswer as error:
            raise unreachable(error) from error

    def ask_stacks(self, run: Run) -> None:
        """Have a second small job ask the driver, in whose folder it leaves word."""
        job = run.job()
        if job is not None:
            _beside(job, "stacks")

    def kill(self, run: Run) -> None:
        """End the driver by a second small job beside it: a stop of Ray's own waits until it has saved."""
        job = run.job()
        if job is not None and self.status(run).state != "ended":
            _beside(job, "kill")


def _beside(job: Job, verb: str) -> None:
    """Submit a job that does something to the driver of another, on the same node."""
    dashboard = dashboard_at(job.facts["address"])
    try:
        node = dashboard.job(job.id).get("driver_agent_http_address")
        request: dict[str, Any] = {
            "entrypoint": f"exec {job.facts['python']} {COURIER} {verb} {shlex.quote(job.facts['folder'])}",
            "submission_id": f"{job.id}-{verb}-{secrets.token_hex(2)}",
        }
        if node:
            request["entrypoint_resources"] = {f"node:{urlsplit(node).hostname}": 0.001}
        dashboard.submit(request)
    except Missing:
        return
    except NoAnswer as error:
        raise unreachable(error) from error


def nodes(config: RayLaunch) -> list[dict[str, Any]]:
    """Return the nodes of the cluster that a configuration names; raises UserError."""
    try:
        return dashboard_at(config.address).nodes()
    except (NoAnswer, Missing, KeyError, TypeError) as error:
        raise unreachable(error) from error


def machine_of(config: RayLaunch) -> str:
    """Return the kind of machine that the cluster has, as `DEVICE:COUNT`; raises UserError."""
    return ray_size.machine_of(nodes(config), config.address)


def _config(order: Order) -> RayLaunch:
    assert isinstance(order.config.launch, RayLaunch)
    return order.config.launch


def _python(config: RayLaunch) -> str:
    """Return the interpreter on the cluster, as a shell has it: by default the one its own processes find."""
    assert isinstance(config.environment, SameEnvironment)
    return shlex.quote(config.environment.python or "python")


def _request(order: Order, *, package: str, suffix: str, folder: str | None) -> dict[str, Any]:
    """Return the job as Ray takes it; `folder` is that of an earlier job of the run."""
    config = _config(order)
    folder = folder or f"{(config.folder or FOLDER).rstrip('/')}/{order.name}-{suffix}"
    more = config.runtime_env
    variables = {STOP_VARIABLE: str(config.save_timeout_s)} | more.get("env_vars", {})
    return {
        "entrypoint": f"exec {_python(config)} {COURIER} run {shlex.quote(folder)}",
        "submission_id": f"rlctl-{order.name}-{suffix}",
        "runtime_env": more | {"working_dir": f"gcs://{package}", "env_vars": variables},
        "metadata": {"run": order.name, "folder": folder},
    }


def _ask(job: Job) -> JobStatus:
    """Return what the cluster says of a job."""
    try:
        told = dashboard_at(job.facts["address"]).job(job.id)
    except Missing:
        return JobStatus("ended", f"the cluster at {job.facts['address']} does not know the job {job.id}")
    except NoAnswer as error:
        return JobStatus("unknown", str(error))
    except UserError as error:
        return JobStatus("unknown", error.what)
    detail = next(iter((told.get("message") or "").splitlines()), "")
    if told["status"] == "PENDING":
        return JobStatus("queued", detail)
    if told["status"] == "RUNNING":
        return JobStatus("running", detail)
    return JobStatus("ended", detail, told.get("driver_exit_code"))


def _last_word(run: Run, job: Job) -> JobStatus | None:
    file = run.files.logs / LAST_WORD
    if not file.is_file():
        return None
    word = read_json(file)
    return JobStatus("ended", word["detail"], word["exit_code"]) if word["id"] == job.id else None


def _write_home(run: Run, job: Job, text: str) -> None:
    """Write the files that a job's output carries, and what the driver printed below that of earlier jobs."""
    printed, files = unpack(text)
    log = run.files.driver_log
    earlier = log.read_bytes()[: job.facts["log_bytes"]] if log.is_file() else b""
    home.bring(run.files.root, files | {"logs/driver.log": earlier + printed.encode()})
