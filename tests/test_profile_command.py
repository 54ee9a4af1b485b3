"""`rlctl profile`: what it asks of the run, what it refuses, and a real run from command to report."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from rlctl import app
from rlctl_train.config.layout import RunFiles
from rlctl_train.profiling.timeline import read_ranges
from tests import runs


@pytest.fixture(autouse=True)
def at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RLCTL_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("RLCTL_RUNS_DIR", str(tmp_path / "runs"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def config_of(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert app.run(["profile", *words, "--dry-run", "-o", "json"]) == 0
    return json.loads(capsys.readouterr().out)["config"]


def test_the_run_is_bounded_and_records_what_was_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    config = config_of(capsys, "quickstart", "--steps", "2:4", "--roles", "actor,rollout", "--ranks", "0,1")
    profile = config["profile"]
    assert (profile["first_step"], profile["last_step"], config["trainer"]["num_steps"]) == (2, 4, 4)
    assert (profile["roles"], profile["ranks"], profile["tool"]) == (["actor", "rollout"], [0, 1], "auto")
    assert not config["checkpoint"]["export_hf"] and config["checkpoint"]["every_steps"] == 0
    everything = config_of(capsys, "quickstart", "--ranks", "all", "seed=7", "profile.shapes=true")
    assert (everything["profile"]["ranks"], everything["seed"], everything["profile"]["shapes"]) == ([], 7, True)


def test_a_runs_own_settings_are_profiled_by_its_name(at_home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = runs.make_run(at_home / "runs" / "mine", algo={"type": "rloo", "group_size": 6}, seed=11)
    files.status.write_text("{}")
    config = config_of(capsys, "mine", "--steps", "2", "--tool", "ranges", "algo.group_size=3")
    assert (config["seed"], config["algo"]["type"], config["algo"]["group_size"]) == (11, "rloo", 3)
    assert (config["profile"]["tool"], config["trainer"]["num_steps"]) == ("ranges", 2)
    assert app.run(["profile", "quickstrat", "--dry-run"]) == 2
    assert "quickstart" in capsys.readouterr().err, "the nearest preset is offered"


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (["--steps", "5:3"], "last_step=3 lies before first_step=5"),
        (["--steps", "a"], "--steps 'a' is neither a step nor FIRST:LAST"),
        (["--ranks", "x"], "--ranks 'x' is not a list of ranks"),
        (["--roles", "actr"], "profile.roles"),
        (["--tool", "gprof"], "profile.tool"),
    ],
)
def test_what_cannot_be_is_refused_with_the_persons_words(
    words: list[str], what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert app.run(["profile", "quickstart", *words, "--dry-run"]) == 2
    assert what in capsys.readouterr().err


def test_a_run_without_a_profile_says_how_to_get_one(at_home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = runs.make_run(at_home / "runs" / "plain")
    files.status.write_text("{}")
    assert app.run(["profile", "report", "plain"]) == 2
    assert "rlctl profile PRESET" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("algo", "num_ranks"),
    [("ppo", 2), *(pytest.param(*case, marks=pytest.mark.long) for case in (("ppo", 1), ("grpo", 1), ("grpo", 2)))],
)
def test_a_profile_adds_up_and_is_shown(
    algo: str, num_ranks: int, at_home: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(Path(__file__).with_name("digit_reward.py"), at_home)
    config = runs.CONFIG | {
        "reward": {"type": "custom", "path": "digit_reward.py:digits"},
        "algo": {"type": algo},
        "trainer": {"num_devices": num_ranks, "prompts_per_step": 8},
    }
    ranks = [f"actor {rank}" for rank in range(num_ranks)]
    (at_home / "tiny.json").write_text(json.dumps(config))
    recorded = ("--steps", "2:3", "--roles", "actor", "--ranks", "all")
    assert app.run(["profile", "-c", "tiny.json", *recorded, "--name", "slow", "-y"]) == 0
    said = capfd.readouterr()
    files = RunFiles(at_home / "runs" / "slow")
    assert "profile/report.html" in said.err and "step 3" in said.out
    traced = sorted(file.name for file in files.profile.glob("step_000002/*.trace.json.gz"))
    assert traced == [f"actor-{rank}.trace.json.gz" for rank in range(num_ranks)]
    assert app.run(["profile", "report", "slow", "-o", "json"]) == 0
    steps = json.loads(capfd.readouterr().out)["steps"]
    assert [step["step"] for step in steps] == [2, 3]
    for step in steps:
        assert 0 <= step["between_s"] < 0.03 * step["seconds"], "the phases are the step"
        phases = {phase["name"]: phase for phase in step["phases"]}
        of_the_critic = {"values", "update_critic"} if algo == "ppo" else set()
        assert {"gen", "update_actor", "update_weights"} | of_the_critic <= set(phases)
        assert list(phases["update_actor"]["busy_s"]) == ranks
        assert set(phases["reward"]["busy_s"]) == set(phases["adv"]["busy_s"]) == {"score 0"}
        assert step["operations"][ranks[-1]]["update_actor"][0]["seconds"] > 0
        assert step["tokens_per_s"] > 0 and step["advice"]
        assert sum(link["seconds"] for link in step["critical"]) <= step["seconds"] * 1.001
        assert len(step["devices"]) == num_ranks and len(step["devices"][0]["workers"]) >= 2
        assert all(0 < one["computed"] <= 1 and one["at_work"] + one["idle"] == 1 for one in step["devices"])
        measured = {one["part"]: one["measured_gib"] for one in step["memory"] if one["phase"] == "actor_update"}
        assert measured["gradients"] > 0 and measured["optimizer"] > measured["gradients"]
        assert phases["update_actor"]["mfu"] is None, "nobody knows the peak of a CPU"
        assert phases["update_actor"]["tflops"] > 0
    _, ranges = read_ranges(files.profile / "step_000003" / "actor-0.ranges.json")
    names = {one.name for one in ranges}
    assert {"actor_update", "micro-batch 1", "forward", "layer 0", "loss", "backward", "optimizer_step"} <= names
    assert "bucket 1" in names
    assert "ray_timeline.trace.json.gz" in said.err
    called = calls_by_process(files.profile / "ray_timeline.trace.json.gz")
    assert {"update", "stop_recording"} <= called[f"actor worker {num_ranks - 1}"] and "generate" in called[
        "rollout worker 0"
    ]
    assert "submit_task" in called["driver"] and "start" not in called["actor worker 0"]
    assert app.run(["profile", "report", "slow", "--compare", "slow"]) == 0
    assert "1.00x" in capfd.readouterr().out


def calls_by_process(trace: Path) -> dict[str, set[str]]:
    """Return the names of the events of each process of a trace, by the process's name without its node."""
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    named = {one["pid"]: one["args"]["name"].partition(" (")[0] for one in events if one["name"] == "process_name"}
    calls = [one for one in events if one["ph"] == "X"]
    return {name: {one["name"] for one in calls if one["pid"] == pid} for pid, name in named.items()}


