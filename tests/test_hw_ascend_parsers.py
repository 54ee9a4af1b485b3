"""What npu-smi and Ascend's installers print, read back: every layout, and arbitrary text."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rlctl_hw.host import CommandResult, Host
from rlctl_hw.vendors import ascend, npu_smi
from rlctl_hw.vendors.ascend import resolve_soc
from rlctl_hw.vendors.ascend_software import parse_record
from rlctl_hw.vendors.ascend_visible import count_container_list
from rlctl_hw.vendors.npu_smi import Board, Chip, Mapped

from tests.accelerator_hosts import fixture


def chips(name: str) -> tuple[Chip, ...]:
    return npu_smi.parse_info(fixture(f"ascend/{name}")).chips


def test_a2_has_the_chip_alone_in_its_column():
    found = chips("info_a2_910b3.txt")
    assert [chip.npu_id for chip in found] == list(range(8))
    assert found[7] == Chip(7, 0, "910B3", "OK", "0000:42:00.0", None, 0, 65536, 3307)
    assert found[7].memory_mib == 65536


def test_a3_has_physical_numbers_and_no_power_on_its_second_dies():
    found = chips("info_a3.txt")
    assert [chip.device_id for chip in found] == list(range(16))
    assert {chip.name for chip in found} == {"Ascend910"}
    assert [(chip.npu_id, chip.chip_id) for chip in found[2:4]] == [(1, 0), (1, 1)]


def test_a_310p_has_device_numbers_and_no_hbm():
    found = chips("info_310p_duo.txt")
    assert [(chip.npu_id, chip.device_id) for chip in found] == [(8, 0), (8, 1)]
    assert [(chip.hbm_mib, chip.memory_mib) for chip in found] == [(None, 44280), (None, 43693)]


def test_wider_tables_are_read_by_the_same_names():
    table = npu_smi.parse_info(fixture("ascend/info_wide_26.txt"))
    assert [(chip.name, chip.hbm_mib, chip.ddr_mib) for chip in table.chips] == [("910B4-1", 65536, 0)] * 2
    assert table.version == "26.0.rc2"
    assert [(process.npu_id, process.name, process.memory_mib) for process in table.processes] == [
        (1, "VLLMWorker_TP1", 30720)
    ]


def test_a_950_has_no_chip_numbers_and_a_cell_for_its_own():
    found = chips("info_950.txt")
    assert [(chip.npu_id, chip.chip_id, chip.health) for chip in found] == [
        (0, 0, "OK"),
        (1, 0, "OK"),
        (2, 0, "Warning"),
    ]
    assert (found[1].name, found[1].hbm_mib, found[1].bus_id) == ("Ascend950DT", 98304, None)


def test_a_950_without_its_second_row_is_dropped():
    lines = [line for line in fixture("ascend/info_950.txt").splitlines() if "4157" not in line]
    assert [chip.npu_id for chip in npu_smi.parse_info("\n".join(lines)).chips] == [0, 2]


def test_health_is_kept_as_printed():
    assert [chip.health for chip in chips("info_a2_alarm.txt")][1:7] == ["OK", "Alarm", "OK", "OK", "OK", "Warning"]


def test_processes_belong_to_their_chip():
    first, second = npu_smi.parse_info(fixture("ascend/info_a2_910b3.txt")).processes
    assert (first.npu_id, first.chip_id, first.name, first.memory_mib) == (3, 0, "python3", 40960)
    assert second.name == "ray::Worker"


def test_a_line_without_its_partner_is_dropped():
    lines = fixture("ascend/info_a2_910b3.txt").splitlines()
    del lines[7]
    found = npu_smi.parse_info("\n".join(lines)).chips
    assert [chip.npu_id for chip in found] == [1, 2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize(
    "text",
    [
        "dcmi module initialize failed. ret is -8005\n",
        "DrvMngGetConsoleLogLevel failed. (ret=4)\ndcmi module initialize failed. ret is -8005\n",
    ],
)
def test_a_message_in_place_of_the_table_is_an_error(text: str):
    table = npu_smi.parse_info(text)
    assert table.chips == ()
    assert any("-8005" in error for error in table.errors)


def test_the_controller_of_a_card_is_no_chip():
    assert npu_smi.parse_mapping(fixture("ascend/map_mcu.txt")) == (
        Mapped(2, 0, "Ascend 910B4", logic_id=0),
        Mapped(5, 0, "Ascend 910B4", logic_id=1),
    )


def test_the_map_may_have_physical_numbers_and_slots():
    assert npu_smi.parse_mapping(fixture("ascend/map_a3.txt")) == (
        Mapped(0, 0, "Ascend910", 0, 4),
        Mapped(0, 1, "Ascend910", 1, 5),
    )
    assert npu_smi.parse_mapping(fixture("ascend/map_slot.txt")) == (Mapped(3, 0, "Ascend950", None, 6),)


def test_boards_of_a2_and_a3():
    assert npu_smi.parse_board(fixture("ascend/board_a2.txt")) == Board("Ascend", "910B3", None)
    assert npu_smi.parse_board(fixture("ascend/board_a3.txt")) == Board(None, "Ascend910", "9392")


def test_topology_by_card_and_by_chip():
    by_card = npu_smi.parse_topology(fixture("ascend/topo_a2.txt"))
    assert (len(by_card), set(by_card.values())) == (28, {"HCCS"})
    by_chip = npu_smi.parse_topology(fixture("ascend/topo_a3.txt"))
    assert (by_chip[0, 1], by_chip[0, 2], len(by_chip)) == ("SIO", "HCCS_SW", 120)


def test_network_ports_in_the_topology_are_passed_over():
    kinds = npu_smi.parse_topology(fixture("ascend/topo_two_islands.txt"))
    assert kinds == {(0, 1): "HCCS", (0, 2): "SYS", (0, 3): "SYS", (1, 2): "SYS", (1, 3): "SYS", (2, 3): "HCCS"}


@pytest.mark.parametrize(
    ("chip", "board", "soc"),
    [
        (Chip(0, 0, "910B3", "OK"), Board("Ascend", "910B3"), "Ascend910B3"),
        (Chip(0, 0, "910B3", "OK"), Board(), "Ascend910B3"),
        (Chip(0, 0, "Ascend910", "OK"), Board(None, "Ascend910", "9392"), "Ascend910_9392"),
        (Chip(0, 0, "Ascend910", "OK"), Board(), None),
        (Chip(0, 0, "910B", "OK", ddr_mib=15034, hbm_mib=32768), Board(), "Ascend910A"),
        (Chip(0, 0, "910B", "OK", ddr_mib=0, hbm_mib=65536), Board(), None),
        (Chip(0, 0, "910ProB", "OK", ddr_mib=15034, hbm_mib=32768), Board(), "Ascend910ProB"),
        (Chip(0, 0, "310P3", "OK", ddr_mib=44280), Board("Ascend", "310P3"), "Ascend310P3"),
    ],
)
def test_socs_of_all_generations(chip: Chip, board: Board, soc: str | None):
    assert resolve_soc(chip, board) == soc


def test_records_of_installers():
    assert parse_record(fixture("ascend/driver_version.info"))["Version"] == "24.1.0"
    assert parse_record(fixture("ascend/cann_install.info"))["version"] == "8.5.0"


def test_container_lists_have_ranges():
    assert count_container_list("0-3,6") == 5
    assert count_container_list("0,1") == 2
    assert count_container_list("all") is None


def every_parser(text: str) -> None:
    npu_smi.parse_info(text)
    npu_smi.parse_processes(text)
    npu_smi.parse_mapping(text)
    npu_smi.parse_board(text)
    npu_smi.parse_topology(text)
    parse_record(text)
    count_container_list(text)


@given(st.text(max_size=400))
def test_arbitrary_text_raises_nowhere(text: str):
    every_parser(text)


TABLES = ("info_a3.txt", "info_950.txt", "info_a2_910b3.txt", "map_mcu.txt", "topo_a3.txt", "board_a3.txt")
LINES = [line for name in TABLES for line in fixture(f"ascend/{name}").splitlines()]


@given(st.lists(st.sampled_from(LINES), max_size=12), st.integers(0, 100))
def test_damaged_tables_raise_nowhere(lines: list[str], width: int):
    every_parser("\n".join(line[:width] for line in lines))
    every_parser("\n".join(lines))


@given(st.lists(st.sampled_from(LINES), max_size=40), st.text(max_size=8))
def test_whatever_the_tool_prints_the_probe_answers(lines: list[str], setting: str):
    text = "\n".join(lines)
    env = {"ASCEND_RT_VISIBLE_DEVICES": setting, "ASCEND_VISIBLE_DEVICES": setting}
    found = ascend.probe(Host(Path("no such folder"), env, lambda argv: CommandResult(text, 0)))
    assert found.devices == ()
