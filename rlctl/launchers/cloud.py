"""The launcher for clouds and Kubernetes: SkyPilot finds machines, starts the task of `sky/`, and shows its log.

One machine or several are a cluster of the run's own, which a later resume finds again; spot machines are a
managed job.
"""

from __future__ import annotations

import secrets
import shlex
import socket
import time
from typing import Any

import yaml

from rlctl.launchers import sky_command, sky_environment, sky_log, sky_machine, sky_queue, sky_task
from rlctl.launchers.base import TERMS, Job, JobStatus, Order
from rlctl.launchers.sky_upload import Upload, uploads
from rlctl.rundir import ENDED, Run, read_json
from rlctl_train.config import RunConfig
from rlctl_train.config.errors import FAILED, LAUNCH, UserError
from rlctl_train.config.launch_cloud import CloudLaunch
from rlctl_train.config.layout import RunFiles
from rlctl_train.config.model import RandomModel

NAME = "cloud"
DOWN_LIMIT_S, LOG_LIMIT_S = 300.0, 180.0
_asked: dict[str, tuple[float, JobStatus]] = {}
"""What SkyPilot last said of a run, and when: an answer takes seconds."""
_fetched: dict[str, float] = {}


class CloudLauncher:
    """Runs through SkyPilot."""

    poll_s = 15.0

    def check(self, order: Order) -> None:
        """Refuse what SkyPilot would refuse only after minutes, or not at all."""
        config = sky_task.settings(order)
        sky_machine.check_place(config, sky_environment.image(order))
        _check_kept(order, config)
        verdict = _verdict(order)
        if verdict is None:
            return
        if verdict.problem is not None:
            raise UserError(f"SkyPilot refuses the task: {verdict.problem}", "see `rlctl config explain launch`")
        if verdict.is_offered is False:
            where = config.infra or "any place"
            raise UserError(
                f"launch.machine={config.machine}: SkyPilot knows no {sky_machine.accelerators(config)} at {where}",
                "`sky show-gpus --all` lists what there is; launch.accelerators takes a name from that list",
            )

    def preview(self, order: Order) -> dict[str, str]:
        """Return what it takes, what goes there, the command and the task."""
        return {
            TERMS: _terms(order),
            "command": shlex.join(["sky", *_launch(order)]),
            "task.yaml": sky_task.task(order).rstrip(),
        }

    def submit(self, order: Order) -> Job:
        """Have SkyPilot find machines and start the job there; returns once it is in their queue.

        `Job.submitted` is when this began, so that the driver has always started after it.
        """
        sky_command.command()
        config, name, files = sky_task.settings(order), sky_task.cluster(order.name), RunFiles(order.root)
        is_new = not files.driver.is_file()
        if is_new and not config.spot and sky_queue.cluster(name) is not None:
            raise UserError(
                f"SkyPilot has a cluster {name} already, and it is not this run's", "choose another --name",
                exit_code=LAUNCH,
            )  # fmt: skip
        started, log = time.time(), files.driver_log
        log_bytes = log.stat().st_size if log.is_file() else 0
        files.task.write_text(sky_task.task(order), encoding="utf-8")
        files.logs.mkdir(exist_ok=True)
        token = {sky_task.TOKEN_VARIABLE: secrets.token_hex(32)}
        try:
            sky_command.run(_launch(order), log=files.logs / "sky.log", environment={**order.environment, **token})
        except UserError:
            # A cluster that failed half-way costs money, and nothing of the run is on it yet.
            if is_new and not config.spot and sky_queue.cluster(name) is not None:
                sky_command.ask("down", "--yes", name, limit_s=DOWN_LIMIT_S)
            raise
        _asked.pop(str(order.root), None)
        facts = {"managed": config.spot, "log_bytes": log_bytes}
        return Job(NAME, name, socket.gethostname(), str(order.cwd), started, facts)

    def status(self, run: Run) -> JobStatus:
        """Return what SkyPilot last said of the job; ask it again when that is old."""
        job = run.job()
        if job is None:
            return JobStatus("ended")
        if (said := _end(run, job)) is not None:
            return said
        key = str(run.files.root)
        if key not in _asked or time.monotonic() - _asked[key][0] > self.poll_s:
            standing = sky_queue.managed(job.id) if job.facts["managed"] else sky_queue.on_cluster(job.id)
            _asked[key] = (time.monotonic(), standing)
        return _asked[key][1]

    def fetch(self, run: Run) -> None:
        """Read the job's log and bring the run folder here up to date; checkpoints stay where they are."""
        job, key = run.job(), str(run.files.root)
        if job is None or _end(run, job) is not None:
            return
        has_ended = key in _asked and _asked[key][1].state == "ended"
        if not has_ended and time.monotonic() - _fetched.get(key, float("-inf")) < self.poll_s:
            return
        words = ("jobs", "logs", "--name", job.id) if job.facts["managed"] else ("logs", job.id)
        text = sky_command.ask(*words, "--no-follow", "--tail", "0", good=sky_command.LOG_CODES, limit_s=LOG_LIMIT_S)
        _fetched[key] = time.monotonic()
        if text is not None:
            sky_log.store(text, run.files, job.facts["log_bytes"])

    def interrupt(self, run: Run) -> None:
        """Ask the driver to save and leave; a managed job is cancelled, which leaves it SkyPilot's half a minute."""
        job = run.job()
        if job is None or self.status(run).state == "ended":
            return
        if job.facts["managed"]:
            done = sky_command.ask("jobs", "cancel", "--yes", "--name", job.id) is not None
        else:
            done = _leave_word(run, job, "stop")
        if not done:
            raise UserError(
                f"SkyPilot's {job.id} cannot be told to stop: it does not answer",
                f"try again, or end it without saving: `rlctl runs stop {run.name} --force`",
                exit_code=FAILED,
            )
        _asked.pop(str(run.files.root), None)

    def ask_stacks(self, run: Run) -> None:
        """Leave word on the first machine by ssh; the answer comes within the job's log."""
        job = run.job()
        if job is None:
            return
        if job.facts["managed"]:
            raise UserError(
                f"{run.name!r} is a managed job of SkyPilot, whose machines nobody reaches by ssh",
                "run it without launch.spot to be able to ask",
            )
        if not _leave_word(run, job, "stacks"):
            raise UserError(
                f"SkyPilot's {job.id} cannot be asked: it does not answer by ssh",
                f"see whether `ssh {job.id}` gets there, and try again",
                exit_code=FAILED,
            )

    def kill(self, run: Run) -> None:
        """Give the machines back at once; what is not in `launch.bucket` is lost."""
        job = run.job()
        if job is None:
            return
        words = ("jobs", "cancel", "--yes", "--name", job.id) if job.facts["managed"] else ("down", "--yes", job.id)
        sky_command.ask(*words, limit_s=DOWN_LIMIT_S)
        _asked.pop(str(run.files.root), None)


