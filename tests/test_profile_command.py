"""`rlctl profile`: what it asks of the run, what it refuses, and a real run from command to report."""

from __future__ import annotations

import gzip
import json
import os
import shutil
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
def test_a_profile_of_ppo_on_two_ranks_adds_up_and_is_shown(at_home: Path, capfd: pytest.CaptureFixture[str]) -> None:
    shutil.copy(Path(__file__).with_name("digit_reward.py"), at_home)
    config = runs.CONFIG | {
        "reward": {"type": "custom", "path": "digit_reward.py:digits"},
        "algo": {"type": "ppo"},
        "trainer": {"num_devices": 2, "prompts_per_step": 8},
    }
    (at_home / "tiny.json").write_text(json.dumps(config))
    recorded = ("--steps", "2:3", "--roles", "actor", "--ranks", "all")
    assert app.run(["profile", "-c", "tiny.json", *recorded, "--name", "slow", "-y"]) == 0
    said = capfd.readouterr()
    files = RunFiles(at_home / "runs" / "slow")
    assert "profile/report.html" in said.err and "step 3" in said.out
    traced = sorted(file.name for file in files.profile.glob("step_000002/*.trace.json.gz"))
    assert traced == ["actor-0.trace.json.gz", "actor-1.trace.json.gz"]
    assert app.run(["profile", "report", "slow", "-o", "json"]) == 0
    steps = json.loads(capfd.readouterr().out)["steps"]
    assert [step["step"] for step in steps] == [2, 3]
    for step in steps:
        assert 0 <= step["between_s"] < 0.03 * step["seconds"], "the phases are the step"
        phases = {phase["name"]: phase for phase in step["phases"]}
        assert {"gen", "values", "update_actor", "update_critic", "update_weights"} <= set(phases)
        assert set(phases["update_actor"]["busy_s"]) == {"actor 0", "actor 1"}
        assert set(phases["reward"]["busy_s"]) == set(phases["adv"]["busy_s"]) == {"score 0"}
        assert step["operations"]["actor 1"]["update_actor"][0]["seconds"] > 0
        assert step["tokens_per_s"] > 0 and step["advice"]
    _, ranges = read_ranges(files.profile / "step_000003" / "actor-0.ranges.json")
    names = {one.name for one in ranges}
    assert {"actor_update", "micro-batch 1", "forward", "layer 0", "loss", "backward", "optimizer_step"} <= names
    assert "bucket 1" in names
    assert "ray_timeline.trace.json.gz" in said.err
    called = calls_by_process(files.profile / "ray_timeline.trace.json.gz")
    assert {"update", "stop_recording"} <= called["actor worker 1"] and "generate" in called["rollout worker 0"]
    assert "submit_task" in called["driver"] and "start" not in called["actor worker 0"]
    assert app.run(["profile", "report", "slow", "--compare", "slow"]) == 0
    assert "1.00x" in capfd.readouterr().out


def calls_by_process(trace: Path) -> dict[str, set[str]]:
    """Return the names of the events of each process of a trace, by the process's name without its node."""
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    named = {one["pid"]: one["args"]["name"].partition(" (")[0] for one in events if one["name"] == "process_name"}
    calls = [one for one in events if one["ph"] == "X"]
    return {name: {one["name"] for one in calls if one["pid"] == pid} for pid, name in named.items()}


STAND_IN = """#!/bin/sh
# In place of Nsight Systems: runs what it is given, and writes its report once that has ended.
[ "$1" = profile ] || { echo "no such switch here" >&2; exit 2; }
shift
while :; do
    case "$1" in
        --output=*) output=${1#--output=}; shift ;;
        --*) shift ;;
        *) break ;;
    esac
done
"$@"
sleep 1
echo "$@" > "$output.nsys-rep"
"""


@pytest.mark.long
def test_nsys_goes_around_the_chosen_worker_and_its_report_is_awaited(
    at_home: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in for nsys; what is asked of the real one is held against its manual in test_profiling_tools."""
    program = at_home / "bin" / "nsys"
    program.parent.mkdir()
    program.write_text(STAND_IN)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    shutil.copy(Path(__file__).with_name("digit_reward.py"), at_home)
    config = runs.CONFIG | {"reward": {"type": "custom", "path": "digit_reward.py:digits"}}
    (at_home / "tiny.json").write_text(json.dumps(config))
    asked = ("--steps", "1:2", "--tool", "nsys", "--roles", "actor", "--name", "under", "-y")
    assert app.run(["profile", "-c", "tiny.json", *asked]) == 0
    said = capfd.readouterr()
    files = RunFiles(at_home / "runs" / "under")
    (report,) = files.profile.glob("*.nsys-rep")
    assert report.name == "actor-0.nsys-rep" and "default_worker.py" in report.read_text()
    assert "cannot export" in said.err and "no such switch here" in said.err
    assert "profile: nsys: profile.tool names it" in files.driver_log.read_text()
    assert "update_actor" in said.out
