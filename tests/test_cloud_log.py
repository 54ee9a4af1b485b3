"""A run read from its job's log: what SkyPilot writes around it, repetitions, and lines that were cut."""

from __future__ import annotations

import json
from pathlib import Path

from rlctl.launchers import sky_log
from rlctl_train.config.layout import RunFiles
from rlctl_train.config.parcel import LINE_MARK, pack

HEAD = "(head, rank=0, pid=12, ip=10.0.0.1) "
LOG = f"""Tailing logs of job 1 on cluster 'rlctl-x'...
├── Waiting for task resources on 2 nodes.
{HEAD}hello from the driver
(worker1, rank=1, pid=7, ip=10.0.0.2) joined
{HEAD}rlctl::status {{"state": "running", "step": 1}}
{HEAD}rlctl::metrics {{"step": 1, "phase": "train", "critic/score/mean": 0.25}}
{HEAD}rlctl::metrics {{"step": 2, "phase": "train", "critic/score/mean": 0.5}}
{HEAD}rlctl::metrics {{"step": 2, "phase": "train", "critic/score/mean": 0.75}}
{HEAD}rlctl::metrics {{"step": 3, "pha
(worker1, rank=1, pid=7, ip=10.0.0.2) rlctl::doctor {{"node": 1, "host": "b"}}
{HEAD}rlctl::summary {{"val_accuracy_end": 1.0}}
{HEAD}rlctl::status {{"state": "done", "step": 2, "exit_code": 0}}
✓ Job finished (status: SUCCEEDED).
"""


def test_a_log_becomes_a_run_folder(tmp_path: Path) -> None:
    files = RunFiles(tmp_path)
    sky_log.store(LOG, files)
    assert files.driver_log.read_text() == 'hello from the driver\njoined\nrlctl::metrics {"step": 3, "pha\n'
    rows = [json.loads(line) for line in files.metrics.read_text().splitlines()]
    assert [(row["step"], row["critic/score/mean"]) for row in rows] == [(1, 0.25), (2, 0.75)]
    assert json.loads(files.status.read_text())["state"] == "done"
    assert json.loads((files.doctor / "node-1.json").read_text())["host"] == "b"
    assert json.loads(files.summary.read_text()) == {"val_accuracy_end": 1.0}


def test_a_job_of_one_node_has_another_prefix(tmp_path: Path) -> None:
    sky_log.store("(rlctl-mine, pid=3366) hello\n", RunFiles(tmp_path))
    assert RunFiles(tmp_path).driver_log.read_text() == "hello\n"


def test_a_log_without_lines_of_the_run_is_kept_whole(tmp_path: Path) -> None:
    sky_log.store("no module named torch\nJob 1's setup failed\n", RunFiles(tmp_path))
    assert RunFiles(tmp_path).driver_log.read_text() == "no module named torch\nJob 1's setup failed\n"


def test_what_an_earlier_job_printed_stays(tmp_path: Path) -> None:
    files = RunFiles(tmp_path)
    sky_log.store("(rlctl-x, pid=1) first\n", files)
    for more in ("", "(rlctl-x, pid=2) third\n"):
        sky_log.store("(rlctl-x, pid=2) second\n" + more, files, before=len("first\n"))
    assert files.driver_log.read_text() == "first\nsecond\nthird\n"


def test_a_log_read_again_leaves_the_files_alone(tmp_path: Path) -> None:
    files = RunFiles(tmp_path)
    sky_log.store(LOG, files)
    before = files.metrics.stat().st_ino, files.driver_log.stat().st_ino
    sky_log.store(LOG, files)
    assert (files.metrics.stat().st_ino, files.driver_log.stat().st_ino) == before


def test_files_come_within_the_log_and_none_leads_out_of_the_run(tmp_path: Path) -> None:
    data = bytes(range(256)) * 3
    pieces = [pack("profile/step_000003/a.trace.json.gz", at, data[at : at + 500], LINE_MARK) for at in (0, 500)]
    evil = pack("../evil", 0, b"x", LINE_MARK)
    text = "".join(f"{HEAD}{line}" for line in (*pieces, evil, "hello\n", "rlctl::file broken\n"))
    files = RunFiles(tmp_path / "run")
    files.root.mkdir()
    sky_log.store(text, files)
    assert (files.profile / "step_000003" / "a.trace.json.gz").read_bytes() == data
    assert files.driver_log.read_text() == "hello\n"
    assert not list(tmp_path.rglob("evil"))