def _leave_word(run: Run, job: Job, what: str) -> bool:
    """Make the file that the shell beside the driver waits for (sky/driver.sh); return whether that worked."""
    return sky_command.on_head(job.id, f"touch /tmp/rlctl-{what}-$(id -u)-{run.name}")


def _terms(order: Order) -> str:
    """Return what a launch takes and sends, for the person who pays."""
    config = sky_task.settings(order)
    machine = sky_machine.accelerators(config) or f"{sky_machine.cpu_cores(config)} CPU cores"
    kind = "spot machine(s), as a managed job" if config.spot else "machine(s)"
    end = f"given back {config.idle_minutes} min after the end"
    if config.spot:
        end = "given back at the end"
    elif sky_machine.place(config) == "slurm":
        end = f"held until `rlctl runs stop {order.name} --force`"
    lines = [
        f"takes    {config.nodes} {kind} with {machine} each, in {config.infra or 'the cheapest place set up'}; {end}",
        f"price    {_price(order, config)}",
        f"keeps    checkpoints and results in {config.bucket or 'nothing but the machines: launch.bucket is unset'}",
        *(f"uploads  {_upload(one)}" for one in uploads(order)),
        f"secrets  {', '.join(sky_task.secret_names(order))} (from this environment, by name)",
    ]
    return "\n".join(lines)


