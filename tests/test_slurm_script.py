"""The batch script: three nodes of eight devices word for word, settings, visibility; no Slurm is needed."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from rlctl import app, planning, rundir
from rlctl.launchers import slurm, slurm_client
from rlctl.launchers.base import Job, JobStatus, Order
from rlctl.launchers.slurm import SlurmLauncher, sbatch_environment
from rlctl.launchers.slurm_script import script
from rlctl_train.config import RunConfig
from rlctl_train.config.layout import write_json
from tests import runs

GOLDEN = Path(__file__).parent / "fixtures" / "slurm"
MACHINES = {"cuda": "h100:8", "rocm": "mi300x:8", "ascend": "910b2:8"}
SLURM_SETS = {"CUDA_VISIBLE_DEVICES": "2,3", "ROCR_VISIBLE_DEVICES": "2,3", "GPU_DEVICE_ORDINAL": "2,3"}
"""What gres/gpu sets, whatever the accelerators are."""
IMAGE = {"type": "image", "image": "my image.sif", "holds_rlctl": True}
HELD = JobStatus("queued", "job_requeued_in_held_state")


def order(machine: str = "h100:8", nodes: int = 3, **launch: Any) -> Order:
    settings = {"type": "slurm", "machine": machine, "nodes": nodes, **launch}
    config = RunConfig.model_validate({**runs.CONFIG, "launch": settings})
    plan = planning.plan_here(config, planning.hardware_named(f"{machine}x{nodes}"))
    return Order(Path("/shared/runs/first"), config, plan, Path("/home/me"), {})


def option(text: str, name: str) -> str | None:
    values = [line.partition("=")[2] for line in text.splitlines() if line.startswith(f"#SBATCH --{name}=")]
    return values[0] if values else None


@pytest.fixture
def shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RLCTL_HOME", str(tmp_path))
    monkeypatch.setenv("RLCTL_RUNS_DIR", "/shared/runs")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("vendor", MACHINES)
def test_a_dry_run_on_three_nodes_of_eight_devices_shows_this_script(
    vendor: str, shared: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Golden files; where one must change, delete it: the next run writes it, and fails once."""
    words = ["qwen2.5-7b-grpo", "launch.environment.python=/shared/env/bin/python", "launch.network_interface=ib0"]
    words += ["launch.partition=long", "launch.time_limit=4:00:00", "launch.modules=[gcc]", "--name=first"]
    place = ["--slurm", "--gpus", MACHINES[vendor], "--nodes", "3"]
    assert app.run(["launch", *words, *place, "--dry-run", "-o", "json"]) == 0
    shown = json.loads(capfd.readouterr().out)["submits"]
    text = shown["launch/job.sbatch"].replace(str(shared), "/home/me")
    golden = GOLDEN / f"{vendor}.sbatch"
    if not golden.exists():
        golden.write_text(text)
        pytest.fail(f"wrote {golden}: look at it")
    assert text == golden.read_text()
    assert shown["command"] == "sbatch --parsable /shared/runs/first/launch/job.sbatch"


@pytest.mark.parametrize("environment", ["same", "wheel", "image"])
@pytest.mark.parametrize("container", ["apptainer", "enroot", "podman"])
def test_every_script_is_valid_bash(container: str, environment: str) -> None:
    launch = {"container": {"runtime": container}, "environment": {"type": environment}}
    text = script(order(modules=["gcc"], setup=["ulimit -n 65536"], **launch))
    done = subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True)
    assert (done.returncode, done.stderr) == (0, "")


def prepared(machine: str, environment: dict[str, str], **launch: Any) -> dict[str, str]:
    """Return the variables of a node after the script's own preparation."""
    text = script(order(machine, **launch))
    function = text[text.index("prepare_node() {") : text.index("enter() {")]
    done = subprocess.run(
        ["bash", "-c", f"{function}\nprepare_node && env"], env={"PATH": os.environ["PATH"], **environment},
        text=True, capture_output=True, check=True,
    )  # fmt: skip
    return dict(line.partition("=")[::2] for line in done.stdout.splitlines())


