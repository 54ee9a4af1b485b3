"""What ranges add up to: phases, shares, overlap, waiting; and what a trace says of each phase."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from rlctl_hw.types import MemoryPart

from rlctl_train.config.errors import UserError
from rlctl_train.config.layout import RunFiles
from rlctl_train.profiling.advice import Seen, advise
from rlctl_train.profiling.report import write_comparison, write_page
from rlctl_train.profiling.spans import merged
from rlctl_train.profiling.steps import StepProfile, read_steps
from rlctl_train.profiling.summary import compare, compare_operations, summarize
from rlctl_train.profiling.timeline import Range
from rlctl_train.profiling.traces import events_of, kind_of, operations, read_trace
from tests.test_telemetry_report import Page

MS = 1_000_000
PREDICTED = (
    MemoryPart("actor_update", "weights", 1.0, "formula"),
    MemoryPart("actor_update", "context", 0.5, "assumed"),
    MemoryPart("actor_update", "overhead", 0.25, "assumed"),
    MemoryPart("actor_update", "activations", 3.0, "formula"),
    MemoryPart("actor_update", "logits", 1.0, "formula"),
    MemoryPart("checkpoint", "buffers", 9.0, "formula"),
)
START = 1_700_000_000_000_000_000


def ranges(*given: tuple[str, float, float, int]) -> list[dict[str, Any]]:
    """Make ranges of (name, begin ms, end ms, depth)."""
    made = [Range(n, START + int(b * MS), START + int(e * MS), d, 2**30, 2**31) for n, b, e, d in given]
    return [vars(one) for one in made]


def write(
    folder: Path,
    role: str,
    rank: int,
    made: list[dict[str, Any]],
    *,
    slot: int | None = None,
    device: str = "cpu",
    load: tuple[tuple[int, float], ...] = (),
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    facts = {"schema_version": 1, "role": role, "rank": rank, "host": "here", "device": device, "slot": slot}
    facts |= {"threads": 2, "load": load}
    (folder / f"{role}-{rank}.ranges.json").write_text(json.dumps({**facts, "ranges": made}))


def a_step(root: Path, actors: tuple[float, ...] = (990.0,)) -> Path:
    """A step of a second: 600 ms generation, 10 ms nothing, the rest the update, which ends on each actor."""
    folder = root / "profile" / "step_000003"
    write(folder, "driver", 0, ranges(("step", 0, 1000, 0), ("gen", 0, 600, 1), ("update_actor", 610, 1000, 1)))
    write(folder, "rollout", 0, ranges(("generation", 20, 580, 0)))
    for rank, end in enumerate(actors):
        write(folder, "actor", rank, ranges(("actor_update", 620, end, 0), ("micro-batch 1", 620, end - 100, 1)))
    return folder


def the_step(root: Path) -> StepProfile:
    (step,) = read_steps(root / "profile")
    return step


def test_phases_and_what_lies_between_them_are_the_step(tmp_path: Path) -> None:
    a_step(tmp_path)
    step = the_step(tmp_path)
    assert (step.step, step.seconds) == (3, pytest.approx(1.0))
    assert [(p.name, p.seconds, p.share) for p in step.phases] == [
        ("gen", pytest.approx(0.6), pytest.approx(0.6)),
        ("update_actor", pytest.approx(0.39), pytest.approx(0.39)),
    ]
    assert sum(phase.seconds for phase in step.phases) + step.between_s == pytest.approx(step.seconds)
    assert step.phases[0].busy_s == {"rollout 0": pytest.approx(0.56)}
    assert {w.name: round(step.busy_share(w), 3) for w in step.workers} == {"actor 0": 0.37, "rollout 0": 0.56}
    assert step.nobody == pytest.approx(1 - 0.56 - 0.37)
    assert step.overlap == 0


def test_two_roles_at_once_are_overlap_and_two_ranks_of_one_are_not(tmp_path: Path) -> None:
    folder = a_step(tmp_path, actors=(990.0, 990.0))
    assert the_step(tmp_path).overlap == 0
    write(folder, "reference", 0, ranges(("logprobs", 500, 720, 0)))
    assert the_step(tmp_path).overlap == pytest.approx((580 - 500 + 720 - 620) / 1000)


def test_spans_that_touch_or_overlap_are_one() -> None:
    assert merged([(5, 7), (0, 2), (2, 3), (6, 9)]) == [(0, 3), (5, 9)]


def test_a_folder_without_a_whole_step_says_how_to_get_one(tmp_path: Path) -> None:
    write(tmp_path / "profile" / "step_000003", "actor", 0, ranges(("logprobs", 0, 1, 0)))
    with pytest.raises(UserError, match="holds no profiled step") as told:
        read_steps(tmp_path / "profile")
    assert "rlctl profile" in told.value.remedy


def test_advice_names_the_largest_phase_the_longest_response_and_the_uneven_rank(tmp_path: Path) -> None:
    a_step(tmp_path, actors=(990.0, 740.0))
    metrics = {"response_length/max": 500.0, "response_length/mean": 100.0}
    shares = {"compute": 0.15, "communication": 0.1, "copy": 0.0}
    said = advise(the_step(tmp_path), metrics, {"gen": 0.1}, Seen(kinds={"actor 0": {"update_actor": shares}}))
    assert said[0].startswith("generation is 60% of the step") and "500 tokens, 5.0 times the mean" in said[0]
    assert any("the planner expected 0.1 s" in one for one in said)
    assert any("the busiest actor rank works 0.37 s and the mean 0.245 s" in one for one in said)
    assert any("40% of the time of actor 0 in the policy's update is communication" in one for one in said)
    even = advise(the_step(tmp_path), {}, {}, Seen())
    assert "times the mean" not in even[0] and not any("planner" in one for one in even)


def test_advice_tells_a_rank_that_begins_late_from_one_that_works_long(tmp_path: Path) -> None:
    folder = a_step(tmp_path, actors=(990.0,))
    write(folder, "actor", 1, ranges(("actor_update", 860, 990, 0)))
    said = advise(the_step(tmp_path), {}, {}, Seen())
    assert (
        "in the policy's update actor 1 begins 0.24 s after the other actor ranks, which wait for it: 24% of the step"
        in said
    )
    assert not any("busiest" in one for one in said)
    write(folder, "rollout", 1, ranges(("generation", 300, 400, 0)))
    assert any("the busiest rollout rank" in one for one in advise(the_step(tmp_path), {}, {}, Seen()))


def test_advice_says_whom_the_garbage_collector_stops(tmp_path: Path) -> None:
    folder = a_step(tmp_path)
    collections = [("garbage collection", begin, end, 0) for begin, end in ((-300, -10), (620, 860))]
    write(folder, "actor", 0, ranges(*collections, ("actor_update", 860, 990, 0)))
    said = advise(the_step(tmp_path), {}, {}, Seen())
    assert "Python's garbage collector stops actor 0 for 0.24 s, 24% of the step" in said


def test_advice_counts_as_communication_what_every_rank_spends_and_the_rest_as_waiting(tmp_path: Path) -> None:
    a_step(tmp_path, actors=(990.0, 990.0))
    shares = {
        "actor 0": {"update_actor": {"compute": 0.1, "communication": 0.2, "copy": 0.0}},
        "actor 1": {"update_actor": {"compute": 0.2, "communication": 0.1, "copy": 0.1}},
    }
    said = advise(the_step(tmp_path), {}, {}, Seen(kinds=shares))
    assert any("25% of the time of every actor rank in the policy's update is communication" in one for one in said)
    assert any(
        "in the policy's update actor 0 waits 0.1 s longer than actor 1 for the other ranks" in one for one in said
    )


def test_advice_has_the_tail_the_slow_phase_and_the_memory_that_nobody_expected(tmp_path: Path) -> None:
    a_step(tmp_path)
    metrics = {"perf/tail_share": 0.38, "response_length/max": 500.0, "response_length/mean": 100.0}
    metrics |= {"perf/mfu/update_actor": 0.1, "perf/mfu/gen": 0.01}
    memory = [
        {"phase": "actor_update", "part": "weights", "predicted_gib": 1.0, "measured_gib": 1.0},
        {"phase": "actor_update", "part": "the rest", "predicted_gib": 2.0, "measured_gib": 4.0},
    ]
    said = advise(the_step(tmp_path), metrics, {}, Seen(memory=memory))
    assert "its last 5% of sequences take 38% of it" in said[0]
    assert [one for one in said if "(MFU)" in one] == [one for one in said if "the policy's update reaches 10%" in one]
    assert any("held 5.00 GiB in actor update where the planner expected 3.00 GiB" in one for one in said)
    fitting = [memory[0], memory[1] | {"measured_gib": 2.1}]
    assert not any("GiB" in one for one in advise(the_step(tmp_path), {}, {}, Seen(memory=fitting)))


def event(name: str, begin: float, length: float, category: str = "cpu_op", thread: int = 1) -> dict[str, Any]:
    return {"ph": "X", "cat": category, "name": name, "pid": 7, "tid": thread, "ts": begin, "dur": length}


def write_trace(path: Path, *events: dict[str, Any]) -> None:
    content = {"baseTimeNanoseconds": START, "traceEvents": [{"ph": "M", "name": "process_name"}, *events]}
    path.write_bytes(gzip.compress(json.dumps(content).encode()))


def test_an_operation_has_its_own_time_in_the_phase_it_began_in(tmp_path: Path) -> None:
    path = tmp_path / "t.json.gz"
    write_trace(
        path,
        event("aten::linear", 0, 100),
        event("aten::addmm", 10, 60),
        event("aten::copy_", 20, 10),
        event("aten::linear", 200, 50),
        event("aten::mul", 0, 30, thread=2),
        event("gen", 0, 300, "user_annotation"),
    )
    found = operations(events_of(read_trace(path)), [(START, START + 150_000)])
    assert [(one.name, one.calls, round(one.seconds * 1e6), one.kind) for one in found] == [
        ("aten::addmm", 1, 50, "compute"),
        ("aten::linear", 1, 40, "compute"),
        ("aten::mul", 1, 30, "compute"),
        ("aten::copy_", 1, 10, "copy"),
    ]


def test_on_a_device_kernels_count_and_the_host_that_launches_them_does_not(tmp_path: Path) -> None:
    path = tmp_path / "t.json.gz"
    write_trace(
        path, event("aten::mm", 0, 5), event("sgemm", 3, 40, "kernel"), event("Memcpy HtoD", 50, 5, "gpu_memcpy")
    )
    found = operations(events_of(read_trace(path)), [(START, START + 10**9)])
    assert [(one.name, one.kind) for one in found] == [("sgemm", "compute"), ("Memcpy HtoD", "copy")]
    assert [kind_of(n) for n in ("ncclDevKernel_AllGather", "gloo:all_reduce", "c10d::_allgather_base_")] == 3 * [
        "communication"
    ]


def test_the_report_says_it_all_and_fetches_nothing(tmp_path: Path) -> None:
    folder = a_step(tmp_path)
    write_trace(folder / "actor-0.trace.json.gz", event("aten::<mm>", 700_000, 100_000))
    files = RunFiles(tmp_path)
    line = {"step": 3, "phase": "train", "time": 0.0, "perf/total_num_tokens": 1234.0}
    files.metrics.write_text(json.dumps(line) + "\n")
    summary = summarize(files, {"gen": 0.5}, PREDICTED)
    assert summary["steps"][0]["tokens_per_s"] == pytest.approx(1234)
    assert summary["steps"][0]["operations"] == {
        "actor 0": {
            "update_actor": [{"name": "aten::<mm>", "kind": "compute", "calls": 1, "seconds": pytest.approx(0.1)}]
        }
    }
    assert summary["steps"][0]["kinds"] == {
        "actor 0": {"update_actor": {"compute": pytest.approx(0.1), "communication": 0, "copy": 0}}
    }
    text = write_page(files, summary).read_text()
    page = Page(text)
    assert page.fetched == [] and page.tags.count("svg") == 2
    said = ("aten::<mm>", "between phases", "What devices do", "Generation is 60% of the step", "Critical path")
    assert [one for one in said if one not in page.text] == []


def test_memory_is_held_against_the_plan_part_by_part(tmp_path: Path) -> None:
    folder = a_step(tmp_path)
    measured = {"actor_update": {"weights": 1.0, "overhead": 0.7, "gradients": 0.5, "rest": 2.0}}
    (folder / "memory.json").write_text(json.dumps(measured))
    (step,) = summarize(RunFiles(tmp_path), {}, PREDICTED)["steps"]
    assert [(one["part"], one["predicted_gib"], one["measured_gib"]) for one in step["memory"]] == [
        ("weights", 1.0, 1.0),
        ("gradients", None, 0.5),
        ("overhead", 0.75, 0.7),
        ("the rest", 4.0, 2.0),
    ]
    assert {one["phase"] for one in step["memory"]} == {"actor_update"}, "a phase that did not come is left out"


def test_rates_of_a_phase_come_from_the_metrics_of_its_step(tmp_path: Path) -> None:
    a_step(tmp_path)
    files = RunFiles(tmp_path)
    line = {"step": 3, "phase": "train", "time": 0.0, "perf/tflops/gen": 12.5, "perf/mfu/gen": 0.04}
    files.metrics.write_text(json.dumps(line) + "\n")
    (step,) = summarize(files, {}, ())["steps"]
    assert [(one["tflops"], one["mfu"]) for one in step["phases"]] == [(12.5, 0.04), (None, None)]


def test_a_device_is_busy_by_its_kernels_else_by_what_its_driver_says_else_not_known(tmp_path: Path) -> None:
    folder = tmp_path / "profile" / "step_000003"
    write(folder, "driver", 0, ranges(("step", 0, 1000, 0), ("gen", 0, 500, 1), ("update_actor", 500, 1000, 1)))
    samples = tuple((START + at * MS, share) for at, share in ((100, 0.2), (400, 0.4), (700, 0.9), (1100, 1.0)))
    write(folder, "rollout", 0, ranges(("generation", 100, 400, 0)), slot=0, device="cuda", load=samples)
    write(folder, "actor", 0, ranges(("actor_update", 500, 900, 0)), slot=0, device="cuda")
    write(folder, "actor", 1, ranges(("actor_update", 500, 1000, 0)), slot=1, device="cuda")
    write(folder, "score", 0, ranges(("score", 450, 500, 0)))
    first, second = summarize(RunFiles(tmp_path), {}, ())["steps"][0]["devices"]
    assert (first["name"], first["workers"], first["at_work"]) == (
        "cuda 0",
        ["actor 0", "rollout 0"],
        pytest.approx(0.7),
    )
    assert first["computed"] == pytest.approx(0.5), "of the three moments in the step"
    assert first["computed_by_phase"] == {"gen": pytest.approx(0.3), "update_actor": pytest.approx(0.9)}
    assert (second["idle"], second["computed"], second["computed_by_phase"]) == (pytest.approx(0.5), None, {})
    write_trace(folder / "actor-1.trace.json.gz", event("sgemm", 600_000, 250_000, "kernel"))
    _, traced = summarize(RunFiles(tmp_path), {}, ())["steps"][0]["devices"]
    assert traced["computed"] == pytest.approx(0.25)
    assert traced["computed_by_phase"] == {"gen": 0.0, "update_actor": pytest.approx(0.5)}


def test_the_threads_of_a_worker_are_its_device_on_a_cpu(tmp_path: Path) -> None:
    folder = tmp_path / "profile" / "step_000003"
    write(folder, "driver", 0, ranges(("step", 0, 1000, 0), ("update_actor", 0, 1000, 1)))
    made = ranges(("actor_update", 0, 800, 0))
    made[0]["processor_ns"] = 1200 * MS
    write(folder, "actor", 0, made, slot=0)
    (device,) = summarize(RunFiles(tmp_path), {}, ())["steps"][0]["devices"]
    assert device["computed"] == pytest.approx(0.6), "1.2 s of processor time on two threads in a second"


def test_a_comparison_is_one_page_with_both_steps_and_the_operations_that_differ(tmp_path: Path) -> None:
    summaries = []
    for name, length in (("before", 100_000), ("after", 50_000)):
        folder = a_step(tmp_path / name)
        write_trace(
            folder / "actor-0.trace.json.gz", event("aten::mm", 700_000, length), event("aten::mul", 690_000, 9)
        )
        summaries.append(summarize(RunFiles(tmp_path / name), {}, ()))
    text = write_comparison(RunFiles(tmp_path / "before"), *summaries).read_text()
    page = Page(text)
    assert page.fetched == [] and page.tags.count("svg") == 1
    assert [one for one in ("aten::mm", "0.50x", "before", "after") if one not in page.text] == []
    first, second = compare_operations(*summaries)
    assert (first["operation"], first["times"]) == ("aten::mm", pytest.approx(0.5)) and second["times"] == 1.0


def test_two_profiles_are_held_against_each_other_by_phase() -> None:
    def one(seconds: float, **phases: float) -> dict[str, Any]:
        return {"seconds": seconds, "phases": [{"name": name, "seconds": s} for name, s in phases.items()]}

    first = {"steps": [one(9.0, gen=7.0), one(2.0, gen=1.0, ref=0.5), one(3.0, gen=2.0, ref=0.6)]}
    second = {"steps": [one(1.5, gen=1.0, values=0.1)]}
    assert compare(first, second) == [
        {"phase": "step", "first_s": 3.0, "second_s": 1.5, "times": 0.5},
        {"phase": "gen", "first_s": 2.0, "second_s": 1.0, "times": 0.5},
        {"phase": "ref", "first_s": 0.55, "second_s": None, "times": None},
        {"phase": "values", "first_s": None, "second_s": 0.1, "times": None},
    ]
