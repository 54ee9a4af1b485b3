"""Reading nvidia-smi, on made-up output in the shapes that real drivers print."""

from __future__ import annotations

from collections.abc import Sequence

from rlctl_hw.host import CommandResult, Host
from rlctl_hw.vendors.nvidia_smi import parse_number, parse_query, parse_slices, parse_unknown_field, read

HEADER = "index, uuid, name, memory.total [MiB], memory.reserved [MiB], compute_cap, driver_version, mig.mode.current"
ROW_0 = "0, GPU-aa, NVIDIA L4, 23034 MiB, 434 MiB, 8.9, 570.1, [N/A]"
ROW_1 = "1, GPU-bb, NVIDIA H100 PCIe, 81559 MiB, 559 MiB, 9.0, 570.1, Enabled"
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


def test_slices_belong_to_the_gpu_above_them():
    slices = parse_slices(LIST)
    assert [piece.uuid for piece in slices[1]] == ["MIG-c1", "MIG-c2"]
    assert 38 * 1024 < slices[1][0].memory_mib < 40 * 1024
    assert 0 not in slices


def test_a_refused_field_is_left_out_and_the_rest_is_asked_again():
    refusal = CommandResult('Field "compute_cap" is not a valid field to query.\n', 2, "nvidia-smi ended with code 2")
    host, asked = answering(refusal, CommandResult(f"{HEADER}\n{ROW_0}\n", 0))
    assert len(read(host).gpus) == 1
    assert "compute_cap" in asked[0][1]
    assert "compute_cap" not in asked[1][1]


def test_slices_are_asked_for_only_where_a_gpu_is_cut():
    host, asked = answering(CommandResult(f"{HEADER}\n{ROW_0}\n{ROW_1}\n", 0), CommandResult(LIST, 0))
    gpus = read(host).gpus
    assert [len(gpu.slices) for gpu in gpus] == [0, 2]
    assert asked[1] == ["nvidia-smi", "-L"]


def test_a_tool_that_hangs_leaves_an_error_and_no_gpu():
    host, _ = answering(CommandResult("", None, "nvidia-smi gave no answer within 10 s"))
    table = read(host)
    assert (table.gpus, table.errors) == ((), ("nvidia-smi gave no answer within 10 s",))


def test_numbers_and_refusals_are_told_apart():
    assert parse_number("81559 MiB") == 81559
    assert parse_number("[N/A]") is None
    assert parse_number("81559MiBs") is None
    assert parse_unknown_field("index, name\n0, L4") is None