def _launch(order: Order) -> list[str]:
    """Return the arguments of `sky` that start the task."""
    name = sky_task.cluster(order.name)
    if sky_task.settings(order).spot:
        words = ["jobs", "launch", "--yes", "--detach-run", "--name", name]
    else:
        words = ["launch", "--yes", "--detach-run", "--cluster", name]
    for secret in sky_task.secret_names(order):
        words += ["--secret", secret]
    return [*words, str(RunFiles(order.root).task)]


def _check_kept(order: Order, config: CloudLaunch) -> None:
    """Refuse a run whose nodes could not read what another has written."""
    if config.spot and config.bucket is None:
        raise UserError(
            "launch.spot needs launch.bucket: what is on a machine goes when it is taken back",
            "set launch.bucket=s3://NAME/FOLDER (or gs://…)",
        )
    # On Slurm the home that SkyPilot gives a cluster is shared.
    if config.nodes == 1 or sky_machine.place(config) == "slurm":
        return
    if config.bucket is None:
        raise UserError(
            f"launch.nodes={config.nodes} needs launch.bucket: each node writes its part of a checkpoint",
            "set launch.bucket=s3://NAME/FOLDER (or gs://…), or the path of a folder that all nodes share",
        )
    made = _made_in_the_folder(order.config)
    if made is not None:
        raise UserError(
            f"launch.nodes={config.nodes}: {made} is made on the first node, and the others have no copy",
            "take one node, or a pretrained model without a warm start",
        )


def _made_in_the_folder(config: RunConfig) -> str | None:
    if isinstance(config.model, RandomModel):
        return "model.type=random"
    return None if config.warm_start is None else "warm_start"


def _verdict(order: Order) -> sky_command.Verdict | None:
    """Return SkyPilot's own view, or None where it is not installed."""
    config = sky_task.settings(order)
    task: dict[str, Any] = yaml.safe_load(sky_task.task(order))
    # Values come with --secret, the run's own files with the launch.
    task["secrets"] = dict.fromkeys(task["secrets"], "unset")
    task.pop("file_mounts")
    named = sky_machine.accelerators(config)
    # Kubernetes and Slurm have no catalogue: what their nodes carry is known when they are asked.
    place = sky_machine.place(config)
    listed = None if place in ("kubernetes", "slurm", "ssh") else named
    return sky_command.inspect(task, accelerator=listed, cloud=place, spot=config.spot)


def _price(order: Order, config: CloudLaunch) -> str:
    verdict = _verdict(order)
    if verdict is None:
        return f"unknown: SkyPilot is not here; {sky_command.INSTALL}"
    if verdict.usd_per_hour is None:
        return "unknown: SkyPilot lists none for it"
    total = verdict.usd_per_hour * config.nodes
    return f"from {total:.2f} USD an hour, by SkyPilot's list ({verdict.usd_per_hour:.2f} a machine)"


def _upload(one: Upload) -> str:
    size = one.num_bytes()
    weight = "" if size == 0 else f", {size / 2**20:.1f} MiB" if size >= 2**20 else f", {size} bytes"
    named = f" ({one.key})" if one.key else ""
    return f"{one.source}{named}{weight} -> {one.target}"


def _end(run: Run, job: Job) -> JobStatus | None:
    """Return how the driver of this very job ended, when its last status has come here."""
    status = read_json(run.files.status)
    if status.get("state") in ENDED and status.get("started", 0) > job.submitted:
        return JobStatus("ended", exit_code=status.get("exit_code"))
    return None
