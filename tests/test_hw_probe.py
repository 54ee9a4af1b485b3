"""The survey of a host, on folders made up to look like one, and machines named by a person."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rlctl_hw import probe as probe_module
from rlctl_hw.devices import by_printed_name, catalogue
from rlctl_hw.host import COMMAND_LIMIT_S, CommandResult, Host, run_command
from rlctl_hw.probe import parse_hardware, survey
from rlctl_hw.vendors import cpu

GIB = 2**30


def put(root: Path, files: dict[str, str]) -> Host:
    for name, text in files.items():
        path = root / name.lstrip("/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return Host(root, {}, lambda argv: CommandResult("", None, f"{argv[0]} is not installed"))


def test_cgroup_v2_limits_hold_along_the_chain(tmp_path: Path):
    host = put(
        tmp_path,
        {
            "/proc/meminfo": "MemTotal:       67108864 kB\n",
            "/proc/self/cgroup": "0::/a/b\n",
            "/sys/fs/cgroup/a/memory.max": str(8 * GIB),
            "/sys/fs/cgroup/a/b/memory.max": "max",
            "/sys/fs/cgroup/a/b/cpu.max": "50000 100000",
        },
    )
    facts = cpu.probe(host).facts
    assert facts["host.memory_gib"].value == 8
    assert facts["host.memory_gib"].source == "cgroup memory limit"
    assert facts["host.cores"].value == 1


def test_cgroup_v1_limits_are_found_at_the_root_of_a_container(tmp_path: Path):
    host = put(
        tmp_path,
        {
            "/proc/meminfo": "MemTotal:       67108864 kB\n",
            "/proc/self/cgroup": "4:memory:/docker/123\n2:cpu,cpuacct:/docker/123\n",
            "/sys/fs/cgroup/memory/memory.limit_in_bytes": str(2 * GIB),
            "/sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "-1",
            "/sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000",
        },
    )
    facts = cpu.probe(host).facts
    assert facts["host.memory_gib"].value == 2
    assert facts["host.cores"].value == facts_of_this_machine()


def facts_of_this_machine() -> int:
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def test_the_largest_page_aligned_number_means_no_limit():
    assert cpu.parse_memory_limit("9223372036854771712") is None
    assert cpu.parse_memory_limit("max") is None
    assert cpu.parse_memory_limit(str(GIB)) == GIB


def test_cpu_quotas_become_cores():
    assert cpu.parse_cpu_max("4800000 100000") == 48
    assert cpu.parse_cpu_max("max 100000") is None
    assert cpu.parse_cpu_max("") is None
    assert cpu.parse_cpu_quota("-1", "100000") is None


def test_a_host_without_files_or_tools_is_still_surveyed(tmp_path: Path):
    found = survey(put(tmp_path, {}))
    assert found.kind == "cpu"
    assert found.cpu_cores >= 1
    assert found.host_memory_gib > 0
    assert found.facts["host.shm_gib"].error
    json.dumps(asdict(found))


def test_a_probe_that_breaks_becomes_a_fact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(probe_module.VENDORS, "cuda", f"{__name__}:broken_probe")
    found = survey(put(tmp_path, {}))
    assert found.kind == "cpu"
    assert found.facts["cuda.physical"].error == "RuntimeError: the driver is upset"


def broken_probe(host: Host) -> None:
    raise RuntimeError("the driver is upset")


def test_a_missing_and_a_failing_command_are_told():
    assert "not installed" in str(run_command(["no-such-tool-anywhere"]).error)
    failed = run_command([sys.executable, "-c", "print('bad'); raise SystemExit(9)"])
    assert (failed.code, failed.stdout.strip()) == (9, "bad")
    assert "code 9: bad" in str(failed.error)
    assert COMMAND_LIMIT_S <= 30


def test_a_named_machine_has_its_devices_and_nodes():
    found = parse_hardware("H100-80GB:8x4")
    assert (len(found.devices), found.num_nodes, found.kind) == (8, 4, "cuda")
    assert found.devices[7].compute_capability == "9.0"
    assert 78 < found.devices[0].memory_gib < 80


@pytest.mark.parametrize(
    ("spec", "islands"),
    [
        ("h100-80gb:4", ((0, 1, 2, 3),)),
        ("h100-80gb:16", (tuple(range(8)), tuple(range(8, 16)))),
        ("l4:2", ((0,), (1,))),
        ("mi300x:8x4", (tuple(range(8)),)),
    ],
)
def test_a_named_machine_is_wired_as_its_kind_is_sold(spec: str, islands: tuple[tuple[int, ...], ...]):
    found = parse_hardware(spec)
    assert found.islands == islands
    assert found.devices[1].catalogue


@pytest.mark.parametrize("spec", ["./no-such-file", "none.json", "/"])
def test_a_file_that_is_no_machine_is_said(spec: str):
    with pytest.raises(ValueError, match=r"cannot be read|no record"):
        parse_hardware(spec)


def test_on_cpu_the_count_is_cores():
    found = parse_hardware("cpu:6")
    assert (found.kind, found.cpu_cores, len(found.devices)) == ("cpu", 6, 1)


def test_an_unknown_device_names_the_nearest():
    with pytest.raises(ValueError, match=r"'h10-80gb' is not a known device; nearest: h100-80gb"):
        parse_hardware("h10-80gb:8")


@pytest.mark.parametrize(
    "spec", ["", ":", "h100:0", "h100:8x0", "h100:x4", "cpu:-1", "h100 8", "h100:8x4x2", "cpu:two"]
)
def test_a_malformed_machine_says_the_form(spec: str):
    with pytest.raises(ValueError, match="DEVICE:COUNT"):
        parse_hardware(spec)


@given(st.text(max_size=20))
def test_no_text_is_more_than_a_value_error(spec: str):
    with contextlib.suppress(ValueError):
        assert parse_hardware(spec).devices


def test_catalogue_names_and_aliases_are_unambiguous():
    keys = [name for entry in catalogue() for name in (entry.key, *entry.aliases)]
    names = [name for entry in catalogue() for name in entry.names]
    assert len(keys) == len(set(keys))
    assert len(names) == len(set(names))
    assert all((entry.kind == "cuda") == (entry.compute_capability is not None) for entry in catalogue())


def test_printed_names_match_whole_with_and_without_the_vendor():
    for name in ("NVIDIA L40S", "L40S"):
        entry = by_printed_name(name)
        assert entry is not None
        assert entry.key == "l40s-48gb"
    assert by_printed_name("NVIDIA L40S-24Q") is None
