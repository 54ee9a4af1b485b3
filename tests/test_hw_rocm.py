"""Whole hosts with AMD GPUs, surveyed from made-up files and commands."""

from __future__ import annotations

from pathlib import Path

import pytest
from rlctl_hw.probe import survey
from rlctl_hw.record import recording, replay, save
from rlctl_hw.types import Hardware

from tests.accelerator_hosts import NODES, fixture, io_links, kfd_files, make_host

HIVE = 7012345678901234567
STATIC = "amd-smi static --asic --bus --vram --driver --json"
TOPOLOGY = "amd-smi topology --json"
CARDS = [{"unique_id": 0xA000000000000000 + i} for i in range(8)]


def visible(root: Path, **env: str) -> Hardware:
    return survey(make_host(root, kfd_files(CARDS, 191.984375), env=env))


def on_bus(address: str) -> dict[str, str]:
    bus = f"/sys/bus/pci/devices/{address}"
    return {f"{bus}/vendor": "0x1002\n", f"{bus}/class": "0x120000\n"}


def indices(found: Hardware) -> list[int]:
    return [device.index for device in found.devices]


def test_eight_whole_mi300x_from_the_driver_alone(tmp_path: Path):
    found = survey(make_host(tmp_path, kfd_files(CARDS, 191.984375)))
    assert (found.kind, len(found.devices), found.islands) == ("rocm", 8, (tuple(range(8)),))
    device = found.devices[3]
    assert (device.name, device.catalogue, device.architecture) == ("AMD Instinct MI300X", "mi300x-192gb", "gfx942")
    assert (device.memory_gib, device.partition, device.pci) == (191.984375, "SPX", "0000:04:00.0")
    assert device.uuid == "GPU-a000000000000003"
    assert {link.kind for link in found.links} == {"XGMI"}
    assert (found.facts["rocm.driver"].value, found.facts["rocm.runtime"].value) == ("6.12.12", "6.4.1-83")


def test_partitions_have_their_share_and_their_card(tmp_path: Path):
    parts = [
        {"unique_id": 0xA000000000000000 + card, "simd_count": 152, "num_xcc": 1, "location_id": (card + 1 << 8) + part}
        for card in range(8)
        for part in range(8)
    ]
    found = survey(make_host(tmp_path, kfd_files(parts, 23.99)))
    assert len(found.devices) == 64
    assert {device.partition for device in found.devices} == {"CPX"}
    assert len({device.pci for device in found.devices}) == 8
    assert found.devices[63].memory_gib == pytest.approx(23.99)
    # Speeds in the catalogue are those of whole cards.
    assert found.devices[63].catalogue is None
    assert found.islands == (tuple(range(64)),)


def test_a_container_with_one_partition_knows_that_it_is_one(tmp_path: Path):
    part = {"simd_count": 152, "num_xcc": 1, "unique_id": 77}
    (device,) = survey(make_host(tmp_path, kfd_files([part], 23.99))).devices
    assert device.partition == "CPX"


def test_the_drivers_word_for_the_partition_is_kept(tmp_path: Path):
    files = kfd_files([{"num_xcc": 4, "simd_count": 608, "unique_id": 77}], 95.9)
    files["/sys/class/drm/renderD128/device/current_compute_partition"] = "DPX\n"
    assert survey(make_host(tmp_path, files)).devices[0].partition == "DPX"


def test_mi308x_is_not_taken_for_an_mi300x(tmp_path: Path):
    gpus = [{"device_id": 0x74A2, "simd_count": 320, "num_xcc": 4, "unique_id": 90 + i} for i in range(8)]
    found = survey(make_host(tmp_path, kfd_files(gpus, 191.984375)))
    assert {(device.catalogue, device.partition) for device in found.devices} == {("mi308x-192gb", "SPX")}


def test_an_mi250x_is_two_devices_of_64_gib(tmp_path: Path):
    dies = [
        {"device_id": 0x7408, "simd_count": 440, "num_xcc": 1, "gfx_target_version": 90010, "unique_id": 500 + i}
        for i in range(8)
    ]
    found = survey(make_host(tmp_path, kfd_files(dies, 63.98)))
    assert len(found.devices) == 8
    device = found.devices[0]
    assert (device.catalogue, device.partition, device.architecture) == ("mi250x-64gb", "GCD", "gfx90a")


