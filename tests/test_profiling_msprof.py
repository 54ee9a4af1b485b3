"""Ascend: torch_npu's profiler as it is asked, marks, and what is read of the files it writes."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from rlctl_train import device
from rlctl_train.config.profile import MsprofConfig, ProfileConfig
from rlctl_train.profiling.devices import read_devices
from rlctl_train.profiling.msprof import read_copies, read_kernels
from rlctl_train.profiling.ranges import mark
from rlctl_train.profiling.recorder import Recordable, Who
from rlctl_train.profiling.timeline import read_ranges, unix_start
from rlctl_train.profiling.traces import kind_of

START_US = 1_700_000_000_000_000
LEVEL_0 = f"""\
Device_id,Name,Type,Accelerator Core,Start Time(us),Duration(us),Wait Time(us),Block Dim
0,aclnnMatmul_MatMulCommon_MatMulV2,N/A,N/A,"{START_US}.125\t",100.5,0,0
0,hcom_allReduce__595_0_1,N/A,N/A,"{START_US + 50}.000\t",80,0,0
0,hcom_send__595_7_1,N/A,N/A,"{START_US + 140}\t",8,0,0
0,aclnnAdd_Slice_Slice,N/A,N/A,N/A,N/A,0,0
"""
LEVEL_1 = f"""\
Step Id,Device_id,Model ID,Task ID,Stream ID,Name,Type,OP State,Accelerator Core,Start Time(us),Duration(us),Block Num
3,0,4294967295,17,46,aclnnMatmul_MatMulCommon_MatMulV2,MatMulV2,dynamic,MIX_AIC,{START_US}.125,100.5,24
3,0,4294967295,N/A,N/A,hcom_allReduce__595_0_1,hcom_allReduce_,N/A,COMMUNICATION,{START_US + 50},80,0
3,0,4294967295,N/A,N/A,hcom_send__595_7_1,hcom_send_,N/A,COMMUNICATION,{START_US + 140},8,0
"""
SUMMARY = f"""\
Device_id,Op Name,OP Type,Task Type,Task Start Time(us),Task Duration(us),Task Wait Time(us)
0,aclnnMatmul_MatMulCommon_MatMulV2,MatMulV2,AI_CORE,"{START_US}.125\t",100.5,0
0,hcom_allReduce__595_0_1,hcom_allReduce_,HCCL,"{START_US + 50}\t",80,0
0,hcom_send__595_7_1,hcom_send_,HCCL,"{START_US + 140}\t",8,0
"""
PLACES = {
    "kernels": "ASCEND_PROFILER_OUTPUT/kernel_details.csv",
    "trace": "ASCEND_PROFILER_OUTPUT/trace_view.json",
    "summary": "PROF_01_9_A/mindstudio_profiler_output/op_summary_9.csv",
}
TRACE = [
    {"ph": "M", "name": "process_name", "pid": 3, "args": {"name": "CANN"}},
    {"ph": "M", "name": "process_name", "pid": 9, "args": {"name": "Ascend Hardware"}},
    {"ph": "X", "name": "aclrtMemcpyAsync", "pid": 3, "tid": 1, "ts": f"{START_US}.000", "dur": 3},
    {"ph": "X", "name": "memcpy host call", "pid": 3, "tid": 1, "ts": f"{START_US}.000", "dur": 3},
    {"ph": "X", "name": "MEMCPY_ASYNC", "pid": 9, "tid": 46, "ts": f"{START_US + 200}.250", "dur": 30.5, "args": {}},
    {"ph": "X", "name": "aclnnMatmul_MatMulCommon_MatMulV2", "pid": 9, "tid": 46, "ts": f"{START_US}.125", "dur": 9},
    {"ph": "s", "name": "HostToDevice", "pid": 3, "tid": 1, "ts": f"{START_US}.000", "id": "7"},
]


def write(folder: Path, **files: str) -> Path:
    for name, text in files.items():
        path = folder / PLACES[name]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


@pytest.mark.parametrize("files", [{"kernels": LEVEL_0}, {"kernels": LEVEL_1}, {"summary": SUMMARY}])
def test_kernels_and_collectives_are_read_of_every_level_and_of_msprofs_own_table(
    tmp_path: Path, files: dict[str, str]
) -> None:
    found = read_kernels(write(tmp_path / "actor-0_7_ascend_pt", **files))
    assert [(one.name, one.start_ns - START_US * 1000, one.end_ns - one.start_ns) for one in found] == [
        ("aclnnMatmul_MatMulCommon_MatMulV2", 125, 100_500),
        ("hcom_allReduce", 50_000, 80_000),
        ("hcom_send", 140_000, 8_000),
    ]
    assert [kind_of(one.name) for one in found] == ["compute", "communication", "communication"]
    assert found[0].thread != found[1].thread, "a collective beside a kernel is not a call of it"


def test_copies_are_the_devices_own_and_kernels_are_not_counted_twice(tmp_path: Path) -> None:
    (copy,) = read_copies(write(tmp_path / "x_ascend_pt", trace=json.dumps(TRACE)))
    times = copy.start_ns - START_US * 1000, copy.end_ns - copy.start_ns
    assert (copy.name, *times) == ("MEMCPY_ASYNC", 200_250, 30_500)
    assert kind_of(copy.name) == "copy" and read_copies(tmp_path) == []


@pytest.mark.parametrize(
    ("files", "said", "num_events"),
    [
        ({}, "has no kernel_details.csv: where torch_npu is, run `python -c", 0),
        ({"trace": json.dumps(TRACE)}, "has no kernel_details.csv", 1),
        ({"kernels": LEVEL_1, "trace": '[{"ph": "X", "na'}, "cannot be read", 3),
        ({"kernels": LEVEL_1[:-9], "trace": json.dumps(TRACE)}, "a row has no Duration(us)", 1),
        ({"kernels": "Device_id,Name,Start Time(us)\n0,Mul,12\n"}, "a row has no Duration(us) or Task Duration(us)", 0),
        ({"kernels": "Name,Start Time(us),Duration(us)\nMul,soon,12\n"}, "cannot be read", 0),
    ],
)
def test_what_is_missing_or_torn_is_named_and_the_rest_is_read(
    tmp_path: Path, files: dict[str, str], said: str, num_events: int
) -> None:
    folder = tmp_path / "step_000003" / "actor-0_7_20261130_ascend_pt"
    folder.mkdir(parents=True)
    write(folder, **files)
    found = read_devices(tmp_path, ["actor-0", "actor-1"])
    (unread,) = found.unread
    assert unread.startswith(folder.name) and said in unread
    assert [len(events) for events in found.events.values()] == [num_events, 0]


def test_counters_of_the_cores_want_more_than_the_lowest_level() -> None:
    with pytest.raises(ValidationError, match="aic_metrics=Memory wants profiler_level=Level1 or Level2"):
        MsprofConfig(profiler_level="Level0", aic_metrics="Memory")


@pytest.fixture
def torch_npu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The stand-in, which takes the documented options alone, as an installed package."""
    monkeypatch.syspath_prepend(str(Path(__file__).with_name("stand_ins")))
    device._optional.cache_clear()
    yield None
    device._optional.cache_clear()
    for name in [name for name in sys.modules if name.split(".")[0] == "torch_npu"]:
        del sys.modules[name]


