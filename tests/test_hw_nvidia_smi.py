"""Reading nvidia-smi, on made-up output in the shapes that real drivers print."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rlctl_hw.host import CommandResult, Host
from rlctl_hw.vendors.nvidia_smi import (
    NO_CLUSTER,
    Fabric,
    parse_bus_id,
    parse_kernel_version,
    parse_number,
    parse_query,
    parse_slice_memory,
    parse_slices,
    parse_unknown_field,
    parse_versions,
    read,
)

HEADER = "index, uuid, name, memory.total [MiB], memory.reserved [MiB], compute_cap, driver_version, mig.mode.current"
ROW_0 = "0, GPU-aa, NVIDIA L4, 23034 MiB, 434 MiB, 8.9, 570.1, [N/A]"
ROW_1 = "1, GPU-bb, NVIDIA H100 PCIe, 81559 MiB, 559 MiB, 9.0, 570.1, Enabled"
VERSION = CommandResult("NVIDIA-SMI version  : 570.1\nDRIVER version      : 570.1\nCUDA Version        : 12.8\n", 0)
DETAILS = """
==============NVSMI LOG==============
Attached GPUs                          : 2
GPU 00000000:0A:00.0
    MIG Mode
        Current                        : N/A
    FB Memory Usage
        Total                          : 23034 MiB
        Reserved                       : 434 MiB
GPU 00000000:0B:00.0
    MIG Device
        Index                          : 0
        Shared FB Memory Usage
            Total                      : 40448 MiB
            Reserved                   : 48 MiB
            Used                       : 26 MiB
        Shared BAR1 Memory
            Total                      : 1 MiB
    MIG Device
        Index                          : 1
        Shared FB Memory Usage
            Total                      : 9984 MiB
            Reserved                   : 0 MiB
    FB Memory Usage
        Total                          : 81559 MiB
        Reserved                       : 559 MiB
"""
LIST = """GPU 0: NVIDIA L4 (UUID: GPU-aa)
GPU 1: NVIDIA H100 PCIe (UUID: GPU-bb)
  MIG 3g.40gb     Device  0: (UUID: MIG-c1)
  MIG 1g.10gb+me  Device  1: (UUID: MIG-c2)
"""


def answering(*results: CommandResult) -> tuple[Host, list[Sequence[str]]]:
    waiting, asked = list(results), []

    def run(argv: Sequence[str]) -> CommandResult:
        asked.append(argv)
        return waiting.pop(0)

    return Host(run=run), asked


def test_reserved_memory_is_not_for_use():
    (gpu,) = parse_query(f"{HEADER}\n{ROW_0}\n").gpus
    assert gpu.memory_mib == 22600
    assert (gpu.name, gpu.compute_capability, gpu.driver_version) == ("NVIDIA L4", "8.9", "570.1")


def test_columns_are_found_by_name():
    text = "name, memory.total [MiB], index\nTesla T4, 15360 MiB, 3\n"
    (gpu,) = parse_query(text).gpus
    assert (gpu.index, gpu.name, gpu.memory_mib, gpu.uuid) == (3, "Tesla T4", 15360, None)


def test_cells_without_an_answer_are_unknown():
    text = f"{HEADER}\n0, [Unknown Error], NVIDIA GB10, [N/A], N/A, [Not Supported], 580.1, N/A\n"
    (gpu,) = parse_query(text).gpus
    assert (gpu.memory_mib, gpu.uuid, gpu.compute_capability, gpu.mig_enabled) == (None, None, None, False)


def test_a_lost_gpu_does_not_hide_the_others():
    table = parse_query(f"Unable to determine the device handle for GPU1: Unknown Error\n{HEADER}\n{ROW_0}\n")
    assert [gpu.index for gpu in table.gpus] == [0]
    assert "device handle" in table.errors[0]


def test_colours_and_carriage_returns_are_ignored():
    table = parse_query(f"\x1b[4m{HEADER}\x1b[0m\r\n{ROW_0}\r\n")
    assert [gpu.name for gpu in table.gpus] == ["NVIDIA L4"]


def test_a_message_in_place_of_a_table_is_an_error():
    table = parse_query("NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.\n")
    assert not table.gpus
    assert "communicate" in table.errors[0]


def test_a_row_of_another_width_is_an_error_not_a_gpu():
    table = parse_query(f"{HEADER}\n{ROW_0}\n1, GPU is lost\n")
    assert len(table.gpus) == 1
    assert table.errors == ("1, GPU is lost",)


def test_a_cell_without_end_is_an_error():
    assert parse_query(f'{HEADER}\n0, "{"x" * 200_000}').errors


def test_slices_belong_to_the_gpu_above_them():
    slices = parse_slices(LIST)
    assert [piece.uuid for piece in slices[1]] == ["MIG-c1", "MIG-c2"]
    assert 38 * 1024 < slices[1][0].memory_mib < 40 * 1024
    assert 0 not in slices


def test_a_refused_field_is_left_out_and_the_rest_is_asked_again():
    refusal = CommandResult('Field "compute_cap" is not a valid field to query.\n', 2, "nvidia-smi ended with code 2")
    host, asked = answering(refusal, CommandResult(f"{HEADER}\n{ROW_0}\n", 0), VERSION)
    assert len(read(host).gpus) == 1
    assert "compute_cap" in asked[0][1]
    assert "compute_cap" not in asked[1][1]


def test_slices_are_asked_for_only_where_a_gpu_is_cut():
    table = CommandResult(f"{HEADER}\n{ROW_0}\n{ROW_1}\n", 0)
    host, asked = answering(table, CommandResult(LIST, 0), CommandResult(DETAILS, 0), VERSION)
    gpus = read(host).gpus
    assert [len(gpu.slices) for gpu in gpus] == [0, 2]
    assert [piece.memory_mib for piece in gpus[1].slices] == [40400, 9984]
    assert asked[1:3] == [["nvidia-smi", "-L"], ["nvidia-smi", "-q"]]


def test_without_details_a_slice_has_about_what_its_profile_says():
    table, none = CommandResult(f"{HEADER}\n{ROW_1}\n", 0), CommandResult("", 1, "refused")
    host, _ = answering(table, CommandResult(LIST, 0), none, none, none)
    assert 38 * 1024 < read(host).gpus[0].slices[0].memory_mib < 40 * 1024


def test_details_name_the_memory_of_slices_and_of_nothing_else():
    assert parse_slice_memory(DETAILS) == {1: (40400, 9984)}


def test_versions_have_an_old_and_a_new_name():
    old = "| NVIDIA-SMI 470.1       Driver Version: 470.1     CUDA Version: 11.4     |"
    new = """DRIVER version      : Deprecated, see "KMD version" instead
