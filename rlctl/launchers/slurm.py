"""The launcher for Slurm: a batch job that starts Ray on its nodes and the driver on the first one."""

from __future__ import annotations

import socket
import time
from pathlib import Path

from rlctl.launchers.base import Job, JobState, JobStatus, Order
from rlctl.launchers.slurm_client import SUBMIT_LIMIT_S, Queue, SlurmError, command, ping
from rlctl.launchers.slurm_script import options, script
from rlctl.rundir import Run
from rlctl_train.config.errors import LAUNCH, UserError
from rlctl_train.config.launch_slurm import SlurmLaunch
from rlctl_train.config.layout import RunFiles

NAME = "slurm"
WAITS = ("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "SPECIAL_EXIT", "RESV_DEL_HOLD")
WORKS = ("RUNNING", "COMPLETING", "STAGE_OUT", "SIGNALING", "STOPPED", "SUSPENDED", "RESIZING")
"""A job that was preempted or sent back is COMPLETING until it is PENDING again."""
OF_THE_DRIVER = ("COMPLETED", "FAILED")
"""Jobs that their own script has ended; a cancelled one may have an exit code of 0."""
SPELLED_OTHERWISE = {"SBATCH_TIME": "SBATCH_TIMELIMIT", "SBATCH_MEM": "SBATCH_MEM_PER_NODE"}
"""Variables of sbatch that are not named like the option."""
_queue = Queue()


class SlurmLauncher:
    """Runs as Slurm jobs."""

    poll_s = 2.0

    def check(self, order: Order) -> None:
        """Refuse what no batch script can say."""
        for what, path in (("run folder", order.root), ("folder of submission", order.cwd)):
            if not str(path).isprintable():
                raise UserError(f"the {what} {str(path)!r} cannot stand in a batch script", "choose another folder")

    def preview(self, order: Order) -> dict[str, str]:
        """Return the batch script and the command that takes it."""
        path = _path(RunFiles(order.root))
        return {"command": " ".join(_submission(str(path))), "launch/job.sbatch": script(order)}

    def submit(self, order: Order) -> Job:
        """Hand the script to sbatch; it stays in the run folder."""
        ping()
        files = RunFiles(order.root)
        path = _path(files)
        try:
            path.parent.mkdir(exist_ok=True)
            files.logs.mkdir(exist_ok=True)
            path.write_text(script(order), encoding="utf-8")
        except OSError as error:
            hint = "free some space, or set RLCTL_RUNS_DIR to a folder that every node sees"
            raise UserError(f"{path} cannot be written: {error}", hint, exit_code=LAUNCH) from error
        printed = command(_submission(str(path)), SUBMIT_LIMIT_S, sbatch_environment(order))
        number = printed.strip().partition(";")[0]
        _queue.forget()
        return Job(NAME, number, socket.gethostname(), str(order.cwd), time.time())

    def status(self, run: Run) -> JobStatus:
        """Return what the queue says; a job that it has forgotten has ended."""
        job = run.job()
        if job is None:
            return JobStatus("ended")
        try:
            facts = _queue.job(job.id)
        except SlurmError as error:
            return JobStatus("unknown", error.what)
        if facts is None:
            return JobStatus("ended")
        state: JobState = "queued" if facts.state in WAITS else "running" if facts.state in WORKS else "ended"
        detail = facts.reason if state == "queued" else facts.state.lower()
        return JobStatus(state, detail, facts.exit_code if facts.state in OF_THE_DRIVER else None)

    def fetch(self, run: Run) -> None:
        """Bring nothing: the file system is shared."""

    def interrupt(self, run: Run) -> None:
        """Have the job's script save and leave for good; a job that waits is taken out of the queue."""
        job, standing = run.job(), self.status(run)
        if job is None or standing.state == "ended":
            return
        works = standing.state == "unknown" or standing.detail == "running"
        self._cancel(job.id, *(("--signal=USR2", "--batch") if works else ()))

    def ask_stacks(self, run: Run) -> None:
        """Leave word in the run folder, which the driver shares."""
        run.files.stacks_wanted.touch()

    def kill(self, run: Run) -> None:
        """Cancel the job."""
        job = run.job()
        if job is not None and self.status(run).state != "ended":
            self._cancel(job.id)

    def _cancel(self, number: str, *options: str) -> None:
        ping()
        try:
            command(["scancel", *options, number])
        except SlurmError as error:
            if "already completing or completed" not in error.what:
                raise
        _queue.forget()


def _path(files: RunFiles) -> Path:
    return files.root / "launch" / "job.sbatch"


def _submission(path: str) -> list[str]:
    return ["sbatch", "--parsable", path]


def sbatch_environment(order: Order) -> dict[str, str]:
    """Return the environment of sbatch, without the variables that would beat an option of the script."""
    launch = order.config.launch
    assert isinstance(launch, SlurmLaunch)
    names = [option.removeprefix("--").partition("=")[0] for option in options(order, launch)]
    variables = {f"SBATCH_{name.upper().replace('-', '_')}" for name in [*names, "no-requeue"]}
    beaten = {SPELLED_OTHERWISE.get(name, name) for name in variables}
    return {name: value for name, value in order.environment.items() if name not in beaten}