def test_cards_in_two_hives_are_two_islands(tmp_path: Path):
    files = kfd_files([{"hive_id": 1 + i // 2} for i in range(4)], 191.98)
    assert survey(make_host(tmp_path, files)).islands == ((0, 1), (2, 3))


def test_a_link_that_is_told_overrides_the_hive(tmp_path: Path):
    files = kfd_files([{"hive_id": 0}, {"hive_id": HIVE}, {"hive_id": HIVE}], 191.98)
    files |= io_links(2, {0: 2, 3: 11}) | io_links(3, {4: 2})
    found = survey(make_host(tmp_path, files))
    assert [(link.first, link.second, link.kind) for link in found.links] == [
        (0, 1, "XGMI"), (0, 2, "PCIE"), (1, 2, "PCIE"),
    ]  # fmt: skip
    assert found.islands == ((0, 1), (2,))
    assert found.facts["rocm.islands"].value == [[0, 1], [2]]


def test_memory_that_is_not_told_is_assumed_and_said_so(tmp_path: Path):
    found = survey(make_host(tmp_path, kfd_files([{}], None)))
    assert found.devices[0].memory_gib == pytest.approx(191.9)
    assert "assumed" in str(found.facts["rocm.visible"].error)


def test_an_unknown_part_keeps_what_the_tools_say(tmp_path: Path):
    files = kfd_files([{"device_id": 0x7FFF, "gfx_target_version": 120500, "location_id": 0x0500}], 48)
    printed = '[{"gpu": 0, "asic": {"market_name": "AMD Instinct MI999"}, "bus": {"bdf": "0000:05:00.0"}}]'
    (device,) = survey(make_host(tmp_path, files, {STATIC: printed})).devices
    assert (device.name, device.catalogue, device.architecture) == ("AMD Instinct MI999", None, "gfx1250")


def test_a_gpu_inside_a_cpu_does_not_make_a_laptop_a_gpu_machine(tmp_path: Path):
    files = kfd_files([{"device_id": 0x164E, "gfx_target_version": 100306, "num_xcc": 1}], 15.2)
    files["/sys/class/drm/renderD128/device/mem_info_vram_total"] = str(512 * 2**20)
    found = survey(make_host(tmp_path, files))
    assert found.kind == "cpu"
    assert "0.5 GiB of its own are too few" in str(found.facts["rocm.visible"].error)


def test_gpus_that_differ_are_told(tmp_path: Path):
    found = survey(make_host(tmp_path, kfd_files([{}, {"device_id": 0x74A5}], 191.98)))
    assert found.facts["rocm.mixed"].value == ["AMD Instinct MI300X", "AMD Instinct MI325X"]


def test_gpus_in_use_are_told(tmp_path: Path):
    files = kfd_files(CARDS[:2], 191.98)
    files["/sys/class/drm/renderD128/device/mem_info_vram_used"] = "297611264"
    files["/sys/class/drm/renderD129/device/mem_info_vram_used"] = str(40 * 2**30)
    fact = survey(make_host(tmp_path, files)).facts["rocm.used_gib"]
    assert (fact.value, fact.error) == ({"0": 0.28, "1": 40.0}, "already in use: GPU 1: 40 GiB")


def test_the_use_of_a_card_is_not_the_use_of_its_parts(tmp_path: Path):
    files = kfd_files(
        [{"simd_count": 152, "num_xcc": 1, "unique_id": 7, "location_id": 0x500 + i} for i in range(8)], 24
    )
    files["/sys/class/drm/renderD128/device/mem_info_vram_used"] = str(40 * 2**30)
    assert "rocm.used_gib" not in survey(make_host(tmp_path, files)).facts


def test_nodes_that_may_not_be_read_belong_to_others(tmp_path: Path):
    files = {name: text for name, text in kfd_files(CARDS, 191.98).items() if f"{NODES}/4/" not in name}
    (tmp_path / NODES.lstrip("/") / "4").mkdir(parents=True)
    found = survey(make_host(tmp_path, files))
    assert indices(found) == [0, 1, 3, 4, 5, 6, 7]
    assert found.facts["rocm.withheld"].value == ["GPU 2"]
    assert "rocm.missing" not in found.facts


def test_a_gpu_without_its_render_node_cannot_be_used(tmp_path: Path):
    files = {name: text for name, text in kfd_files(CARDS, 191.98).items() if name != "/dev/dri/renderD129"}
    found = survey(make_host(tmp_path, files))
    assert 1 not in indices(found)
    assert len(found.facts["rocm.physical"].value) == 8
    assert found.facts["rocm.withheld"].value == ["GPU 1"]


def test_a_container_without_any_render_node_is_told_what_to_give(tmp_path: Path):
    files = {name: text for name, text in kfd_files(CARDS, 191.98).items() if "/dev/dri/" not in name}
    found = survey(make_host(tmp_path, files))
    assert found.kind == "cpu"
    assert "--device=/dev/dri" in str(found.facts["rocm.physical"].error)


def test_without_the_compute_device_file_nothing_can_be_used(tmp_path: Path):
    files = {name: text for name, text in kfd_files(CARDS, 191.98).items() if name != "/dev/kfd"}
    found = survey(make_host(tmp_path, files))
    assert found.kind == "cpu"
    assert "--device=/dev/kfd" in str(found.facts["rocm.physical"].error)


@pytest.mark.parametrize("file", ["/dev/kfd", "/dev/dri/renderD128"])
def test_a_device_file_that_may_not_be_opened_names_the_group(tmp_path: Path, file: str):
    found = survey(make_host(tmp_path, kfd_files(CARDS[:1], 191.98), locked=(file,)))
    assert found.kind == "cpu"
    assert "render" in str(found.facts["rocm.physical"].error)


def test_a_card_without_its_driver_is_seen_on_the_bus(tmp_path: Path):
    found = survey(
        make_host(tmp_path, on_bus("0000:05:00.0"), {f"{STATIC}": "ERROR:root:Unable to detect any GPU devices\n"})
    )
    assert found.kind == "cpu"
    error = str(found.facts["rocm.physical"].error)
    assert "amdgpu is not loaded" in error and "Unable to detect" in error


def test_a_card_that_fell_from_the_driver_is_missed(tmp_path: Path):
    files = kfd_files(CARDS[:7], 191.98)
    for card in range(8):
        files |= on_bus(f"0000:{card + 1:02x}:00.0")
    assert survey(make_host(tmp_path, files)).facts["rocm.missing"].value == ["0000:08:00.0"]


def test_a_tool_that_is_not_on_the_path_is_found_where_rocm_lies(tmp_path: Path):
    printed = {f"/opt/rocm/bin/{STATIC}": fixture("amd/amd_smi_static_gpu_data.json")}
    found = survey(make_host(tmp_path, {"/opt/rocm/bin/amd-smi": ""}, printed))
    assert len(found.devices) == 2


def test_a_machine_without_amd_says_so_in_a_few_words(tmp_path: Path):
    found = survey(make_host(tmp_path, {}))
    assert found.facts["rocm.physical"].error == "no AMD driver and no tool of ROCm here"
    assert found.facts["rocm.driver"].value is None


def test_amd_smi_stands_in_for_the_driver(tmp_path: Path):
    commands = {
        STATIC: fixture("amd/amd_smi_static_gpu_data.json"),
        TOPOLOGY: fixture("amd/amd_smi_topology.json"),
    }
    found = survey(make_host(tmp_path, {}, commands))
    assert [device.catalogue for device in found.devices] == ["mi325x-256gb"] * 2
    assert found.islands == ((0, 1),)
    assert found.facts["rocm.physical"].source == "amd-smi"


def test_rocm_smi_stands_in_for_amd_smi(tmp_path: Path):
    ask = "rocm-smi --showproductname --showid --showuniqueid --showbus --showmeminfo vram --showdriverversion"
    commands = {
        f"{ask} --json": "Driver not initialized\n",
        ask: fixture("amd/rocm_smi_text.txt"),
        "rocm-smi --showtopo": fixture("amd/rocm_smi_topo.txt"),
    }
    found = survey(make_host(tmp_path, {}, commands))
    assert [device.catalogue for device in found.devices] == ["mi300x-192gb"] * 2
    assert found.islands == ((0, 1),)


def test_rocminfo_stands_in_for_both(tmp_path: Path):
    found = survey(make_host(tmp_path, {}, {"rocminfo": fixture("amd/rocminfo.txt")}))
    assert [device.catalogue for device in found.devices] == ["mi250x-64gb"] * 2
    assert found.islands == ()
    assert found.facts["rocm.islands"].error


def test_a_driver_that_is_not_initialized_is_told_though_the_tool_ends_well(tmp_path: Path):
    ask = "rocm-smi --showproductname --showid --showuniqueid --showbus --showmeminfo vram --showdriverversion"
    commands = {f"{ask} --json": "Driver not initialized\n", ask: "Driver not initialized\n"}
    found = survey(make_host(tmp_path, {}, commands))
    assert "Driver not initialized" in str(found.facts["rocm.physical"].error)


def test_an_in_kernel_driver_goes_by_the_kernels_version(tmp_path: Path):
    files = kfd_files(CARDS[:1], 191.98) | {"/proc/sys/kernel/osrelease": "6.11.0\n"}
    del files["/sys/module/amdgpu/version"]
    (tmp_path / "sys/module/amdgpu").mkdir(parents=True)
    assert survey(make_host(tmp_path, files)).facts["rocm.driver"].value == "in-kernel 6.11.0"


def test_the_rocm_in_use_goes_before_the_usual_place(tmp_path: Path):
    files = kfd_files(CARDS[:1], 191.98) | {"/opt/rocm-7.0.2/.info/version": "7.0.2\n"}
    fact = survey(make_host(tmp_path, files, env={"ROCM_PATH": "/opt/rocm-7.0.2"})).facts["rocm.runtime"]
    assert (fact.value, fact.source) == ("7.0.2", "/opt/rocm-7.0.2/.info/version")


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({}, [0, 1, 2, 3, 4, 5, 6, 7]),
        ({"HIP_VISIBLE_DEVICES": "5,2"}, [5, 2]),
        ({"CUDA_VISIBLE_DEVICES": "5,2"}, [5, 2]),
        ({"ROCR_VISIBLE_DEVICES": "4,5,6", "HIP_VISIBLE_DEVICES": "2,0"}, [6, 4]),
        ({"ROCR_VISIBLE_DEVICES": "4,5,6", "CUDA_VISIBLE_DEVICES": "1"}, [5]),
        ({"ROCR_VISIBLE_DEVICES": "GPU-A000000000000006,0"}, [6, 0]),
        ({"HIP_VISIBLE_DEVICES": "GPU-a000000000000001"}, [1]),
        ({"HIP_VISIBLE_DEVICES": "1", "CUDA_VISIBLE_DEVICES": "7"}, [1]),
        ({"ROCR_VISIBLE_DEVICES": "3,9,1"}, [3]),
        ({"ROCR_VISIBLE_DEVICES": "3,1,3,2"}, [3, 1]),
        ({"HIP_VISIBLE_DEVICES": "3,1,3,2"}, [3, 1, 2]),
        ({"HIP_VISIBLE_DEVICES": "-1"}, []),
        ({"ROCR_VISIBLE_DEVICES": ""}, []),
        ({"HIP_VISIBLE_DEVICES": "NoDevFiles"}, []),
        ({"ROCR_VISIBLE_DEVICES": "2", "HIP_VISIBLE_DEVICES": "2"}, []),
    ],
)
def test_rocr_hides_first_and_hip_counts_what_is_left(tmp_path: Path, env: dict[str, str], expected: list[int]):
    found = visible(tmp_path, **env)
    assert (indices(found) if found.kind == "rocm" else []) == expected
    assert len(found.facts["rocm.physical"].value) == 8


@pytest.mark.parametrize(
    ("env", "words"),
    [
        ({"HIP_VISIBLE_DEVICES": "1", "CUDA_VISIBLE_DEVICES": "7"}, "differ"),
        ({"ROCR_VISIBLE_DEVICES": "1"}, "Ray refuses"),
        ({"ROCR_VISIBLE_DEVICES": "1", "HIP_VISIBLE_DEVICES": "0,1"}, "more entries"),
        ({"HIP_VISIBLE_DEVICES": ""}, "-1 hides"),
        ({"ROCR_VISIBLE_DEVICES": "2", "HIP_VISIBLE_DEVICES": "2"}, "no single device is called 2"),
    ],
)
def test_variables_that_contradict_each_other_are_told(tmp_path: Path, env: dict[str, str], words: str):
    assert words in str(visible(tmp_path, **env).facts["rocm.visible"].error)


def test_a_recorded_machine_is_surveyed_alike(tmp_path: Path):
    host = recording(make_host(tmp_path / "host", kfd_files(CARDS[:2], 191.984375)))
    before = survey(host)
    save(host, tmp_path / "record", names=[])
    after = survey(replay(tmp_path / "record"))
    assert [device.pci for device in after.devices] == [device.pci for device in before.devices]
    assert (after.islands, after.links) == (before.islands, before.links)
    assert len({device.uuid for device in after.devices}) == 2
