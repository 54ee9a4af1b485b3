"""The shell that runs on the machines, here with processes for nodes: a stand-in driver, and once the real one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rlctl.launchers import sky_log, sky_task
from rlctl_train.config.layout import RunFiles
from rlctl_train.config.parcel import LINE_MARK, unpack
from tests import runs

ONE, NODES = ("folder.sh", "driver.sh"), ("folder.sh", "ray.sh", "driver.sh")
STAND_IN = """#!/bin/bash
# Stands in for `python -m rlctl_train RUN`: says what it finds, waits to be told where asked to, leaves with a code.
[ "$2" = rlctl_train ] || exec "{python}" "$@"
run=$3
echo "hello, checkpoints: $(ls "$run/checkpoints" 2>/dev/null | tr '\\n' ' ')"
echo '{"step": 1, "phase": "train"}' >>"$run/metrics.jsonl"
trap 'echo saved; mkdir -p "$run/checkpoints/step_2"; exit 130' TERM
echo '{"state": "running"}' >"$run/status.json"
while [ "$MODE" = wait ]; do
    sleep 0.1
    [ ! -e "$run/logs/stacks.wanted" ] || { echo "in forward" >"$run/logs/stacks-1.txt"; rm "$run/logs/stacks.wanted"; }
done
mkdir -p "$run/checkpoints/step_1"
exit ${CODE:-0}
"""


def start(
    home: Path, scripts: tuple[str, ...], rank: int = 0, python: str = sys.executable, **variables: str
) -> subprocess.Popen[str]:
    """Run the scripts as SkyPilot would on one node: in a shell with job control."""
    text = "\n".join(["set -m", f"python={python}", *((sky_task.folder() / name).read_text() for name in scripts)])
    given = {
        "HOME": str(home), "RLCTL_RUN": "mine", "RLCTL_BUCKET": "", "RLCTL_GPUS": "0",
        "RLCTL_CPUS": "2", "RLCTL_STORE": "200000000", "SKYPILOT_NODE_RANK": str(rank), "SKYPILOT_TASK_ID": str(home),
        "SKYPILOT_NODE_IPS": "127.0.0.1\n127.0.0.1", "RAY_AUTH_TOKEN": "0" * 64, "RLCTL_KEEP_S": "1",
    }  # fmt: skip
    return subprocess.Popen(
        ["bash", "-c", text], env=os.environ | given | variables, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )  # fmt: skip


@pytest.fixture
def home(tmp_path: Path) -> Path:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").write_text(STAND_IN.replace("{python}", sys.executable))
    (tmp_path / "bin" / "python").chmod(0o755)
    return tmp_path


def stand_in(home: Path, **variables: str) -> subprocess.Popen[str]:
    return start(home, ONE, python=str(home / "bin" / "python"), **variables)


@pytest.mark.parametrize("code", [0, 3])
def test_the_drivers_exit_code_is_the_jobs_and_the_log_has_it_all(code: int, home: Path) -> None:
    process = stand_in(home, CODE=str(code))
    output, _ = process.communicate()
    assert process.returncode == code
    assert "hello, checkpoints:" in output
    assert 'rlctl::metrics {"step": 1, "phase": "train"}' in output and 'rlctl::status {"state": "running"}' in output


def test_a_managed_job_starts_again_for_what_may_go_better_and_no_oftener_than_allowed(home: Path) -> None:
    asked = {"RLCTL_BUCKET": str(home / "bucket"), "RLCTL_MAX_RESTARTS": "2"}

    def code_of(code: int) -> int:
        process = stand_in(home, CODE=str(code), **asked)
        process.communicate()
        return process.returncode

    assert [code_of(code) for code in (4, 3, 2, 0)] == [4, 3, 2, 0]
    assert [code_of(code) for code in (1, 137, 1)] == [75, 75, 1]


def test_the_file_that_rlctl_touches_lets_the_driver_save(home: Path) -> None:
    process = stand_in(home, MODE="wait", RLCTL_RUN=home.name)
    run = home / "rlctl-runs" / home.name
    while not (run / "status.json").exists():
        assert process.poll() is None
        time.sleep(0.05)
    stop = Path(f"/tmp/rlctl-stop-{os.getuid()}-{home.name}")
    stop.touch()
    output, _ = process.communicate()
    assert (process.returncode, "saved" in output, stop.exists()) == (130, True, False)


def test_the_file_that_rlctl_touches_brings_the_stacks_and_a_profile_comes_at_the_end(home: Path) -> None:
    process = stand_in(home, MODE="wait", RLCTL_RUN=home.name)
    run = home / "rlctl-runs" / home.name
    while not (run / "status.json").exists():
        assert process.poll() is None
        time.sleep(0.05)
    (run / "profile" / "step_000003").mkdir(parents=True)
    (run / "profile" / "step_000003" / "actor-0.trace.json.gz").write_bytes(bytes(range(256)) * 200)
    asks = Path(f"/tmp/rlctl-stacks-{os.getuid()}-{home.name}")
    asks.touch()
    assert process.stdout is not None
    said: list[str] = []
    while not (said and said[-1].startswith(f"{LINE_MARK} logs/stacks-1.txt")):
        said.append(process.stdout.readline())
    process.terminate()
    output, _ = process.communicate()
    assert unpack("".join([*said, output]), LINE_MARK)[1] == {
        "logs/stacks-1.txt": b"in forward\n", "profile/step_000003/actor-0.trace.json.gz": bytes(range(256)) * 200,
    }  # fmt: skip
    assert not asks.exists()


def test_sigterm_lets_the_driver_save(home: Path) -> None:
    process = stand_in(home, MODE="wait")
    assert process.stdout is not None
    while "rlctl::status" not in process.stdout.readline():
        assert process.poll() is None
    process.terminate()
    output, _ = process.communicate()
    assert (process.returncode, "saved" in output) == (130, True)


def test_another_machine_goes_on_from_the_bucket(home: Path) -> None:
    bucket = home / "bucket"
    stand_in(home, RLCTL_BUCKET=str(bucket)).communicate()
    shutil.rmtree(home / "rlctl-runs")
    output, _ = stand_in(home, RLCTL_BUCKET=str(bucket)).communicate()
    assert "hello, checkpoints: step_1" in output
    rows = (home / "rlctl-runs" / "mine" / "metrics.jsonl").read_text().splitlines()
    assert len(rows) == 2 and (bucket / "mine" / "metrics.jsonl").read_text().splitlines() == rows


def test_what_a_launch_brings_is_newer_than_what_the_bucket_has(home: Path) -> None:
    run, kept = home / "rlctl-runs" / "mine", home / "bucket" / "mine"
    for folder, text in ((run, "new"), (kept, "old")):
        folder.mkdir(parents=True)
        (folder / "plan.json").write_text(text)
    stand_in(home, RLCTL_BUCKET=str(home / "bucket")).communicate()
    assert (run / "plan.json").read_text() == "new"


@pytest.mark.long
@pytest.mark.timeout(900)
def test_two_nodes_train_over_our_own_ray(tmp_path: Path) -> None:
    shutil.copy(Path(runs.__file__).with_name("digit_reward.py"), tmp_path)
    reward = {"type": "custom", "path": "../digit_reward.py:digits"}  # from the folder of work on every node
    plan = {"trainer_devices": 2, "rollout_devices": 2}
    files = runs.make_run(tmp_path / "rlctl-runs" / "mine", plan=plan, reward=reward)
    nodes = [start(tmp_path, NODES, rank) for rank in (1, 0)]
    output, _ = nodes[1].communicate()
    assert [node.wait() for node in nodes] == [0, 0], output
    sky_log.store("".join(f"(head, rank=0, pid=1) {line}\n" for line in output.splitlines()), RunFiles(tmp_path))
    assert json.loads((tmp_path / "status.json").read_text())["state"] == "done"
    seen = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert seen == [line["step"] for line in map(json.loads, files.metrics.read_text().splitlines())] and max(seen) == 6
