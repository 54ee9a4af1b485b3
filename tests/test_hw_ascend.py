"""Whole hosts with Ascend NPUs, surveyed from made-up files and commands."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest
from rlctl_hw.probe import survey
from rlctl_hw.record import recording, replay, save
from rlctl_hw.types import Hardware

from tests.accelerator_hosts import fixture, make_host

ASCEND = "/usr/local/Ascend"
BOARD = "npu-smi info -t board -i 0 -c 0"
TOPOLOGY = "npu-smi info -t topo"
MAP = "npu-smi info -m"
A2 = {
    "npu-smi info": fixture("ascend/info_a2_910b3.txt"),
    BOARD: fixture("ascend/board_a2.txt"),
    TOPOLOGY: fixture("ascend/topo_a2.txt"),
}
A3 = {
    "npu-smi info": fixture("ascend/info_a3.txt"),
    BOARD: fixture("ascend/board_a3.txt"),
    TOPOLOGY: fixture("ascend/topo_a3.txt"),
}


def device_files(numbers: Iterable[int]) -> dict[str, str]:
    return {"/dev/davinci_manager": ""} | {f"/dev/davinci{number}": "" for number in numbers}


def eight(root: Path, **env: str) -> Hardware:
    return survey(make_host(root, device_files(range(8)), A2, env))


def indices(found: Hardware) -> list[int]:
    return [device.index for device in found.devices if device.kind == "ascend"]


def test_eight_910b3(tmp_path: Path):
    found = eight(tmp_path)
    assert (found.kind, len(found.devices), found.islands) == ("ascend", 8, (tuple(range(8)),))
    device = found.devices[5]
    assert (device.name, device.catalogue, device.architecture) == ("910B3", "910b3-64gb", "Ascend910B3")
    assert (device.memory_gib, device.partition, device.pci) == (64.0, None, "0000:02:00.0")
    assert found.facts["ascend.npu_smi"].value == "24.1.0"
    used = found.facts["ascend.used_gib"]
    assert (used.value["3"], used.error) == (3.23, "already in use: NPU 3: 50.0 GiB")


def test_sixteen_dies_of_an_a3(tmp_path: Path):
    found = survey(make_host(tmp_path, device_files(range(16)), A3))
    assert indices(found) == list(range(16))
    device = found.devices[11]
    assert (device.architecture, device.partition, device.memory_gib) == ("Ascend910_9392", "die 1", 64.0)
    assert device.catalogue is not None and "910" in device.catalogue
    assert found.islands == (tuple(range(16)),)
    assert {link.kind for link in found.links} == {"SIO", "HCCS_SW"}


def test_a_container_with_one_die_does_not_count_its_twin(tmp_path: Path):
    commands = {"npu-smi info": fixture("ascend/info_a3_container.txt")}
    found = survey(make_host(tmp_path, device_files([3]), commands))
    assert indices(found) == [3]
    assert found.facts["ascend.withheld"].value == ["/dev/davinci2"]


def test_a_container_with_one_npu(tmp_path: Path):
    commands = {"npu-smi info": fixture("ascend/info_container_910b3.txt")}
    found = survey(make_host(tmp_path, device_files([5]), commands, {"ASCEND_VISIBLE_DEVICES": "5"}))
    assert [(device.index, device.pci) for device in found.devices] == [(5, "0000:02:00.0")]
    assert found.facts["ascend.visible"].error is None
    assert (found.islands, found.links) == (((0,),), ())


def test_a_tool_that_shows_more_than_the_container_has_is_matched_by_its_map(tmp_path: Path):
    mapped = "\tNPU ID   Chip ID   Chip Logic ID   Chip Name\n" + "".join(
        f"\t{n}   0   {n}   Ascend 910B3\n\t{n}   1   -   Mcu\n" for n in range(8)
    )
    found = survey(make_host(tmp_path, device_files([2, 6]), A2 | {MAP: mapped}))
    assert indices(found) == [2, 6]
    assert [device.pci for device in found.devices] == ["0000:81:00.0", "0000:41:00.0"]


def test_a_310p_is_no_part_of_the_catalogue(tmp_path: Path):
    commands = {"npu-smi info": fixture("ascend/info_310p_duo.txt")}
    found = survey(make_host(tmp_path, device_files([0, 1]), commands))
    assert [device.name for device in found.devices] == ["310P3", "310P3"]
    assert {(device.catalogue, device.architecture) for device in found.devices} == {(None, "Ascend310P3")}
    assert found.devices[0].memory_gib == pytest.approx(43.2, abs=0.1)
    assert found.facts["ascend.islands"].error


def test_a_950_is_asked_by_card(tmp_path: Path):
    board = "NPU ID : 0\nNPU Name : 9579\nChip Name : Ascend950DT\n"
    commands = {
        "npu-smi info": fixture("ascend/info_950.txt"),
        "npu-smi info -t board -i 0": board,
        TOPOLOGY: "       NPU0  NPU1  NPU2\nNPU0   X     UB    UB\nNPU1   UB    X     UB\nNPU2   UB    UB    X\n",
    }
    found = survey(make_host(tmp_path, device_files(range(3)), commands))
    assert found.devices[0].architecture == "Ascend950DT_9579"
    assert found.islands == ((0, 1, 2),)


def test_a_bare_910b_with_ddr_is_the_first_910(tmp_path: Path):
    commands = {"npu-smi info": fixture("ascend/info_first_910.txt")}
    device = survey(make_host(tmp_path, device_files([0, 1]), commands)).devices[0]
    assert (device.name, device.architecture, device.memory_gib) == ("910B", "Ascend910A", 32.0)
    assert device.catalogue == "910a-32gb"


def test_links_between_some_make_islands(tmp_path: Path):
    commands = A2 | {TOPOLOGY: fixture("ascend/topo_two_islands.txt")}
    found = survey(make_host(tmp_path, device_files(range(8)), commands, {"ASCEND_RT_VISIBLE_DEVICES": "0,1,2,3"}))
    assert found.islands == ((0, 1), (2, 3))


def test_rows_called_by_card_are_matched_by_card(tmp_path: Path):
    info = "\n".join(fixture("ascend/info_a2_910b3.txt").splitlines()[:11])
    two = info.replace("| 0     910B3", "| 8     910B3").replace("| 1     910B3", "| 9     910B3")
    topo = "      NPU8   NPU9   CPU Affinity\nNPU8   X      HCCS   0-23\nNPU9   HCCS   X      0-23\n"
    found = survey(make_host(tmp_path, device_files([0, 1]), {"npu-smi info": two, TOPOLOGY: topo}))
    assert found.islands == ((0, 1),)


def test_an_npu_in_alarm_is_left_out_and_named(tmp_path: Path):
    commands = A2 | {"npu-smi info": fixture("ascend/info_a2_alarm.txt")}
    found = survey(make_host(tmp_path, device_files(range(8)), commands))
    assert indices(found) == [0, 1, 3, 4, 5, 6, 7]
    assert found.facts["ascend.physical"].error == "in error: NPU 2 (Alarm); with a warning: NPU 6"
    assert "NPU 2 is left out" in str(found.facts["ascend.visible"].error)
    assert found.islands == (tuple(range(7)),)


def test_a_driver_that_refuses_says_what_to_do(tmp_path: Path):
    told = "DrvMngGetConsoleLogLevel failed. (ret=4)\ndcmi module initialize failed. ret is -8005\n"
    found = survey(make_host(tmp_path, device_files(range(8)), {"npu-smi info": told}))
    assert found.kind == "cpu"
    fact = found.facts["ascend.physical"]
    assert (fact.value, len(found.facts["ascend.missing"].value)) == ([], 8)
    assert found.facts["ascend.driver"].value == "loaded"
    assert "-8005" in str(fact.error) and "reboot" in str(fact.error)


def test_cards_without_their_driver_are_seen_on_the_bus(tmp_path: Path):
    bus = "/sys/bus/pci/devices/0000:c1:00.0"
    files = {f"{bus}/vendor": "0x19e5\n", f"{bus}/class": "0x120000\n", f"{bus}/device": "0xd802\n"}
    found = survey(make_host(tmp_path, files))
    assert "1 Ascend NPUs are on the bus" in str(found.facts["ascend.physical"].error)


def test_a_container_without_the_manager_is_told(tmp_path: Path):
    found = survey(make_host(tmp_path, {"/dev/davinci0": ""}))
    assert "--device=/dev/davinci_manager" in str(found.facts["ascend.physical"].error)
    assert found.facts["ascend.missing"].value == ["/dev/davinci0"]


def test_an_npu_that_the_tool_does_not_show_is_missed(tmp_path: Path):
    commands = A3 | {"npu-smi info": fixture("ascend/info_a3_container.txt")}
    found = survey(make_host(tmp_path, device_files([2, 3, 4]), commands))
    assert (indices(found), found.facts["ascend.missing"].value) == ([2, 3], ["/dev/davinci4"])


def test_a_tool_that_is_not_on_the_path_is_found_where_the_driver_puts_it(tmp_path: Path):
    files = device_files(range(8)) | {"/usr/local/sbin/npu-smi": ""}
    found = survey(make_host(tmp_path, files, {f"/usr/local/sbin/{line}": text for line, text in A2.items()}))
    assert (len(found.devices), found.islands) == (8, (tuple(range(8)),))


def test_a_machine_without_ascend_has_no_npu(tmp_path: Path):
    found = survey(make_host(tmp_path, {}))
    assert found.facts["ascend.physical"].value == []
    assert found.facts["ascend.driver"].value is None


def test_the_manager_is_no_device(tmp_path: Path):
    found = survey(make_host(tmp_path, {"/dev/davinci_manager": ""}))
    assert found.facts["ascend.physical"].value == []


def test_versions_of_both_layouts(tmp_path: Path):
    record = "ascend_toolkit_install.info"
    files = {
        f"{ASCEND}/driver/version.info": fixture("ascend/driver_version.info"),
        f"{ASCEND}/firmware/version.info": fixture("ascend/firmware_version.info"),
        f"{ASCEND}/ascend-toolkit/latest/x86_64-linux/{record}": fixture("ascend/cann_install_8.1.info"),
    }
    facts = survey(make_host(tmp_path / "old", files)).facts
    assert (facts["ascend.driver"].value, facts["ascend.firmware"].value) == ("24.1.0", "7.5.0.1.129")
    assert facts["ascend.cann"].value == "8.1.RC1"
    files[f"{ASCEND}/cann/aarch64-linux/{record}"] = fixture("ascend/cann_install.info")
    assert survey(make_host(tmp_path / "new", files)).facts["ascend.cann"].value == "8.5.0"
    used = {"ASCEND_TOOLKIT_HOME": f"{ASCEND}/ascend-toolkit/latest"}
    assert survey(make_host(tmp_path / "used", files, env=used)).facts["ascend.cann"].value == "8.1.RC1"


def test_an_installation_elsewhere_is_found_by_its_record(tmp_path: Path):
    files = {
        "/etc/ascend_install.info": "UserName=HwHiAiUser\nDriver_Install_Path_Param=/opt/Ascend\n",
        "/opt/Ascend/driver/version.info": fixture("ascend/driver_version.info"),
    }
    assert survey(make_host(tmp_path, files)).facts["ascend.driver"].value == "24.1.0"


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("1,2,3", [1, 2, 3]), ("3,1", [3, 1]), ("1, 2,3", [1]), ("1,3,8", [1, 3]), ("1,2,-1,3", [1, 2]), ("", []),
        ("-1", []), ("NoDevFiles", []), ("2,2,3", [2]),
    ],
)  # fmt: skip
def test_the_runtimes_list_ends_at_what_it_does_not_know(tmp_path: Path, setting: str, expected: list[int]):
    assert indices(eight(tmp_path, ASCEND_RT_VISIBLE_DEVICES=setting)) == expected


@pytest.mark.parametrize(("setting", "words"), [("3,1", "ascending"), ("1, 2", "reads only"), ("1,9", "called 9")])
def test_odd_lists_are_told(tmp_path: Path, setting: str, words: str):
    assert words in str(eight(tmp_path, ASCEND_RT_VISIBLE_DEVICES=setting).facts["ascend.visible"].error)


def test_the_containers_variable_hides_nothing_from_a_process(tmp_path: Path):
    found = eight(tmp_path, ASCEND_VISIBLE_DEVICES="0,1")
    assert len(found.devices) == 8
    assert "ASCEND_RT_VISIBLE_DEVICES hides devices" in str(found.facts["ascend.visible"].error)


def test_inside_a_container_the_runtimes_numbers_start_at_0(tmp_path: Path):
    commands = A3 | {"npu-smi info": fixture("ascend/info_a3_container.txt")}
    found = survey(make_host(tmp_path, device_files([2, 3]), commands, {"ASCEND_RT_VISIBLE_DEVICES": "1"}))
    assert indices(found) == [3]


def test_a_recorded_machine_is_surveyed_alike(tmp_path: Path):
    host = recording(make_host(tmp_path / "host", device_files(range(16)), A3))
    before = survey(host)
    save(host, tmp_path / "record", names=[])
    after = survey(replay(tmp_path / "record"))
    assert after.devices == before.devices
    assert (after.links, after.islands) == (before.links, before.islands)