@pytest.mark.parametrize(
    ("machine", "gres", "left"),
    [
        ("h100:8", None, {"CUDA_VISIBLE_DEVICES": "2,3"}),
        ("mi300x:8", None, {"HIP_VISIBLE_DEVICES": "2,3"}),
        ("910b2:8", "gpu:8", {"ASCEND_RT_VISIBLE_DEVICES": "2,3", "CUDA_VISIBLE_DEVICES": "2,3"}),
    ],
)
def test_one_variable_names_the_devices_on_a_node(machine: str, gres: str | None, left: dict[str, str]) -> None:
    found = prepared(machine, SLURM_SETS, gres=gres)
    kept = {name: value for name, value in found.items() if "VISIBLE" in name or name == "GPU_DEVICE_ORDINAL"}
    assert kept == left


@pytest.mark.parametrize("runtime", ["apptainer", "enroot", "podman"])
def test_a_command_enters_the_container_with_folders_devices_and_variables_but_no_secret(
    runtime: str, tmp_path: Path
) -> None:
    """A stand-in for the program shows what it was given."""
    client(tmp_path, runtime, 'for word; do echo "$word"; done')
    text = script(order(environment=IMAGE, container={"runtime": runtime, "mounts": ["/data:/in"]}))
    function = text[text.index("enter() {") : text.index("# What follows")]
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "RAY_AUTH_TOKEN": "secret", "WANDB_API_KEY": "secret"}
    done = subprocess.run(
        ["bash", "-c", f"{function}\nRUN=/shared/runs/first; enter driver 0 -m rlctl_train"], env=environment,
        text=True, capture_output=True, check=True,
    )  # fmt: skip
    words = done.stdout.splitlines()
    script_again = ["bash", "/shared/runs/first/launch/job.sbatch", "inside", "driver", "0", "-m", "rlctl_train"]
    assert words[-7:] == script_again and "my image.sif" in words
    mounts = {word.partition("=")[2] for word in words if word.startswith(("--bind", "--mount", "--volume"))}
    assert {"/shared/runs:/shared/runs", "/home/me:/home/me", "/tmp:/tmp", "/data:/in"} <= mounts
    if runtime != "apptainer":  # which has the caller's environment
        assert {"--env=RAY_AUTH_TOKEN", "--env=WANDB_API_KEY"} <= set(words) and "secret" not in done.stdout


def test_a_setup_line_that_fails_fails_the_node() -> None:
    with pytest.raises(subprocess.CalledProcessError):
        prepared("h100:8", {}, setup=["false", "true"])


@pytest.mark.parametrize(
    ("interface", "route", "address"),
    [
        ("ib0", "", "10.0.0.7"),
        (None, "10.1.0.8 dev eth1 src 10.1.0.7 uid 0", "10.1.0.7"),
        (None, "local 127.0.1.1 dev lo src 127.0.0.1 uid 0", "192.168.0.7"),
    ],
)
def test_the_heads_address_is_the_one_that_other_nodes_reach(
    interface: str | None, route: str, address: str, tmp_path: Path
) -> None:
    client(
        tmp_path, "ip", f'case "$*" in *addr*) echo "2: ib0 inet 10.0.0.7/16 scope global" ;; *) echo {route} ;; esac'
    )
    client(tmp_path, "hostname", "echo 192.168.0.7 172.17.0.1")
    text = script(order(network_interface=interface))
    function = text[text.index("own_address() {") : text.index("address_of() {")]
    line = f"INTERFACE={interface or ''}\n{function}\nown_address 10.1.0.8"
    done = subprocess.run(
        ["bash", "-uc", line], env={"PATH": f"{tmp_path}:{os.environ['PATH']}"}, text=True, capture_output=True
    )
    assert (done.stdout, done.stderr) == (f"{address}\n", "")


def test_what_the_person_sets_beats_what_is_derived() -> None:
    text = script(order(cpus_per_node=12, memory_gib=99.5, gres="gpu:h100:8", qos="high", sbatch=["--mail-type=END"]))
    assert [option(text, name) for name in ("cpus-per-task", "mem", "gres", "qos", "mail-type")] == [
        "12", "100G", "gpu:h100:8", "high", "END",
    ]  # fmt: skip
    assert "--num-cpus=13 --num-gpus=8" in text
    assert option(script(order("cpu:4")), "gres") is None


