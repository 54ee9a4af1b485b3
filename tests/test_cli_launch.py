"""Launching, following, stopping and resuming, with a stand-in for the driver process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from rlctl import app, rundir
from rlctl.commands import _watch
from rlctl.doctor import disk
from rlctl.launchers import local
from rlctl.problems import InvalidConfig
from rlctl_train.config import RunConfig
from rlctl_train.config.layout import RunFiles

Cli = Callable[..., tuple[int, str, str]]

STAND_IN = """
import json, os, signal, sys, time
from pathlib import Path
folder, mode = Path(sys.argv[1]), os.environ.get("STAND_IN", "")
asked = []
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda *_: asked.append(1))
def status(state, **more):
    new = folder / ".new"
    new.write_text(json.dumps({"schema_version": 1, "state": state, "phase": "generate", "num_steps": 2, **more}))
    new.replace(folder / "status.json")
print("hello from the driver", flush=True)
status("running", step=1)
with (folder / "metrics.jsonl").open("a") as file:
    for step in (1, 2):
        row = {"step": step, "phase": "train", "critic/score/mean": 0.5, "timing_s/step": 0.1}
        file.write(json.dumps(row | {"time": time.time()}) + "\\n")
    row = {"step": 2, "phase": "checkpoint", "timing_s/save_checkpoint": 0.1}
    file.write(json.dumps(row | {"time": time.time()}) + "\\n")
if mode == "fail":
    status("failed", step=1, error={"what": "no GPU left", "remedy": "wait for one"})
    sys.exit(4)
if mode == "crash":
    raise RuntimeError("out of luck")
while mode in ("wait", "deaf") and (mode == "deaf" or not asked):
    time.sleep(0.01)
if asked:
    status("stopped", step=1)
    sys.exit(130)