def test_a_worker_is_recorded_by_documented_options_and_its_ranges_are_marked(torch_npu: Any, tmp_path: Path) -> None:
    options = MsprofConfig(profiler_level="Level2", aic_metrics="L2Cache", l2_cache=True, data_simplification=False)
    worker = Recordable()
    worker.start_recording(
        ProfileConfig(tool="msprof", msprof=options, shapes=True), Who("actor", 0, "cpu"), tmp_path / "step_000003"
    )
    with mark("actor_update"):
        pass
    worker.stop_recording()
    (folder,) = (tmp_path / "step_000003").glob("actor-0_*_ascend_pt")
    asked = json.loads((folder / "profiler_info.json").read_text())
    assert asked["activities"] == ["CPU", "NPU"] and (asked["record_shapes"], asked["with_stack"]) == (True, False)
    assert (asked["profiler_level"], asked["aic_metrics"]) == ("Level2", "ACL_AICORE_L2_CACHE")
    assert (asked["l2_cache"], asked["data_simplification"], asked["mstx"], asked["export_type"]) == (
        True, False, True, "text",
    )  # fmt: skip
    assert asked["marks"] == ["+actor_update", "-actor_update"]
    _, (only,) = read_ranges(tmp_path / "step_000003" / "actor-0.ranges.json")
    (kernel, _, copy) = read_devices(tmp_path, ["actor-0"]).events["actor-0"]
    assert only.start_ns // 1000 * 1000 <= kernel.start_ns <= only.end_ns and copy.name == "MEMCPY_ASYNC"


def test_a_step_that_is_not_analysed_is_named(torch_npu: Any, tmp_path: Path) -> None:
    worker = Recordable()
    config = ProfileConfig(tool="msprof", msprof=MsprofConfig(analyse_flag=False))
    worker.start_recording(config, Who("actor", 0, "cpu"), tmp_path / "step_000003")
    worker.stop_recording()
    (unread,) = read_devices(tmp_path, ["actor-0"]).unread
    assert "analyse(" in unread and "actor-0_" in unread


def test_a_program_around_a_worker_is_told_the_unix_time_in_each_step(torch_npu: Any, tmp_path: Path) -> None:
    worker, marks = Recordable(), importlib.import_module("torch_npu").npu.MARKS
    for step in ("step_000003", "step_000004"):
        marks.clear()
        worker.start_recording(ProfileConfig(tool="rocprof"), Who("actor", 0, "cpu"), tmp_path / step)
        with mark("actor_update"):
            pass
        worker.stop_recording()
        (moment, at_ns), *_ = marks
        assert [name for name, _ in marks[1:3]] == ["+actor_update", "-actor_update"]
        assert abs(unix_start(tmp_path, [("other", 1), (moment.removeprefix("+"), 5)]) + 5 - at_ns) < 10**8
