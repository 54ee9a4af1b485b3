"""Profilers around a worker: which is taken and why, their command lines, and what is read of what they write."""

from __future__ import annotations

import json
import shlex
import sqlite3
import sys
import threading
import time
from pathlib import Path
from typing import Any, get_args

import pytest

from rlctl_train import device
from rlctl_train.config.errors import UserError
from rlctl_train.config.profile import NsysConfig, ProfileConfig, RocprofConfig, RocprofTrace
from rlctl_train.profiling import nsys
from rlctl_train.profiling.devices import read_devices
from rlctl_train.profiling.nsys import export, read_export
from rlctl_train.profiling.rocprof import read_table
from rlctl_train.profiling.tools import Profiling, await_reports, choose, wrapper
from tests.stand_ins.manuals import NSYS_PROFILE, ROCPROFV3, parse

START = 1_700_000_000_000_000_000


@pytest.mark.parametrize(
    ("device", "there", "tool", "why"),
    [
        ("cuda", "nsys", "nsys", "/bin/nsys is there"),
        ("cuda", "", "torch", "nsys is not on PATH"),
        ("rocm", "rocprofv3", "rocprof", "/bin/rocprofv3 is there"),
        ("rocm", "nsys", "torch", "rocprofv3 is not on PATH"),
        ("ascend", "torch_npu", "msprof", "torch_npu is there"),
        ("ascend", "nsys", "torch", "torch_npu is not installed"),
        ("cpu", "nsys", "torch", "torch.profiler is what records on cpu"),
    ],
)
def test_auto_takes_the_vendors_profiler_where_it_is_there_and_says_why(
    device: str, there: str, tool: str, why: str
) -> None:
    choice = choose(ProfileConfig(), device, lambda name: f"/bin/{name}" if name == there else None, there.__eq__)
    assert choice.tool == tool and why in choice.why
    assert choose(ProfileConfig(tool="ranges"), device).tool == "ranges"


def test_a_profiler_that_is_asked_for_and_not_there_is_told_at_once() -> None:
    with pytest.raises(UserError, match="torch_npu is not installed"):
        choose(ProfileConfig(tool="msprof"), "ascend", has=lambda name: False)


def test_nsys_is_asked_by_documented_options_and_records_only_on_request() -> None:
    config = ProfileConfig(tool="nsys", first_step=3, last_step=5, nsys=NsysConfig(python_sampling=True, delay_s=1.5))
    command = wrapper(config, "cuda", Path("/runs/a b/profile"), "actor", 0)
    assert command is not None
    program, verb, *words = shlex.split(command)
    given, behind = parse(words, NSYS_PROFILE)
    assert (program, verb, behind) == ("nsys", "profile", ["setsid", "--wait", sys.executable])
    assert given["capture-range"] == "cudaProfilerApi" and given["capture-range-end"] == "repeat:3"
    assert given["output"] == "/runs/a b/profile/actor-0" and given["python-sampling"] == "true"
    on_cpu = wrapper(config, "cpu", Path("/runs"), "actor", 0)
    assert on_cpu is not None and "capture-range" not in on_cpu


def test_rocprof_is_asked_by_documented_options() -> None:
    config = ProfileConfig(tool="rocprof", rocprof=RocprofConfig(trace=("kernel", "hip")))
    command = wrapper(config, "rocm", Path("/runs"), "rollout", 0)
    assert command is not None
    assert shlex.split(command) == [
        "rocprofv3", "--kernel-trace", "--hip-trace", "--output-format", "csv", "--output-directory", "/runs",
        "--output-file", "rollout-0_%pid%", "--", "setsid", "--wait", sys.executable,
    ]  # fmt: skip
    every = get_args(RocprofTrace)
    command = wrapper(config.model_copy(update={"rocprof": RocprofConfig(trace=every)}), "rocm", Path("/r"), "actor", 0)
    assert command is not None
    assert parse(shlex.split(command)[1:], ROCPROFV3)[1] == ["setsid", "--wait", sys.executable]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--trase=cuda"], "no option --trase"),
        (["--trace=cuda,gpu"], "--trace takes no"),
        (["--wait", "never"], "wait"),
    ],
)
def test_the_stand_ins_refuse_what_the_manual_does_not_know(words: list[str], said: str) -> None:
    with pytest.raises(SystemExit, match=said):
        parse(words, NSYS_PROFILE)