(folder / "summary.json").write_text(json.dumps({"val_accuracy_start": 0.25, "val_accuracy_end": 0.9, "wall_s": 61}))
(folder / "report.html").write_text("<html>")
status("done", step=2)
"""


@pytest.fixture(autouse=True)
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    script = tmp_path / "stand_in.py"
    script.write_text(STAND_IN)
    monkeypatch.setattr(local, "DOOR", (sys.executable, str(script)))
    monkeypatch.setattr(local.LocalLauncher, "poll_s", 0.01)
    monkeypatch.setattr(_watch, "POLL_S", 0.01)
    monkeypatch.setenv("RLCTL_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("RLCTL_RUNS_DIR", str(tmp_path / "runs"))
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "runs"


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str]) -> Cli:
    def call(*words: str) -> tuple[int, str, str]:
        code = app.run(words)
        done = capfd.readouterr()
        return code, done.out, done.err

    return call


def wait_for_the_driver(folder: Path) -> None:
    """Wait until the stand-in listens to signals: what it prints comes after."""
    log = folder / "logs" / "driver.log"
    while "hello" not in log.read_text():
        assert rundir.Run(RunFiles(folder)).status().state not in rundir.ENDED


def test_a_launch_writes_the_folder_and_follows_to_the_end(stand_in: Path, cli: Cli) -> None:
    code, out, err = cli(
        "launch", "quickstart", "trainer.num_steps=2", "trainer.optim.warmup_steps=0", "--name", "first"
    )
    assert (code, out) == (0, ""), err
    assert "step 1/2  reward 0.5" in err and "step 2/2" in err
    assert "done in 1 min 01 s: held-out accuracy 0.25 -> 0.9" in err
    assert "report.html" in err and "rlctl runs show first" in err
    folder = stand_in / "first"
    assert RunConfig.model_validate_json((folder / "config.json").read_text()).trainer.num_steps == 2
    origin = json.loads((folder / "origin.json").read_text())
    assert origin["values"]["trainer.num_steps"] == {"value": 2, "source": "command line"}
    assert json.loads((folder / "plan.json").read_text())["device"] == "cpu"
    assert (folder / "logs" / "driver.log").read_text() == "hello from the driver\n"


def test_a_run_is_named_after_its_preset_when_nobody_names_it(stand_in: Path, cli: Cli) -> None:
    assert cli("launch", "quickstart-sft")[0] == 0
    assert [run.name.rsplit("-", 2)[0] for run in rundir.every(stand_in)] == ["quickstart-sft"]


def test_a_dry_run_writes_nothing(stand_in: Path, cli: Cli) -> None:
    code, out, err = cli("launch", "quickstart", "--dry-run")
    assert code == 0
    assert "engine.max_tokens_per_micro_batch" in out and "would submit, command:" in err
    assert str(stand_in / "quickstart-") in out
    assert not stand_in.exists()


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (["--slurm", "--local"], "--local and --slurm name two places"),
        (["--slurm"], "launch.machine is unset"),
        (["--slurm", "--gpus", "H1OO:8"], "launch.machine=H1OO:8"),
        (["--gpus", "H100:8"], "launch.machine"),
        (["--spot"], "launch.spot"),
    ],
    ids=str,
)
def test_a_place_that_cannot_be_meant_is_refused(words: list[str], what: str, stand_in: Path, cli: Cli) -> None:
    code, out, err = cli("launch", "quickstart", *words)
    assert (code, out) == (2, "") and what in err and "\n  -> " in err
    assert not stand_in.exists()


def test_the_drivers_failure_is_told_with_its_exit_code(monkeypatch: pytest.MonkeyPatch, cli: Cli) -> None:
    monkeypatch.setenv("STAND_IN", "fail")
    code, _, err = cli("launch", "quickstart", "--name", "bad")
    assert code == 4
    assert err.endswith("error: run bad failed: no GPU left\n  -> wait for one\n")


def test_a_crash_shows_the_end_of_the_log_and_leaves_the_run_lost(monkeypatch: pytest.MonkeyPatch, cli: Cli) -> None:
    monkeypatch.setenv("STAND_IN", "crash")
    code, _, err = cli("launch", "quickstart", "--name", "bad")
    assert code == 1
    assert "RuntimeError: out of luck" in err and "rlctl runs resume bad" in err
    _, out, _ = cli("runs", "ls", "-o", "json")
    assert [run["state"] for run in json.loads(out)["runs"]] == ["lost"]


def test_a_detached_run_can_be_stopped_and_resumed(stand_in: Path, monkeypatch: pytest.MonkeyPatch, cli: Cli) -> None:
    monkeypatch.setenv("STAND_IN", "wait")
    code, _, err = cli("launch", "quickstart", "--name", "long", "--detach")
    assert (code, "rlctl runs logs -f long" in err) == (0, True)
    wait_for_the_driver(stand_in / "long")
    code, _, err = cli("runs", "resume", "long")
    assert (code, "already running" in err) == (2, True)
    code, _, err = cli("runs", "stop", "long")
    assert (code, "rlctl runs resume long" in err) == (0, True)
    monkeypatch.setenv("STAND_IN", "")
    code, _, err = cli("runs", "resume", "long")
    assert (code, "done in" in err) == (0, True)
    code, _, err = cli("runs", "resume", "long")
    assert (code, "is done" in err) == (2, True)
    assert cli("runs", "logs", "long", "-n", "1")[1] == "hello from the driver\n"


def test_a_resume_with_settings_says_what_changes_and_keeps_what_was(
    stand_in: Path, monkeypatch: pytest.MonkeyPatch, cli: Cli
) -> None:
    monkeypatch.setenv("STAND_IN", "wait")
    cli("launch", "quickstart", "--name", "long", "--detach")
    folder = stand_in / "long"
    wait_for_the_driver(folder)
    words = ("runs", "resume", "long", "--engine.max_tokens_per_micro_batch", "512")
    assert cli(*words)[0] == 2, "it is running"
    cli("runs", "stop", "long")
    monkeypatch.setenv("STAND_IN", "")
    before = (folder / "plan.json").read_text()
    code, _, err = cli("runs", "resume", "long", "--dry-run")
    assert (code, "its plan stays as it is" in err) == (0, True)
    code, _, err = cli(*words, "--dry-run")
    assert (code, "engine.max_tokens_per_micro_batch: null -> 512" in err) == (0, True)
    assert (folder / "plan.json").read_text() == before and not (folder / "history").exists()
    code, _, err = cli(*words)
    assert (code, "done in" in err) == (0, True)
    assert "as before: 64 prompt(s) x 8 response(s) a step, in 2 mini-batch(es)" in err
    assert json.loads((folder / "plan.json").read_text())["max_tokens_per_micro_batch"] == 512
    assert json.loads((folder / "config.json").read_text())["engine"]["max_tokens_per_micro_batch"] == 512
    assert (folder / "history" / "1" / "plan.json").read_text() == before


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (["algo.group_size=4"], "changes what the run learns (it began with 8)"),
        (["--hw", "h100-80gb:2"], "engine.compute_dtype=bfloat16, but the run has used float32"),
        (["--hw", "cpu:4096"], "--hw cpu:4096 asks for 4096 x cpu, and this machine has"),
        (["trainer.num_device=2"], "is not a setting"),
        (["second"], "unexpected argument 'second'"),
    ],
)
def test_a_resume_that_cannot_be_is_refused_before_anything_is_written(
    stand_in: Path, monkeypatch: pytest.MonkeyPatch, cli: Cli, words: list[str], what: str
) -> None:
    monkeypatch.setenv("STAND_IN", "crash")
    cli("launch", "quickstart", "--name", "mine")
    code, _, err = cli("runs", "resume", "mine", *words)
    assert (code, what in err) == (2, True)
    assert not (stand_in / "mine" / "history").exists()


def test_a_resume_from_another_folder_plans_where_the_run_was_started(
    stand_in: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Cli
) -> None:
    monkeypatch.setenv("STAND_IN", "crash")
    model_folder(tmp_path / "own", "config.json", "tokenizer.json", "model.safetensors")
    cli("launch", "quickstart", "model.type=pretrained", "model.path=./own", "--name", "mine")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    code, _, err = cli("runs", "resume", "mine", "checkpoint.keep_last=5", "--dry-run")
    assert (code, "checkpoint.keep_last: 2 -> 5" in err) == (0, True)


def test_what_does_not_stop_is_said_and_can_be_killed(
    stand_in: Path, monkeypatch: pytest.MonkeyPatch, cli: Cli
) -> None:
    monkeypatch.setenv("STAND_IN", "deaf")
    cli("launch", "quickstart", "--name", "deaf", "--detach")
    wait_for_the_driver(stand_in / "deaf")
    code, _, err = cli("runs", "stop", "deaf", "--timeout", "0")
    assert (code, "--force" in err) == (1, True)
    code, _, err = cli("runs", "stop", "deaf", "--timeout", "0", "--force")
    assert (code, "killed deaf" in err) == (0, True)


def test_ctrl_c_asks_once_to_save_and_gives_130(stand_in: Path, monkeypatch: pytest.MonkeyPatch, cli: Cli) -> None:
    monkeypatch.setenv("STAND_IN", "wait")
    polls = []

    def press_once(run: rundir.Run) -> rundir.Status:
        status = told(run)
        if status.state == "running" and not polls:
            polls.append(1)
            signal.raise_signal(signal.SIGINT)
        return status

    told = rundir.Run.status
    monkeypatch.setattr(rundir.Run, "status", press_once)
    before = signal.getsignal(signal.SIGINT)
    code, _, err = cli("launch", "quickstart", "--name", "mine")
    assert code == 130
    assert err.count("saving; press again to kill") == 1
    assert "saved: `rlctl runs resume mine`" in err
    assert signal.getsignal(signal.SIGINT) is before


def test_a_second_ctrl_c_kills_what_does_not_leave(monkeypatch: pytest.MonkeyPatch, cli: Cli) -> None:
    monkeypatch.setenv("STAND_IN", "deaf")
    monkeypatch.setattr(_watch, "KILL_AFTER_S", 0.0)

    def press(run: rundir.Run) -> rundir.Status:
        status = told(run)
        if status.state == "running":
            signal.raise_signal(signal.SIGINT)
        return status

    told = rundir.Run.status
    monkeypatch.setattr(rundir.Run, "status", press)
    code, _, err = cli("launch", "quickstart", "--name", "mine")
    assert code == 130
    assert "stopped before it could save" in err


def test_a_driver_that_cannot_start_leaves_no_folder(stand_in: Path, monkeypatch: pytest.MonkeyPatch, cli: Cli) -> None:
    monkeypatch.setattr(local, "DOOR", ("/no/such/python",))
    code, _, err = cli("launch", "quickstart", "--name", "mine")
    assert (code, "cannot be started" in err) == (5, True)
    assert list(stand_in.iterdir()) == []


def test_show_ends_with_curves_and_the_report(cli: Cli) -> None:
    cli("launch", "quickstart", "--name", "first")
    code, out, _ = cli("runs", "show", "first")
    assert code == 0
    assert "report.html" in out and "val_accuracy_end" in out
    assert "┤" in out


def test_diff_of_runs_names_settings_and_totals(cli: Cli) -> None:
    for name, steps in (("a", "2"), ("b", "3")):
        cli("launch", "quickstart", "--name", name, f"trainer.num_steps={steps}", "trainer.optim.warmup_steps=0")
    _, out, _ = cli("runs", "diff", "a", "b", "-o", "json")
    found = json.loads(out)
    assert found["settings"] == [{"key": "trainer.num_steps", "first": 2, "second": 3}]
    assert {"key": "val_accuracy_end", "first": 0.9, "second": 0.9} in found["summary"]


def model_folder(path: Path, *names: str) -> Path:
    path.mkdir()
    shape = {
        "model_type": "qwen2", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "intermediate_size": 64, "vocab_size": 100, "max_position_embeddings": 512,
    }  # fmt: skip
    for name in names:
        (path / name).write_text(json.dumps(shape))
    return path


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (["data.type=parquet", "data.train=no.parquet"], "data.train=no.parquet: there is no such file"),
        (["data.type=parquet", "data.train=bad.parquet"], "this is not a whole parquet file"),
        (["data.type=parquet", "data.train=empty"], "holds no parquet file"),
        (["model.type=pretrained", "model.path=./bare"], "has no tokenizer"),
        (["model.type=pretrained", "model.path=./weightless"], "has no safetensors"),
        (["reward.path=no.py:score"], "no such file: no.py"),
        (["reward.path=broken.py:score"], "broken.py does not import: ValueError: oh"),
        (["reward.path=fine.py:scor"], "did you mean 'score'"),
        (["reward.path=fine.py:NUMBER"], "is not a function"),
        (["telemetry.trackers=swanlab"], "swanlab is not installed"),
    ],
)
def test_preflight_stops_with_code_4_and_writes_nothing(
    words: list[str], what: str, stand_in: Path, tmp_path: Path, cli: Cli
) -> None:
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 and then nothing")
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.py").write_text("raise ValueError('oh')")
    (tmp_path / "fine.py").write_text("NUMBER = 3\ndef score(response, ground_truth): return 1.0\n")
    model_folder(tmp_path / "bare", "config.json", "model.safetensors")
    model_folder(tmp_path / "weightless", "config.json", "tokenizer.json")
    code, out, err = cli("launch", "quickstart", *words, "-y")
    *_, first, second = err.splitlines()
    assert (code, out) == (4, "")
    assert first.startswith("error: ") and what in first
    assert second.startswith("  -> ")
    assert not stand_in.exists()


def test_a_full_disk_is_found_before_the_start(monkeypatch: pytest.MonkeyPatch, cli: Cli) -> None:
    monkeypatch.setattr(disk, "SPARE_BYTES", 2**80)
    code, _, err = cli("launch", "quickstart")
    assert (code, "GiB free" in err) == (4, True)


def test_errors_survive_a_pickle_round_trip() -> None:
    """They cross process boundaries in tests and pools."""
    import pickle

    from rlctl.problems import Finding

    error = pickle.loads(pickle.dumps(InvalidConfig([Finding("a", 1, "x", "is bad", "mend it")])))
    assert error.findings[0].key == "a"


def test_sigterm_of_the_front_desk_reaches_the_driver(stand_in: Path, tmp_path: Path) -> None:
    """As a scheduler ends a job: the command gets SIGTERM and the driver saves."""
    script = (
        "import sys; from rlctl.launchers import local; from rlctl.app import main; "
        f"local.DOOR = (sys.executable, {str(tmp_path / 'stand_in.py')!r}); "
        "main(['launch', 'quickstart', '--name', 'mine'])"
    )
    environment = {**os.environ, "STAND_IN": "wait"}
    process = subprocess.Popen([sys.executable, "-c", script], env=environment, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    while "step 2" not in process.stderr.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert "saved: `rlctl runs resume mine`" in process.stderr.read()
    assert process.wait() == 130
