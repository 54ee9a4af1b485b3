"""Tensors that come and go: the most at once in each phase, by who asked, from traces and from CUDA's own history."""

from __future__ import annotations

import gzip
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from rlctl_train import device
from rlctl_train.profiling.allocations import Allocation, line_of, of_snapshot, of_trace, peaks
from rlctl_train.profiling.devices import read_devices
from rlctl_train.profiling.snapshots import blocks, keep_snapshot

GIB = 2**30
FRAMES = [
    {"filename": "??", "line": 0, "name": "c10::alloc"},
    {"filename": "/env/torch/nn/modules/linear.py", "line": 5, "name": "forward"},
    {"filename": "/src/rlctl_train/engines/models.py", "line": 90, "name": "hidden"},
]
SNAPSHOT: dict[str, Any] = {
    "segments": [
        {
            "blocks": [
                {"size": 3 * GIB, "state": "active_allocated", "frames": FRAMES},
                {"size": GIB, "state": "inactive"},
                {"size": 2 * GIB, "state": "inactive"},
            ]
        },
        {"blocks": [{"size": GIB, "state": "active_allocated"}]},
    ],
    "device_traces": [
        [
            {"action": "segment_alloc", "addr": 1, "size": 9 * GIB, "time_us": 1},
            {"action": "alloc", "addr": 1, "size": GIB, "frames": FRAMES, "time_us": 2},
            {"action": "free_requested", "addr": 1, "size": GIB, "frames": [], "time_us": 3},
            {"action": "free_completed", "addr": 1, "size": GIB, "frames": [], "time_us": 4},
        ]
    ],
}
"""By the schema of torch.cuda.memory._snapshot."""


def test_the_peak_of_a_phase_counts_what_others_left_and_names_who_asked() -> None:
    made = [
        Allocation(10, 1, 4 * GIB, "embedding"),
        Allocation(20, 2, 2 * GIB, "linear"),
        Allocation(30, 2, -2 * GIB, "linear"),
        Allocation(110, 3, GIB, "linear"),
        Allocation(120, 4, GIB, "softmax"),
        Allocation(130, 1, -4 * GIB, "embedding"),
    ]
    found = peaks(made, {"logprobs": [(0, 100)], "update": [(100, 200)], "idle": [(300, 400)]})
    assert found.keys() == {"logprobs", "update"}
    assert (found["logprobs"].gib, found["logprobs"].by_asker) == (6.0, {"embedding": 4.0, "linear": 2.0})
    assert (found["update"].gib, found["update"].by_asker) == (6.0, {"embedding": 4.0, "linear": 1.0, "softmax": 1.0})


def test_a_real_trace_with_memory_shows_what_each_operation_took(tmp_path: Path) -> None:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as made:
        held = torch.ones(2**20)
        product = held.view(1024, 1024) @ held.view(1024, 1024)
        del held, product
    made.export_chrome_trace(str(tmp_path / "t.json"))
    found = of_trace(json.loads((tmp_path / "t.json").read_text()))
    assert sum(one.num_bytes for one in found) == 0 and {"aten::ones", "aten::matmul"} <= {one.asker for one in found}
    everything = peaks(found, {"all": [(0, 2**63)]})["all"]
    assert everything.gib == pytest.approx(8 / 1024, rel=0.01)
    assert everything.by_asker["aten::matmul"] == pytest.approx(4 / 1024, rel=0.01)


def test_of_a_device_its_own_allocations_count_and_not_the_hosts() -> None:
    def event(kind: int, size: int) -> dict[str, Any]:
        return {"name": "[memory]", "ts": 1.0, "tid": 1, "args": {"Device Type": kind, "Bytes": size, "Addr": size}}

    assert [one.num_bytes for one in of_trace({"traceEvents": [event(0, 5), event(1, 7)]})] == [7]
    assert [one.num_bytes for one in of_trace({"traceEvents": [event(0, 5)]})] == [5]
    assert of_trace({}) == []


def test_cudas_history_names_the_line_that_asked_below_torch() -> None:
    come, gone = of_snapshot(SNAPSHOT)
    assert (come.at_ns, come.num_bytes, come.asker) == (2000, GIB, "models.py:90 hidden")
    assert (gone.at_ns, gone.num_bytes, gone.address) == (4000, -GIB, come.address)
    assert line_of(FRAMES[:2]) == "linear.py:5 forward" and line_of([]) == "no stack"
    assert of_snapshot({"segments": []}) == []


def test_blocks_add_up_to_what_is_used_and_what_is_kept_unused() -> None:
    assert blocks(SNAPSHOT) == {
        "used_gib": 4.0,
        "unused_gib": 3.0,
        "largest_unused_gib": 2.0,
        "by_asker": {"models.py:90 hidden": 3.0, "no stack": 1.0},
    }


def test_a_snapshot_is_kept_for_its_viewer_and_the_report_reads_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "allocator_snapshot", lambda kind: SNAPSHOT if kind == "cuda" else None)
    folder = tmp_path / "step_000003"
    keep_snapshot("cuda", folder / "actor-0.snapshot.pickle")
    keep_snapshot("cpu", folder / "score-0.snapshot.pickle")
    assert sorted(file.name for file in folder.iterdir()) == ["actor-0.allocations.json", "actor-0.snapshot.pickle"]
    assert pickle.loads((folder / "actor-0.snapshot.pickle").read_bytes()) == SNAPSHOT
    memory = {"name": "[memory]", "ts": 1.0, "tid": 1, "args": {"Device Type": 1, "Bytes": 7, "Addr": 7}}
    (folder / "actor-0.trace.json.gz").write_bytes(gzip.compress(json.dumps({"traceEvents": [memory]}).encode()))
    found = read_devices(tmp_path, ["actor-0"])
    assert found.unread == [] and [one.num_bytes for one in found.allocations["actor-0"]] == [GIB, -GIB]