CUDA version        : Deprecated, see "CUDA UMD version" instead
KMD version         : 610.62
CUDA UMD version    : 13.3
"""
    assert parse_versions(old) == {"driver": "470.1", "cuda": "11.4"}
    assert parse_versions(new) == {"driver": "610.62", "cuda": "13.3"}
    assert parse_versions("| NVIDIA-SMI 610.57   KMD Version: 610.57   CUDA UMD Version: 13.3 |")["cuda"] == "13.3"


def test_a_tool_without_the_version_option_shows_it_in_its_table():
    refusal = CommandResult("Invalid combination of input arguments.\n", 6, "refused")
    table = CommandResult("| NVIDIA-SMI 470.1   Driver Version: 470.1   CUDA Version: 11.4 |\n", 0)
    host, asked = answering(CommandResult(f"{HEADER}\n{ROW_0}\n", 0), refusal, table)
    assert read(host).cuda == "11.4"
    assert asked[-1] == ["nvidia-smi"]


@pytest.mark.parametrize("kind", ["x86_64 Kernel Module", "Open Kernel Module for aarch64"])
def test_the_kernels_file_names_the_driver(kind: str):
    text = f"NVRM version: NVIDIA UNIX {kind}  570.86.10  Release Build\nGCC version:  gcc 13.3.0\n"
    assert parse_kernel_version(text) == "570.86.10"


def test_bus_addresses_are_those_of_sysfs():
    assert parse_bus_id("00000000:CB:00.0") == "0000:cb:00.0"
    assert parse_bus_id("00010001:02:00.0") is None
    assert parse_bus_id("[N/A]") is None


def test_fabric_use_and_recovery_are_read():
    header = "index, name, memory.used [MiB], fabric.state, fabric.cliqueId, fabric.clusterUuid, gpu_recovery_action"
    rows = (
        "0, A, 26 MiB, Completed, 7, c-1, Reset",
        f"1, B, 0 MiB, Completed, 0, {NO_CLUSTER}, None",
        "2, C, [N/A], N/A, N/A, N/A, N/A",
    )
    first, second, third = parse_query("\n".join((header, *rows))).gpus
    assert (first.used_mib, first.fabric, first.recovery) == (26, Fabric("Completed", 7, "c-1"), "Reset")
    assert (second.fabric, second.recovery) == (Fabric("Completed", 0, None), None)
    assert (third.used_mib, third.fabric, third.recovery) == (None, None, None)


def test_a_tool_that_hangs_leaves_an_error_and_no_gpu():
    host, _ = answering(CommandResult("", None, "nvidia-smi gave no answer within 10 s"))
    table = read(host)
    assert (table.gpus, table.errors) == ((), ("nvidia-smi gave no answer within 10 s",))


def test_numbers_and_refusals_are_told_apart():
    assert parse_number("81559 MiB") == 81559
    assert parse_number("[N/A]") is None
    assert parse_number("81559MiBs") is None
    assert parse_unknown_field("index, name\n0, L4") is None


@given(st.text(max_size=200) | st.text(alphabet='GPU 0123:,.[]/A\n"inexame', max_size=200))
def test_no_text_breaks_a_reader(text: str):
    for parse in (
        parse_query,
        parse_slices,
        parse_kernel_version,
        parse_slice_memory,
        parse_versions,
        parse_bus_id,
        parse_number,
    ):
        parse(text)
    parse_query(f"{HEADER}\n{text}")
    parse_unknown_field(text)
