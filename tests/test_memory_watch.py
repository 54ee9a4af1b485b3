"""Peak memory by phase: measured for real on this host, added up over processes."""

from __future__ import annotations

import pickle
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from rlctl_train import device
from rlctl_train.device_load import Load
from rlctl_train.memory_watch import REST, MemoryWatch, Usage, by_phase, others_gib, parts_by_phase, together
from rlctl_train.out_of_memory import account

MIB = 2**20


def test_a_phase_that_takes_memory_shows_it_and_the_next_does_not() -> None:
    watch = MemoryWatch("cpu")
    with watch.phase("large"):
        held = torch.ones(64 * MIB)
        del held
    with watch.phase("small"):
        pass
    peaks = watch.take().peaks_gib
    assert peaks["large"] - peaks["small"] == pytest.approx(0.25, abs=0.05)


def test_a_phase_that_comes_twice_keeps_its_larger_peak() -> None:
    watch = MemoryWatch("cpu")
    for size in (64 * MIB, 1):
        with watch.phase("update"):
            held = torch.ones(size)
            del held
    assert watch.take().peaks_gib["update"] > watch.take().idle_gib + 0.2


def test_a_report_starts_the_next_one_empty() -> None:
    watch = MemoryWatch("cpu")
    with watch.phase("update"):
        pass
    watch.take()
    assert watch.take().peaks_gib == {}


def test_a_phase_that_fails_is_measured_too() -> None:
    watch = MemoryWatch("cpu")
    with pytest.raises(ValueError, match="broken"), watch.phase("update"):
        raise ValueError("broken")
    assert watch.take().peaks_gib["update"] > 0


def test_time_inside_phases_counts_once_and_starts_anew_with_every_report() -> None:
    watch = MemoryWatch("cpu")
    start = time.perf_counter()
    with watch.phase("update"):
        time.sleep(0.05)
        with watch.phase("optimizer_step"):
            time.sleep(0.05)
    passed = time.perf_counter() - start
    time.sleep(0.05)
    assert 0.1 <= watch.take().busy_s <= passed
    assert watch.take().busy_s == 0


def test_a_cpu_that_computes_is_busy_and_one_that_sleeps_is_not() -> None:
    watch = MemoryWatch("cpu")
    with watch.phase("update"):
        deadline = time.process_time() + 0.1
        while time.process_time() < deadline:
            pass
    working = watch.take()
    with watch.phase("update"):
        time.sleep(0.1)
    sleeping = watch.take()
    assert working.device_s is not None and sleeping.device_s is not None
    assert working.device_s >= 0.1 / torch.get_num_threads() and sleeping.device_s < 0.02
    assert watch.take().device_s is None


