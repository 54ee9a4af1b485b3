"""A run through the real SkyPilot, onto a real Slurm of two nodes on this machine: launch, follow, logs, give back."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import runs, sky_slurm

pytestmark = [pytest.mark.cloud, pytest.mark.timeout(1500)]

NAME = "tiny"
DIGITS = Path(runs.__file__).with_name("digit_reward.py")


@pytest.fixture(scope="module")
def cloud(tmp_path_factory: pytest.TempPathFactory) -> Iterator[sky_slurm.SkyOnSlurm]:
    if (reason := sky_slurm.why_not()) is not None:
        pytest.skip(reason)
    # A short path: sockets below it must not be longer than 107 characters.
    root = tmp_path_factory.mktemp("s")
    with sky_slurm.running(root, Path(os.environ["RLCTL_SKY"])) as made:
        made.prepare(f"rlctl-{NAME}")
        yield made


def rlctl(cloud: sky_slurm.SkyOnSlurm, *words: str) -> str:
    """Call the command as a person would, and return both of its outputs."""
    work = cloud.root / "work"
    environment = os.environ | cloud.environment | {"RLCTL_RUNS_DIR": str(cloud.root / "runs")}
    done = subprocess.run(
        [sys.executable, "-m", "rlctl.app", *words], cwd=work, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_two_nodes_train_and_come_home(cloud: sky_slurm.SkyOnSlurm) -> None:
    work = cloud.root / "work"
    work.mkdir()
    shutil.copy(DIGITS, work)
    config = runs.CONFIG | {"reward": {"type": "custom", "path": f"{DIGITS.name}:digits"}}
    # More processes than one node has cores for.
    config["trainer"] = {**config["trainer"], "num_devices": 3, "prompts_per_step": 6}
    config["rollout"] = {**config["rollout"], "num_devices": 3}
    envs = {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    config["launch"] = {"type": "cloud", "environment": {"type": "same"}, "envs": envs}
    (work / "tiny.json").write_text(json.dumps(config))
    place = f"launch.infra=slurm/{sky_slurm.NAME}/batch"
    said = rlctl(cloud, "launch", "tiny.json", "--gpus", "cpu:2", "--nodes", "2", place, "--name", NAME, "-y")
    assert "takes    2 machine(s) with 2 CPU cores each" in said and "step 6/6" in said and "done in" in said
    status = json.loads((cloud.root / "runs" / NAME / "status.json").read_text())
    assert (status["state"], status["step"]) == ("done", 6)
    assert "rlctl::" not in rlctl(cloud, "runs", "logs", NAME)
    assert cloud.slurm.ask("squeue", "-h") != ""
    rlctl(cloud, "runs", "stop", NAME, "--force", "-y")
    assert cloud.slurm.ask("squeue", "-h", "-t", "running") == ""