def test_variables_of_sbatch_do_not_beat_what_the_run_sets() -> None:
    mine = {"SBATCH_PARTITION": "short", "SBATCH_TIMELIMIT": "1", "SBATCH_NO_REQUEUE": "1", "SBATCH_ACCOUNT": "me"}
    asked = order(partition="long", time_limit="60")
    given = sbatch_environment(Order(asked.root, asked.config, asked.plan, asked.cwd, {**mine, "HF_TOKEN": "t"}))
    assert given == {"SBATCH_ACCOUNT": "me", "HF_TOKEN": "t"}


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (["launch.time_limit=soon"], "launch.time_limit=soon (from command line) is not a time"),
        (["launch.time_limit=2"], "launch.save_before_s"),
        (["launch.partition=a b"], "launch.partition"),
        (["launch.sbatch=[mail]"], "launch.sbatch[0]"),
        (["ray.address=h:1"], "ray.address"),
        (["launch.container.runtime=docker"], "launch.container.runtime"),
    ],
)
def test_a_setting_that_slurm_would_refuse_is_refused_here(
    words: list[str], what: str, shared: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    code = app.run(["launch", "quickstart", *words, "--slurm", "--gpus", "cpu:2", "--dry-run"])
    said = capfd.readouterr().err
    assert (code, what in said, "\n  -> " in said) == (2, True, True), said


def client(folder: Path, name: str, line: str) -> None:
    """Put a program of Slurm's into a folder."""
    (folder / name).write_text(f"#!/bin/sh\n{line}\n")
    (folder / name).chmod(0o755)


def test_a_client_that_hangs_is_given_up_with_a_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    client(tmp_path, "scontrol", "echo Slurmctld is UP")
    client(tmp_path, "squeue", "exec sleep 60")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(slurm_client, "ASK_LIMIT_S", 0.1)
    queue = slurm_client.Queue()
    with pytest.raises(slurm_client.SlurmError, match=r"out of reach \(squeue did not answer within 0.1 s") as caught:
        queue.job("1")
    assert caught.value.exit_code == 5
    client(tmp_path, "squeue", "touch asked_again; exec sleep 60")
    with pytest.raises(slurm_client.SlurmError):
        queue.job("1")
    assert not Path("asked_again").exists(), "a silent controller is left alone for a while"


def test_one_question_serves_all_jobs_and_an_old_one_is_looked_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    client(tmp_path, "squeue", "echo asked >> asked; echo '7|PENDING|Resources'; echo '8|RUNNING|None'")
    client(tmp_path, "scontrol", "[ $1 != ping ] || exec echo UP; echo Invalid job id specified >&2; exit 1")
    client(tmp_path, "sacct", "echo 'FAILED|137:0'")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    queue = slurm_client.Queue()
    assert queue.job("7") == slurm_client.JobFacts("PENDING", "Resources")
    assert queue.job("8") == slurm_client.JobFacts("RUNNING", "None")
    assert queue.job("6") == slurm_client.JobFacts("FAILED", "", 137)
    assert Path("asked").read_text() == "asked\n"


@pytest.mark.parametrize(
    ("said", "standing"),
    [
        ("JobState=FAILED Reason=NonZeroExitCode ExitCode=137:0", JobStatus("ended", "failed", 137)),
        ("JobState=COMPLETED Reason=None ExitCode=0:0", JobStatus("ended", "completed", 0)),
        ("JobState=CANCELLED Reason=None ExitCode=0:0", JobStatus("ended", "cancelled")),
        ("JobState=TIMEOUT Reason=TimeLimit ExitCode=0:15", JobStatus("ended", "timeout")),
        ("JobState=REQUEUE_HOLD Reason=job_requeued_in_held_state ExitCode=1:0", HELD),
    ],
)
def test_only_a_job_that_ended_by_itself_has_the_drivers_exit_code(
    said: str, standing: JobStatus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client(tmp_path, "squeue", "")
    client(tmp_path, "scontrol", f"[ $1 != ping ] || exec echo UP; echo JobId=5 {said} TimeLimit=UNLIMITED")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(slurm, "_queue", slurm_client.Queue())
    run = rundir.create(tmp_path, "mine", config={}, plan={}, origin={})
    write_json(run.files.driver, Job("slurm", "5", "here", "/", 0.0).to_json())
    assert SlurmLauncher().status(run) == standing


def test_no_slurm_here_is_said_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(slurm_client.SlurmError, match="scontrol is not installed here") as caught:
        SlurmLauncher().submit(order())
    assert "login node" in caught.value.remedy