@pytest.mark.parametrize(
    ("answer", "seconds"), [(75, 0.75), (ImportError("no pynvml"), None), (RuntimeError("no handle"), None)]
)
def test_an_accelerators_share_is_its_drivers_and_unknown_where_there_is_none(
    answer: int | Exception, seconds: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def utilization() -> int:
        if isinstance(answer, Exception):
            raise answer
        return answer

    module = SimpleNamespace(
        utilization=utilization,
        reset_peak_memory_stats=lambda: None,
        max_memory_allocated=lambda: 0,
        max_memory_reserved=lambda: 0,
        memory_reserved=lambda: 0,
        mem_get_info=lambda: (1, 1),
    )
    monkeypatch.setattr(torch, "get_device_module", lambda kind: module)
    watch = MemoryWatch("cuda")
    with watch.phase("update"):
        time.sleep(0.01)
    taken = watch.take()
    assert taken.device_s == (None if seconds is None else pytest.approx(seconds * taken.busy_s))


def test_those_at_work_count_with_their_peak_and_the_others_with_what_they_hold() -> None:
    trainer = Usage("host", {"actor_update": 5.0, "logprobs": 3.0}, idle_gib=2.0)
    rollout = Usage("host", {"generation": 4.0}, idle_gib=1.0)
    assert by_phase([trainer, rollout]) == {"actor_update": 6.0, "logprobs": 4.0, "generation": 6.0}


def test_the_fullest_place_counts() -> None:
    usages = [Usage("a", {"generation": 4.0}, 1.0), Usage("b", {"generation": 7.0}, 1.0)]
    assert by_phase(usages) == {"generation": 7.0}


def test_what_no_allocator_holds_is_part_of_every_phase() -> None:
    trainer = Usage("gpu", {"actor_update": 5.0}, idle_gib=2.0, allocated_gib=4.5, used_gib=4.5)
    rollout = Usage("gpu", {}, idle_gib=1.0, allocated_gib=0.5, used_gib=4.4)
    assert by_phase([trainer, rollout]) == {"actor_update": pytest.approx(5.0 + 1.0 + 1.5)}


def test_a_phase_inside_another_counts_apart() -> None:
    watch = MemoryWatch("cpu")
    with watch.phase("outer"):
        held = torch.ones(32 * MIB)
        del held
        with watch.phase("inner"):
            held = torch.ones(96 * MIB)
            del held
    peaks = watch.take().peaks_gib
    assert peaks["inner"] - peaks["outer"] == pytest.approx(0.25, abs=0.05)


def test_processes_below_this_one_count_unless_they_are_named() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        everyone, alone = others_gib(()), others_gib((child.pid,))
        child.communicate(b"\n")
    assert everyone > alone > 0


def test_parts_are_counted_in_the_phase_that_holds_them_and_what_stays_between() -> None:
    held = {"weights": 2**30, "gradients": 0}
    watch = MemoryWatch("cpu", lambda: held)
    with watch.phase("actor_update"):
        held["gradients"] = 2**29
        watch.count_parts()
        held["gradients"] = 0
        with watch.phase("optimizer_step"):
            pass
    held["weights"] = 2**29
    taken = watch.take().parts_gib
    process_gib = taken[REST].pop("overhead")
    assert process_gib > 0 and taken[REST] == {"weights": 0.5, "gradients": 0.0}
    assert (taken["actor_update"]["gradients"], taken["actor_update"]["weights"]) == (0.5, 1.0)
    assert list(watch.take().parts_gib) == [REST]


def test_the_parts_of_a_place_are_those_at_work_and_what_the_others_keep() -> None:
    parts = {"actor_update": {"weights": 1.0, "gradients": 0.5}, REST: {"weights": 1.0}}
    trainer = Usage("gpu", {"actor_update": 4.0}, 1.0, 4.0, used_gib=3.5, parts_gib=parts)
    rollout = Usage("gpu", {"generation": 9.0}, 2.0, 2.0, used_gib=3.5, parts_gib={REST: {"weights": 1.5}})
    found = parts_by_phase([trainer, rollout], beside_gib=0.25)
    assert found["actor_update"] == {"overhead": 0.75, "weights": 2.5, "gradients": 0.5, REST: pytest.approx(3.0)}
    assert sum(found["generation"].values()) == pytest.approx(1.0 + 9.0 + 0.5 + 0.25)


def test_an_error_that_memory_ran_out_tells_what_was_held_also_after_travelling() -> None:
    watch = MemoryWatch("cpu", lambda: {"weights": 2**30, "gradients": 0})
    with (
        pytest.raises(RuntimeError, match="allocate memory") as told,
        watch.phase("actor_update"),
        watch.phase("optimizer_step"),
    ):
        torch.empty(2**50)
    assert len(told.value.__notes__) == 1
    arrived = pickle.loads(pickle.dumps(told.value))
    said = account(arrived)
    assert said is not None and said.startswith("weights 1.00 GiB, overhead 0.") and "gradients" not in said
    with pytest.raises(ValueError, match="broken") as other, watch.phase("actor_update"):
        raise ValueError("broken")
    assert account(other.value) is None


def test_a_load_is_sampled_while_the_body_runs_and_at_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter([0.5, 1.0, None])
    monkeypatch.setattr("rlctl_train.device.utilization", lambda kind: next(answers))
    monkeypatch.setattr("rlctl_train.device_load.EVERY_S", 3600.0)
    load, unknown, host = Load("cuda"), Load("cuda"), Load("cpu")
    with load.sampled():
        pass
    assert load.mean() == 0.5
    with load.sampled():
        pass
    assert load.mean() == 0.75 and [share for _, share in load.samples] == [0.5, 1.0]
    with unknown.sampled(), host.sampled():
        pass
    assert unknown.mean() is None and host.mean() is None


def test_amds_driver_tells_its_load_in_sysfs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "0000:c1:00.0"
    folder.mkdir()
    (folder / "gpu_busy_percent").write_text("37\n")
    monkeypatch.setattr(device, "ON_PCI", tmp_path)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    properties = SimpleNamespace(pci_domain_id=0, pci_bus_id=0xC1, pci_device_id=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: properties)
    assert device.utilization("cuda") == 0.37
    (folder / "gpu_busy_percent").unlink()
    assert device.utilization("cuda") is None


def test_reports_of_one_process_come_to_the_larger_peaks_and_parts_the_time_of_all_and_what_is_held_at_the_end() -> (
    None
):
    first = Usage(
        "a", {"update": 4.0, "generation": 1.0}, 1.0, allocated_gib=5.0, used_gib=7.0, busy_s=1.0, device_s=0.5,
        parts_gib={"update": {"gradients": 2.0, "weights": 1.0}, REST: {"weights": 1.0}},
    )  # fmt: skip
    second = Usage(
        "a", {"update": 3.0, "weight_sync": 2.0}, 2.0, allocated_gib=3.0, used_gib=6.0, busy_s=2.0, device_s=None,
        parts_gib={"update": {"gradients": 1.0, "weights": 1.5}, REST: {"weights": 0.0}},
    )  # fmt: skip
    assert together([first, second]) == Usage(
        "a", {"update": 4.0, "generation": 1.0, "weight_sync": 2.0}, 2.0, allocated_gib=5.0, used_gib=6.0, busy_s=3.0,
        device_s=0.5, parts_gib={"update": {"gradients": 2.0, "weights": 1.5}, REST: {"weights": 0.0}},
    )  # fmt: skip
    assert together([first]) == first
