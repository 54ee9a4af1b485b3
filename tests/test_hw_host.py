"""The plain host: network ports, containers, and what a host tells or keeps to itself."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rlctl_hw import torch_view
from rlctl_hw.host import Host
from rlctl_hw.nics import is_active, nearest_devices, parse_rate, parse_speed, read_nics
from rlctl_hw.plain import read_plain
from rlctl_hw.types import Device, Fact, Link, Nic
from rlctl_hw.vendors import cpu
from rlctl_hw.visibility import Name, select

RDMA, ETHERNET = "/sys/class/infiniband", "/sys/class/net"


def host_with(root: Path, files: dict[str, str], env: dict[str, str] | None = None) -> Host:
    for name, text in files.items():
        path = root / name.lstrip("/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return Host(root, env or {})


def port(name: str, state: str, rate: str = "200 Gb/sec (4X HDR)", layer: str = "InfiniBand") -> dict[str, str]:
    at = f"{RDMA}/{name}"
    return {f"{at}/state": state, f"{at}/rate": rate, f"{at}/link_layer": layer}


def card(name: str, speed: str, state: str = "up") -> dict[str, str]:
    at = f"{ETHERNET}/{name}"
    return {f"{at}/device/vendor": "", f"{at}/operstate": state, f"{at}/speed": speed}


def test_only_active_ports_count_whatever_they_are_called(tmp_path: Path):
    files = (
        port("ibp23s0/ports/1", "4: ACTIVE")
        | port("mlx5_ib0/ports/2", "4: ACTIVE", "100 Gb/sec (4X EDR)", "Ethernet")
        | port("mlx5_1/ports/1", "1: DOWN")
        | port("mlx5_2/ports/1", "2: INIT")
    )
    nics, facts = read_nics(host_with(tmp_path, files))
    assert nics == (Nic("ibp23s0", 25.0, "InfiniBand"), Nic("mlx5_ib0:2", 12.5, "Ethernet"))
    assert facts["nics.rdma"].error == "not active: mlx5_1, mlx5_2"


def test_without_rdma_the_ethernet_ports_with_hardware_serve(tmp_path: Path):
    files = card("eth0", "25000") | card("eth1", "-1") | card("eth2", "10000", "down")
    files |= {f"{ETHERNET}/lo/operstate": "unknown", f"{ETHERNET}/docker0/operstate": "up"}
    nics, _ = read_nics(host_with(tmp_path, files))
    assert nics == (Nic("eth0", 3.125, "Ethernet"), Nic("eth1", None, "Ethernet"))


def test_an_ethernet_port_that_serves_rdma_is_not_counted_twice(tmp_path: Path):
    files = port("mlx5_0/ports/1", "4: ACTIVE") | card("eth0", "200000")
    files |= {f"{ETHERNET}/eth0/device/infiniband/mlx5_0": ""}
    nics, facts = read_nics(host_with(tmp_path, files))
    assert [nic.name for nic in nics] == ["mlx5_0"]
    assert facts["nics.ethernet"].value == []


def on_the_bus(root: Path, link: str, way: str) -> None:
    target = root / "sys/devices" / way
    target.mkdir(parents=True)
    (root / link).parent.mkdir(parents=True, exist_ok=True)
    (root / link).symlink_to(target)


def test_a_port_is_near_the_device_behind_the_same_switch(tmp_path: Path):
    on_the_bus(tmp_path, "sys/bus/pci/devices/0000:01:00.0", "pci0000:00/0000:00:01.0/0000:01:00.0")
    on_the_bus(tmp_path, "sys/bus/pci/devices/0000:02:00.0", "pci0000:00/0000:00:02.0/0000:02:00.0")
    on_the_bus(tmp_path, "sys/class/infiniband/a/device", "pci0000:00/0000:00:02.0/0000:03:00.0")
    on_the_bus(tmp_path, "sys/class/infiniband/b/device", "pci0000:80/0000:80:02.0/0000:83:00.0")
    devices = [Device("cuda", i, "X", 1.0, pci=f"0000:0{i + 1}:00.0") for i in range(2)]
    assert nearest_devices(Host(tmp_path, {}), [Nic("a"), Nic("b")], devices) == Fact(
        {"a": [1]}, "PCI paths in /sys/devices"
    )


@pytest.mark.parametrize(
    ("files", "env", "name"),
    [
        ({"/.dockerenv": ""}, {}, "docker"),
        ({"/run/.containerenv": ""}, {}, "podman"),
        ({}, {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, "kubernetes"),
        ({}, {"container": "oci"}, "oci"),
        ({"/proc/1/cgroup": "0::/kubepods.slice/x\n"}, {}, "kubepods"),
        ({"/proc/1/cgroup": "0::/init.scope\n"}, {}, "none"),
    ],
)
def test_a_container_is_known_by_its_marks(tmp_path: Path, files: dict[str, str], env: dict[str, str], name: str):
    assert cpu.probe(host_with(tmp_path, files, env)).facts["host.container"].value == name


def test_a_host_that_tells_nothing_has_errors_and_no_invented_numbers(tmp_path: Path):
    class Silent(Host):
        def answer(self, name: str, question: object) -> None:
            return None

    facts = cpu.probe(Silent(tmp_path, {})).facts
    for key in ("host.cores", "host.memory_gib", "host.shm_gib", "host.cpu"):
        assert facts[key].value is None
        assert facts[key].error


@given(st.text(max_size=60))
def test_no_text_breaks_a_reader_of_the_host(text: str):
    for parse in (cpu.parse_cpu_model, cpu.parse_meminfo, cpu.parse_memory_limit, cpu.parse_cpu_max):
        parse(text)
    cpu.parse_cgroup_paths(text)
    cpu.parse_cpu_quota(text, text)
    assert parse_rate(text) is None or parse_rate(text) >= 0  # type: ignore[operator]
    parse_speed(text)
    assert is_active(text) == (text.partition(":")[2].strip() == "ACTIVE")


@given(st.none() | st.text(alphabet="GPU-0123,MIGNoDevFiles ", max_size=20), st.integers(0, 4))
def test_every_visibility_list_chooses_existing_devices_once(setting: str | None, count: int):
    places = select("CUDA_VISIBLE_DEVICES", setting, [Name(i, f"GPU-{i}a") for i in range(count)]).places
    assert len(set(places)) == len(places)
    assert set(places) <= set(range(count))


def test_listing_and_matching_give_paths_of_the_machine(tmp_path: Path):
    host = host_with(tmp_path, {"/dev/davinci0": "", "/dev/davinci12": "", "/dev/davinci_manager": ""})
    assert host.glob("/dev/davinci[0-9]*") == ["/dev/davinci0", "/dev/davinci12"]
    assert host.listdir("/dev") == ["davinci0", "davinci12", "davinci_manager"]
    assert host.exists("dev/davinci0")
    assert host.listdir("/none") == []
    assert host.resolve("/none") is None


def test_plain_values_become_records_and_back():
    assert read_plain(tuple[Link, ...], [{"first": 0, "second": 1, "kind": "SYS"}]) == (Link(0, 1, "SYS"),)
    assert read_plain(Nic, {"name": "a", "rate_gb_per_s": 2}).rate_gb_per_s == 2.0
    with pytest.raises(ValueError, match=r"kind is 'gpu', not one of"):
        read_plain(Device, {"kind": "gpu", "index": 0, "name": "x", "memory_gib": 1})


def test_torch_is_asked_in_a_process_and_may_be_missing():
    assert "boom" in torch_view.ask_torch("raise SystemExit('boom')")["error"]
    assert "no answer within" in torch_view.ask_torch("import time; time.sleep(9)", limit_s=0.05)["error"]
    assert torch_view.ask_torch("print('noise'); print('{\"version\": \"2\"}')") == {"version": "2"}


def test_what_torch_told_becomes_facts():
    class Told(Host):
        def answer(self, name: str, question: object) -> dict[str, object]:
            return {"version": "2.9", "runtime": "CUDA 12.8", "devices": [{"name": "L4"}], "bf16": True}

    facts = torch_view.torch_facts(Told())
    assert (facts["torch.runtime"].value, facts["torch.bf16"].value) == ("CUDA 12.8", True)
