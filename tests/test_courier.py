"""The courier on a Ray cluster: the doctor before the driver, a driver that is killed, and one that is to stop."""

from __future__ import annotations

import json
import signal
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from rlctl_train import courier
from rlctl_train.config.layout import RunFiles, write_json
from rlctl_train.config.parcel import LINE_MARK, unpack

STAND_IN = """#!/bin/bash
# For the interpreter: `doctor` ends as the file doctor_code says; a driver does what its number in `drivers` says.
cd "{folder}"
case $2 in
rlctl.app) echo "$*" >>calls; [ ! -e stop_now ] || kill -TERM $PPID; exit "$(cat doctor_code)" ;;
rlctl_train)
    echo driver >>calls
    what=$(sed -n "$(grep -cx driver calls)p" drivers)
    case $what in
    kill) kill -KILL $$ ;;
    stop) kill -TERM $PPID; kill -TERM $$ ;;
    kill_for_good) (cd "{here}"; "{python}" -m rlctl_train.courier kill "$3") ; kill -KILL $$ ;;
    *) exit "$what" ;;
    esac ;;
esac
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A job's working folder with a run in it, and a stand-in for the interpreter."""
    (tmp_path / "run" / "launch").mkdir(parents=True)
    write_json(tmp_path / "run" / "config.json", {"launch": {"max_restarts": 2}})
    write_json(tmp_path / "run" / "launch" / "environment.json", {})
    python = tmp_path / "python"
    python.write_text(STAND_IN.format(folder=tmp_path, here=Path.cwd(), python=sys.executable))
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    (tmp_path / "doctor_code").write_text("0")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    monkeypatch.setattr(courier.sys, "executable", str(python))
    monkeypatch.setattr(courier, "EVERY_S", 0.01)
    before = signal.getsignal(signal.SIGTERM)
    yield tmp_path
    signal.signal(signal.SIGTERM, before)


def calls(place: Path) -> list[str]:
    return (place / "calls").read_text().splitlines()


def test_the_doctor_sees_the_cluster_before_the_driver_starts(place: Path) -> None:
    (place / "drivers").write_text("0\n")
    assert courier.run(place / "there") == 0
    assert calls(place) == [f"-m rlctl.app doctor --run {place / 'there'} --cluster 10.0.0.1:6379", "driver"]
    files = RunFiles(place / "there")
    assert files.environment.is_file() and json.loads(files.status.read_text())["state"] == "pending"


def test_nodes_that_are_not_as_planned_cost_no_training(place: Path) -> None:
    (place / "doctor_code").write_text("4")
    assert courier.run(place / "there") == 4
    assert "driver" not in calls(place)


def test_a_killed_driver_is_started_again_and_its_last_code_counts(
    place: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (place / "drivers").write_text("kill\n3\n")
    assert courier.run(place / "there") == 3
    assert calls(place).count("driver") == 2
    assert "signal 9 ended the driver; started again (1 of 2)" in capfd.readouterr().err


def test_a_driver_that_is_always_killed_is_given_up_after_max_restarts(place: Path) -> None:
    (place / "drivers").write_text("kill\n" * 9)
    assert courier.run(place / "there") == 137
    assert calls(place).count("driver") == 3


@pytest.mark.parametrize(("how", "code"), [("stop", 143), ("kill_for_good", 137), ("1", 1)])
def test_a_driver_that_is_stopped_killed_on_purpose_or_fails_is_not_started_again(
    place: Path, how: str, code: int
) -> None:
    (place / "drivers").write_text(f"{how}\n0\n")
    assert courier.run(place / "there") == code
    assert calls(place).count("driver") == 1


def test_a_stop_while_the_nodes_are_examined_starts_no_driver(place: Path) -> None:
    (place / "stop_now").touch()
    (place / "drivers").write_text("0\n")
    assert courier.run(place / "there") == 143
    assert "driver" not in calls(place)


def test_a_request_is_left_where_the_driver_looks_and_a_wrong_call_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def call(*words: str) -> int:
        monkeypatch.setattr(sys, "argv", ["courier", *words])
        return courier.main()

    files = RunFiles(tmp_path)
    files.logs.mkdir()
    assert call("stacks", str(tmp_path)) == 0 and files.stacks_wanted.exists()
    (files.logs / "stacks-1.txt").write_text("in forward")
    assert call("lines", str(tmp_path), "logs/stacks-*.txt", "profile/**/*") == 0
    assert unpack(capsys.readouterr().out, LINE_MARK) == ("", {"logs/stacks-1.txt": b"in forward"})
    wrong = [(), ("run",), ("lines", str(tmp_path)), ("stacks", str(tmp_path), "more"), ("walk", str(tmp_path))]
    assert [call(*words) for words in wrong] == [2] * len(wrong)
