"""The profiler: `torch_npu.profiler`, names and signatures by the Ascend PyTorch Profiler's guide."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from torch_npu.npu import MARKS


class ProfilerActivity:
    CPU, NPU = "CPU", "NPU"


class ProfilerLevel:
    Level0, Level1, Level2, Level_none = "Level0", "Level1", "Level2", "Level_none"


class AiCMetrics:
    AiCoreNone, PipeUtilization = "ACL_AICORE_NONE", "ACL_AICORE_PIPE_UTILIZATION"
    ArithmeticUtilization, Memory = "ACL_AICORE_ARITHMETIC_UTILIZATION", "ACL_AICORE_MEMORY_BANDWIDTH"
    MemoryL0, MemoryUB = "ACL_AICORE_L0B_AND_WIDTH", "ACL_AICORE_MEMORY_UB"
    ResourceConflictRatio, L2Cache = "ACL_AICORE_RESOURCE_CONFLICT_RATIO", "ACL_AICORE_L2_CACHE"
    MemoryAccess = "ACL_AICORE_MEMORY_ACCESS"


class ExportType:
    Text, Db = "text", "db"


class _ExperimentalConfig:
    def __init__(
        self,
        profiler_level: str = ProfilerLevel.Level0,
        aic_metrics: str = AiCMetrics.AiCoreNone,
        l2_cache: bool = False,
        msprof_tx: bool = False,
        mstx: bool = False,
        data_simplification: bool = True,
        record_op_args: bool = False,
        op_attr: bool = False,
        gc_detect_threshold: float | None = None,
        export_type: str | list[str] = ExportType.Text,
        host_sys: list[str] | None = None,
        mstx_domain_include: list[str] | None = None,
        mstx_domain_exclude: list[str] | None = None,
        sys_io: bool = False,
        sys_interconnection: bool = False,
    ) -> None:
        self.asked = {name: value for name, value in locals().items() if name != "self"}


def tensorboard_trace_handler(
    dir_name: str | None = None, worker_name: str | None = None, analyse_flag: bool = True, async_mode: bool = False
) -> Callable[[profile], None]:
    def handle(recorded: profile) -> None:
        folder = Path(str(dir_name)) / f"{worker_name}_{os.getpid()}_{time.time_ns() // 1_000_000}_ascend_pt"
        (folder / "PROF_000001_20261130000000000_STANDIN").mkdir(parents=True)
        (folder / "profiler_info.json").write_text(json.dumps(recorded.asked))
        if analyse_flag:
            (folder / "ASCEND_PROFILER_OUTPUT").mkdir()
            _analyse(recorded, folder / "ASCEND_PROFILER_OUTPUT")

    return handle


class profile:
    def __init__(
        self,
        *,
        activities: list[str] | None = None,
        schedule: Callable[[int], Any] | None = None,
        on_trace_ready: Callable[[profile], None] | None = None,
        record_shapes: bool = False,
        profile_memory: bool = False,
        with_stack: bool = False,
        with_flops: bool = False,
        with_modules: bool = False,
        experimental_config: _ExperimentalConfig | None = None,
    ) -> None:
        extended = {} if experimental_config is None else experimental_config.asked
        self.asked: dict[str, Any] = {
            "activities": activities, "record_shapes": record_shapes, "with_stack": with_stack, **extended,
        }  # fmt: skip
        self.marks: list[tuple[str, int]] = []
        self._ready = on_trace_ready

    def __enter__(self) -> profile:
        MARKS.clear()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.marks = list(MARKS)
        self.asked["marks"] = [name for name, _ in self.marks]
        if self._ready is not None:
            self._ready(self)


def _analyse(recorded: profile, output: Path) -> None:
    rows = ["Device_id,Name,Type,Accelerator Core,Start Time(us),Duration(us),Wait Time(us),Block Num"]
    copies = []
    for number, (name, at) in enumerate(recorded.marks):
        if name.startswith("+"):
            start = f"{at // 1000}.{at % 1000:03}"
            rows.append(f"0,aclnnMatmul_MatMulCommon_MatMulV2,MatMulV2,MIX_AIC,{start},20.5,0,24")
            rows.append(f"0,hcom_allReduce__595_{number}_1,hcom_allReduce_,COMMUNICATION,{start},10,0,0")
            copies.append(
                {"ph": "X", "name": "MEMCPY_ASYNC", "pid": 9, "tid": 46, "ts": start, "dur": 5.25, "args": {}}
            )
    (output / "kernel_details.csv").write_text("\n".join(rows) + "\n")
    process = {"ph": "M", "name": "process_name", "pid": 9, "tid": 0, "args": {"name": "Ascend Hardware"}}
    (output / "trace_view.json").write_text(json.dumps([process, *copies]))