STAND_INS = Path(__file__).with_name("stand_ins")


def stand_in(tool: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put what stands in for a profiler where the run finds it: a program on PATH, or a package of Python."""
    if tool == "msprof":
        shutil.copytree(STAND_INS / "torch_npu", folder / "torch_npu")
        monkeypatch.setenv("PYTHONPATH", str(folder))
        return
    program = folder / {"nsys": "nsys", "rocprof": "rocprofv3"}[tool]
    program.write_text(f'#!/bin/sh\nexec {sys.executable} {STAND_INS}/programs.py {program.name} "$@"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


@pytest.mark.long
@pytest.mark.parametrize(
    ("tool", "report", "kernel"),
    [
        ("nsys", "actor-0.nsys-rep", "standin_gemm"),
        ("rocprof", "actor-0_*_kernel_trace.csv", "standin_gemm"),
        ("msprof", "step_000002/actor-0_*_ascend_pt", "aclnnMatmul_MatMulCommon_MatMulV2"),
    ],
)
def test_a_vendors_profiler_records_the_chosen_worker_and_its_kernels_are_reported_in_their_phases(
    tool: str, report: str, kernel: str, at_home: Path, capfd: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    """Stand-ins, which refuse what the manuals do not know and write what they document."""
    (at_home / "stand_in").mkdir()
    stand_in(tool, at_home / "stand_in", monkeypatch)
    shutil.copy(Path(__file__).with_name("digit_reward.py"), at_home)
    config = runs.CONFIG | {"reward": {"type": "custom", "path": "digit_reward.py:digits"}}
    (at_home / "tiny.json").write_text(json.dumps(config))
    asked = ("--steps", "1:2", "--roles", "actor", "--name", "under", "-y", f"profile.tool={tool}")
    assert app.run(["profile", "-c", "tiny.json", *asked]) == 0
    assert "cannot" not in capfd.readouterr().err
    files = RunFiles(at_home / "runs" / "under")
    assert len(list(files.profile.glob(report))) == 1
    log = files.driver_log.read_text()
    assert f"profile: {tool}: profile.tool names it" in log and "too few reports" not in log
    assert kernel in (files.profile / "report.html").read_text()
    assert app.run(["profile", "report", "under", "-o", "json"]) == 0
    summary = json.loads(capfd.readouterr().out)
    assert summary["unread"] == [] and [step["step"] for step in summary["steps"]] == [1, 2]
    for step in summary["steps"]:
        assert kernel in [one["name"] for one in step["operations"]["actor 0"]["update_actor"]]
        assert set(step["operations"]) == {"actor 0"}
