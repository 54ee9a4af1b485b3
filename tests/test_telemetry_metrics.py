"""metrics.jsonl: one valid line a step, and a resume that goes on exactly where it should."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rlctl_train.config.errors import PREFLIGHT, UserError
from rlctl_train.config.layout import RunFiles
from rlctl_train.telemetry import trackers
from rlctl_train.telemetry.metrics import MetricsWriter, Phase, keep_lines_until, read_metrics


def writer(root: Path, *names: str, resume_step: int | None = None) -> MetricsWriter:
    return MetricsWriter(RunFiles(root), names, "project", "run", resume_step)


def steps(root: Path) -> list[tuple[str, int]]:
    return [(line["phase"], line["step"]) for line in read_metrics(RunFiles(root).metrics)]


def test_every_line_is_readable_the_moment_it_is_logged(tmp_path: Path) -> None:
    open_writer = writer(tmp_path)
    open_writer.log(3, "train", {"actor/lr": 0.5})
    line = json.loads(RunFiles(tmp_path).metrics.read_text())
    open_writer.close()
    assert (line["step"], line["phase"], line["actor/lr"]) == (3, "train", 0.5)


def test_numbers_json_cannot_hold_are_named_and_left_out(tmp_path: Path) -> None:
    w = writer(tmp_path)
    w.log(1, "train", {"actor/loss": float("nan"), "actor/lr": 1, "actor/grad_norm": float("-inf")})
    w.close()
    text = RunFiles(tmp_path).metrics.read_text()
    line = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert line["non_finite"] == {"actor/loss": "nan", "actor/grad_norm": "-inf"}
    assert line["actor/lr"] == 1.0 and "actor/loss" not in line


def test_resume_drops_what_was_written_beyond_the_checkpoint(tmp_path: Path) -> None:
    w = writer(tmp_path)
    for step in (1, 2, 3, 4):
        w.log(step, "train", {})
    w.close()
    w = writer(tmp_path, resume_step=2)
    w.log(3, "train", {})
    w.close()
    assert steps(tmp_path) == [("train", 1), ("train", 2), ("train", 3)]


def test_resume_keeps_the_warm_start_whose_steps_are_negative(tmp_path: Path) -> None:
    w = writer(tmp_path)
    events: list[tuple[Phase, int]] = [
        ("warm_start", -2),
        ("warm_start", -1),
        ("validation", 0),
        ("train", 1),
        ("train", 2),
    ]
    for phase, step in events:
        w.log(step, phase, {})
    w.close()
    keep_lines_until(RunFiles(tmp_path).metrics, 1)
    assert steps(tmp_path) == events[:-1]


def test_a_torn_last_line_disappears_on_resume(tmp_path: Path) -> None:
    metrics = RunFiles(tmp_path).metrics
    metrics.write_text('{"step": 1, "phase": "train", "time": 0.0}\n{"step": 2, "pha')
    w = writer(tmp_path, resume_step=5)
    w.log(2, "train", {})
    w.close()
    assert steps(tmp_path) == [("train", 1), ("train", 2)]


def test_a_fresh_run_begins_with_an_empty_file(tmp_path: Path) -> None:
    RunFiles(tmp_path).metrics.write_text('{"step": 1, "phase": "train", "time": 0.0}\n')
    writer(tmp_path).close()
    assert steps(tmp_path) == []


def test_a_crash_while_cutting_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    metrics = RunFiles(tmp_path).metrics
    metrics.write_text('{"step": 9, "phase": "train", "time": 0.0}\n')

    def crash(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("rlctl_train.telemetry.metrics.os.fsync", crash)
    with pytest.raises(KeyboardInterrupt):
        keep_lines_until(metrics, 1)
    assert steps(tmp_path) == [("train", 9)]


def test_tensorboard_receives_every_metric_and_forgets_dropped_steps(tmp_path: Path) -> None:
    w = writer(tmp_path, "tensorboard")
    for step in (1, 2, 3):
        w.log(step, "train", {"val-core/sums/acc/mean@1": step / 10})
    w.log(-1, "warm_start", {"train/loss": 2.0})
    w.close()
    w = writer(tmp_path, "tensorboard", resume_step=1)
    w.log(2, "train", {"val-core/sums/acc/mean@1": 0.9})
    w.close()
    events = EventAccumulator(str(RunFiles(tmp_path).tensorboard)).Reload()
    points = [(e.step, round(e.value, 3)) for e in events.Scalars("val-core/sums/acc/mean@1")]
    assert points == [(1, 0.1), (2, 0.9)]
    assert events.Scalars("warm_start/train/loss")[0].step == -1


@pytest.mark.parametrize("name", ["wandb", "mlflow", "swanlab", "tensorboard"])
def test_a_tracker_that_is_not_installed_says_how_to_install_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def missing(package: str) -> object:
        raise ModuleNotFoundError(f"No module named {package!r}", name=package)

    monkeypatch.setattr(trackers.importlib, "import_module", missing)
    RunFiles(tmp_path).metrics.write_text("as it was\n")
    with pytest.raises(UserError) as caught:
        writer(tmp_path, name)
    assert caught.value.exit_code == PREFLIGHT
    assert f"pip install {name}" in caught.value.remedy
    assert RunFiles(tmp_path).metrics.read_text() == "as it was\n"


def test_trackers_already_open_are_closed_when_a_later_one_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[str] = []

    class Fine:
        def __init__(self, run: trackers.RunLabel) -> None: ...

        def close(self) -> None:
            closed.append("fine")

    def refuse(run: trackers.RunLabel) -> None:
        raise UserError("no", "yes")

    monkeypatch.setattr(trackers, "TRACKERS", {"fine": Fine, "bad": refuse})
    with pytest.raises(UserError):
        trackers.open_trackers(["fine", "bad"], RunFiles(tmp_path), "project", "run", None)
    assert closed == ["fine"]


def test_a_run_keeps_its_tracker_id_when_resumed(tmp_path: Path) -> None:
    first = trackers.RunLabel(RunFiles(tmp_path), "project", "run", None)
    again = trackers.RunLabel(RunFiles(tmp_path), "project", "run", 10)
    other = trackers.RunLabel(RunFiles(tmp_path / "other"), "project", "run", None)
    assert first.id == again.id != other.id