def test_only_the_workers_asked_for_run_under_the_program(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    profiling = Profiling(ProfileConfig(tool="nsys", roles=("actor", "rollout"), ranks=(1,)), "cuda", tmp_path / "p")
    places = [("actor", 0), ("actor", 1), ("critic", 1), ("rollout", 1)]
    assert [profiling.around(*place) is not None for place in places] == [False, True, False, True]
    assert profiling.wrapped == ["actor-1", "rollout-1"]
    assert json.loads((tmp_path / "p" / "tool.json").read_text()) == {"tool": "nsys", "why": "profile.tool names it"}
    assert "profile: nsys" in capsys.readouterr().err
    assert Profiling(ProfileConfig(tool="torch"), "cuda", tmp_path).around("actor", 0) is None


def test_a_report_is_awaited_until_it_grows_no_more_and_one_that_does_not_come_is_named(tmp_path: Path) -> None:
    def write() -> None:
        with (tmp_path / "actor-0.1.nsys-rep").open("w") as file:
            for _ in range(8):
                file.write("part")
                file.flush()
                time.sleep(0.2)

    thread = threading.Thread(target=write)
    thread.start()
    assert await_reports(tmp_path, "nsys", ["actor-0"], limit_s=60) == []
    assert not thread.is_alive(), "it was still being written"
    (tmp_path / "actor-10.nsys-rep").touch()
    assert await_reports(tmp_path, "nsys", ["actor-0", "actor-1"], limit_s=0.1) == ["actor-1"]
    assert await_reports(tmp_path, "nsys", ["actor-0"], num_each=2, limit_s=0.1) == ["actor-0"], "a step is missing"


def database(path: Path, script: str) -> Path:
    with sqlite3.connect(path) as base:
        base.executescript(script)
    return path


STRINGS = f"""CREATE TABLE StringIds (id INTEGER PRIMARY KEY, value TEXT NOT NULL);
INSERT INTO StringIds VALUES (1, 'sm90_gemm'), (2, 'ncclDevKernel_AllGather'), (3, 'rlctl unix {START + 500}');"""
NEWER = f"""{STRINGS}
CREATE TABLE TARGET_INFO_SESSION_START_TIME (utcEpochNs INTEGER, utcTime TEXT, localTime TEXT);
INSERT INTO TARGET_INFO_SESSION_START_TIME VALUES ({START}, '', '');
CREATE TABLE CUPTI_ACTIVITY_KIND_KERNEL (start INTEGER NOT NULL, end INTEGER NOT NULL, deviceId INTEGER NOT NULL,
    streamId INTEGER NOT NULL, correlationId INTEGER, demangledName INTEGER NOT NULL, shortName INTEGER NOT NULL);
INSERT INTO CUPTI_ACTIVITY_KIND_KERNEL VALUES (600, 700, 0, 7, 1, 1, 1), (650, 750, 0, 9, 2, 2, 2);
CREATE TABLE CUPTI_ACTIVITY_KIND_GRAPH_TRACE (start INTEGER NOT NULL, end INTEGER NOT NULL, deviceId INTEGER NOT NULL,
    graphId INTEGER NOT NULL, streamId INTEGER);
INSERT INTO CUPTI_ACTIVITY_KIND_GRAPH_TRACE VALUES (760, 790, 0, 12, 7);
CREATE TABLE CUPTI_ACTIVITY_KIND_MEMCPY (start INTEGER, end INTEGER, deviceId INTEGER, copyKind INTEGER, bytes INTEGER);
INSERT INTO CUPTI_ACTIVITY_KIND_MEMCPY VALUES (800, 810, 0, 1, 64);"""
OLDER = f"""{STRINGS}
CREATE TABLE CUPTI_ACTIVITY_KIND_KERNEL (start INTEGER NOT NULL, end INTEGER NOT NULL, demangledName INTEGER NOT NULL);
INSERT INTO CUPTI_ACTIVITY_KIND_KERNEL VALUES (1100, 1200, 1);
CREATE TABLE NVTX_EVENTS (start INTEGER NOT NULL, end INTEGER, eventType INTEGER NOT NULL, textId INTEGER);
INSERT INTO NVTX_EVENTS VALUES (1000, 1400, 59, 3);"""


def test_a_newer_export_tells_its_start_and_an_older_one_is_placed_by_the_moment_marked(tmp_path: Path) -> None:
    newer = read_export(database(tmp_path / "new.sqlite", NEWER))
    assert [(one.name, one.start_ns - START, one.end_ns - START) for one in newer] == [
        ("sm90_gemm", 600, 700), ("ncclDevKernel_AllGather", 650, 750), ("CUDA graph", 760, 790),
        ("Memcpy HtoD", 800, 810),
    ]  # fmt: skip
    assert all(one.on_device for one in newer) and newer[0].thread != newer[1].thread, "neither calls the other"
    (older,) = read_export(database(tmp_path / "old.sqlite", OLDER))
    assert (older.name, older.start_ns - START, older.end_ns - START) == ("sm90_gemm", 600, 700)


def test_an_export_without_any_table_of_ours_is_empty_and_one_without_time_says_so(tmp_path: Path) -> None:
    assert read_export(database(tmp_path / "x.sqlite", "CREATE TABLE OTHER (id INTEGER);")) == []
    timeless = database(tmp_path / "y.sqlite", OLDER.partition("CREATE TABLE NVTX_EVENTS")[0])
    with pytest.raises(UserError, match="tells no unix time"):
        read_export(timeless)


def test_a_report_that_cannot_be_exported_here_names_the_command(tmp_path: Path, monkeypatch: Any) -> None:
    report = tmp_path / "actor-0.1.nsys-rep"
    report.touch()
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="only with nsys, which is not on PATH") as told:
        export(report)
    assert f"nsys export --type=sqlite --force-overwrite=true --output={report.with_suffix('.sqlite')}" in (
        told.value.remedy
    )
    program = tmp_path / "nsys"
    program.write_text("#!/bin/sh\necho 'it is no report' >&2\nexit 3\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    with pytest.raises(UserError, match=r"cannot export .*: it is no report"):
        export(report)
    report.with_suffix(nsys.EXPORT).touch()
    assert export(report) == report.with_suffix(nsys.EXPORT)


MARKERS = f"""\
"Domain","Function","Process_Id","Thread_Id","Correlation_Id","Start_Timestamp","End_Timestamp"
"MARKER_CORE_API","other",1,1,1,1,2
"MARKER_CORE_RANGE_API","rlctl unix {START + 500}",1,1,2,1000,1400
"""
ROCM_6 = """\
"Kind","Agent_Id","Queue_Id","Thread_Id","Dispatch_Id","Kernel_Id","Kernel_Name","Correlation_Id","Start_Timestamp","End_Timestamp"
"KERNEL_DISPATCH",4,1,717,1,12,"Cijk_gemm",1,1100,1200
"""
ROCM_7 = """\
"Kind","Agent_Id","Queue_Id","Stream_Id","Thread_Id","Dispatch_Id","Kernel_Id","Kernel_Name","Start_Timestamp","End_Timestamp"
"KERNEL_DISPATCH","Agent 4",1,0,717,1,12,"Cijk_gemm",1100,1200
"KERNEL_DISPATCH","Agent 4",2,3,717,2,13,"ncclDevKernel_Generic",1150,1250
"""
COPIES = """\
"Kind","Direction","Source_Agent_Id","Destination_Agent_Id","Correlation_Id","Start_Timestamp","End_Timestamp"
"MEMORY_COPY","HOST_TO_DEVICE","Agent 0","Agent 4",3,1300,1310
"""


def test_rocprofs_tables_of_each_version_are_placed_by_the_moment_marked(tmp_path: Path) -> None:
    (tmp_path / "actor-0_71_marker_api_trace.csv").write_text(MARKERS)
    kernels, copies = tmp_path / "actor-0_71_kernel_trace.csv", tmp_path / "actor-0_71_memory_copy_trace.csv"
    copies.write_text(COPIES)
    for table, names in ((ROCM_6, ["Cijk_gemm"]), (ROCM_7, ["Cijk_gemm", "ncclDevKernel_Generic"])):
        kernels.write_text(table)
        found = read_table(kernels)
        assert [one.name for one in found] == names and found[0].start_ns == START + 600
        assert len({one.thread for one in found}) == len(names), "one stream does not call another"
    (copy,) = read_table(copies)
    assert (copy.name, copy.start_ns - START, copy.thread[0]) == ("Memcpy HOST_TO_DEVICE", 800, "Agent 4")
    assert len(read_devices(tmp_path, ["actor-0"]).events["actor-0"]) == 3
    assert read_devices(tmp_path, ["actor-01", "rollout-0"]).events == {"actor-01": [], "rollout-0": []}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("actor-0.1.sqlite", b"SQLite format 3\0 cut off"),
        ("actor-0_9_kernel_trace.csv", b'"Kind","Kernel_Name","Start_Timestamp","End_Timestamp"\n"K","a",1100,12'),
        ("actor-0_9_kernel_trace.csv", b'"Kind","Kernel_Name","Start_Timestamp","End_Timestamp"\n"K","a",11'),
        ("actor-0_9_memory_copy_trace.csv", b'"Kind","Direction"\n"MEMORY_COPY","HOST_TO_DEVICE"\n'),
        ("step_000003/actor-0.trace.json.gz", b"\x1f\x8b\x08"),
        ("step_000003/actor-0.trace.json.gz", b"no archive"),
    ],
)
def test_what_is_torn_is_named_and_the_rest_is_read(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / "step_000003").mkdir()
    (tmp_path / "actor-0_71_marker_api_trace.csv").write_text(MARKERS)
    (tmp_path / "actor-0_71_kernel_trace.csv").write_text(ROCM_6)
    (tmp_path / name).write_bytes(content)
    found = read_devices(tmp_path, ["actor-0"])
    assert [one.name for one in found.events["actor-0"]] == ["Cijk_gemm"]
    (unread,) = found.unread
    assert unread.startswith(Path(name).name)


def test_ranges_go_to_nvtx_where_it_is_installed() -> None:
    nvtx = pytest.importorskip("nvtx", reason="the extra `profile` is not installed")
    assert isinstance(device.vendor_range("forward"), nvtx.annotate)
    with device.vendor_range("forward"):
        pass
