"""What AMD's driver and tools print, read back: one parser a source, every awkward shape, and arbitrary text."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rlctl_hw.host import CommandResult, Host
from rlctl_hw.vendors import amd_smi, kfd, rocm, rocm_smi, rocminfo
from rlctl_hw.vendors.amd_gpu import Gpu, catalogue_of, name_of, product_of
from rlctl_hw.vendors.loose_json import parse_document

from tests.accelerator_hosts import fixture, kfd_node

MI300X_GIB = 191.984375


@pytest.mark.parametrize(
    ("version", "name"),
    [(90402, "gfx942"), (90010, "gfx90a"), (90500, "gfx950"), (100300, "gfx1030"), (110001, "gfx1101"), (0, None)],
)
def test_target_versions_are_named_as_compilers_do(version: int, name: str | None):
    assert kfd.gfx_name(version) == name


def test_a_gpu_node_tells_what_it_is():
    node = kfd.parse_node(2, fixture("amd/kfd_mi300x_node.txt"))
    assert node is not None
    assert (node.architecture, node.device_id, node.compute_units, node.num_xcc) == ("gfx942", 0x74A1, 304, 8)
    assert kfd.pci_address(node.domain, node.location) == "0000:c6:00.0"


def test_a_cpu_node_is_no_gpu():
    assert kfd.parse_node(0, kfd_node(simd_count=0)) is None


def test_only_memory_on_the_device_counts():
    assert kfd.parse_memory("heap_type 1\nsize_in_bytes 1024\n") == 1024
    assert kfd.parse_memory("heap_type 2\nsize_in_bytes 1024\n") == 1024
    assert kfd.parse_memory("heap_type 0\nsize_in_bytes 1024\n") == 0


def test_a_link_without_ends_is_passed_over():
    assert kfd.parse_link("type 11\nnode_from 2\nnode_to 3\nmax_bandwidth 50000\n") == kfd.IoLink(2, 3, 11)
    assert kfd.parse_link("type 11\n") is None


def test_amd_smi_in_a_gpu_data_envelope():
    answer = amd_smi.parse_static(fixture("amd/amd_smi_static_gpu_data.json"))
    assert [gpu.index for gpu in answer.gpus] == [0, 1]
    gpu = answer.gpus[0]
    assert (gpu.name, gpu.memory_gib, gpu.architecture) == ("AMD Instinct MI325X", 262128 / 1024, "gfx942")
    assert (gpu.uuid, gpu.pci, gpu.partition) == ("GPU-10000000000000a0", "0000:05:00.0", "SPX")
    assert answer.driver == "6.12.12"


def test_amd_smi_as_a_list_between_messages_with_gaps_and_other_units():
    gpus = amd_smi.parse_static(fixture("amd/amd_smi_static_list.json")).gpus
    assert [gpu.index for gpu in gpus] == [0, 2]
    assert gpus[0].memory_gib == pytest.approx(63.98, abs=0.01)
    assert gpus[1].memory_gib == pytest.approx(31.86, abs=0.01)


def test_amd_smi_as_one_object_with_the_older_name_of_the_size():
    (gpu,) = amd_smi.parse_static(fixture("amd/amd_smi_static_object.json")).gpus
    assert (gpu.memory_gib, gpu.pci) == (196288 / 1024, None)
    assert catalogue_of(gpu) == "mi300x-192gb"


def test_cells_without_an_answer_stay_unknown():
    (gpu,) = amd_smi.parse_static(fixture("amd/amd_smi_static_na.json")).gpus
    assert gpu == Gpu(4)
    assert name_of(gpu) == "AMD GPU"


def test_amd_smi_topology_with_trailing_commas():
    kinds = amd_smi.parse_topology(fixture("amd/amd_smi_topology.json"))
    assert kinds == {(0, 1): "XGMI", (1, 0): "XGMI"}


def test_rocm_smi_of_rocm_5_and_6():
    older = rocm_smi.parse_json(fixture("amd/rocm_smi_rocm5.json"))
    assert [gpu.name for gpu in older.gpus] == ["Instinct MI100", None]
    assert [name_of(gpu) for gpu in older.gpus] == ["Instinct MI100", "AMD Instinct MI100"]
    assert (older.driver, older.gpus[0].uuid) == ("5.18.13", "GPU-51c0ffee00000001")
    (newer,) = rocm_smi.parse_json(fixture("amd/rocm_smi_rocm6.json")).gpus
    assert (newer.name, newer.memory_gib, newer.pci) == ("AMD Instinct MI308X OAM", MI300X_GIB, "0000:0a:00.0")
    assert catalogue_of(newer) == "mi308x-192gb"


def test_rocm_smi_as_text():
    answer = rocm_smi.parse_text(fixture("amd/rocm_smi_text.txt"))
    assert [(gpu.name, gpu.memory_gib) for gpu in answer.gpus] == [("AMD Instinct MI300X OAM", MI300X_GIB)] * 2
    assert (answer.driver, answer.gpus[0].architecture) == ("6.8.5", "gfx942")


def test_link_types_are_read_from_their_matrix_only():
    kinds = rocm_smi.parse_links(fixture("amd/rocm_smi_topo.txt"))
    assert (kinds[0, 1], kinds[0, 2], kinds[3, 2]) == ("XGMI", "PCIE", "XGMI")
    assert (0, 0) not in kinds
    assert rocm_smi.parse_links(fixture("amd/rocm_smi_rocm5.json")) == {(0, 1): "PCIE"}


def test_rocm_smi_that_fails_with_exit_code_0_knows_no_gpu():
    assert rocm_smi.parse_json("Driver not initialized\n").gpus == ()
    assert rocm_smi.parse_text("Driver not initialized\n").gpus == ()


def test_rocminfo_tells_gpus_from_cpus_and_pools_from_each_other():
    answer = rocminfo.parse(fixture("amd/rocminfo.txt"))
    assert [(gpu.name, gpu.compute_units, gpu.device_id) for gpu in answer.gpus] == [
        ("AMD Instinct MI250X", 110, 0x7408)
    ] * 2
    assert answer.gpus[0].memory_gib == pytest.approx(63.98, abs=0.01)
    assert [gpu.uuid for gpu in answer.gpus] == ["GPU-00c0ffee00000003", None]
    assert answer.gpus[0].pci == "0000:c1:00.0"


def test_rocminfo_complains_about_permissions():
    text = "ROCk module is loaded\nUnable to open /dev/kfd read-write: Permission denied\n"
    assert "Permission denied" in rocminfo.parse(text).errors[0]
    assert "NOT loaded" in rocminfo.parse("ROCk module is NOT loaded, possibly no GPU devices\n").errors[0]


@pytest.mark.parametrize(
    ("gpu", "key"),
    [
        (Gpu(0, device_id=0x74A1), "mi300x-192gb"),
        (Gpu(0, device_id=0x74A2), "mi308x-192gb"),
        (Gpu(0, name="AMD Instinct MI300X", device_id=0x74A2), "mi308x-192gb"),
        (Gpu(0, architecture="gfx942", compute_units=304, memory_gib=192), "mi300x-192gb"),
        (Gpu(0, architecture="gfx942", compute_units=304, memory_gib=256), "mi325x-256gb"),
        (Gpu(0, architecture="gfx942", compute_units=80, memory_gib=192), "mi308x-192gb"),
        (Gpu(0, architecture="gfx942", memory_gib=192), None),
        (Gpu(0, architecture="gfx942", compute_units=304), None),
        (Gpu(0, device_id=0x740C, compute_units=110), "mi250x-64gb"),
        (Gpu(0, device_id=0x740C, compute_units=104), "mi250-64gb"),
        (Gpu(0, name="AMD Instinct MI300X VF"), "mi300x-192gb"),
        (Gpu(0, device_id=0x7FFF, name="AMD Instinct MI999"), None),
    ],
)
def test_the_architecture_alone_never_decides(gpu: Gpu, key: str | None):
    assert catalogue_of(gpu) == key


def test_an_unknown_part_is_called_by_what_identifies_it():
    assert name_of(Gpu(0, device_id=0x7FFF, architecture="gfx1250")) == "AMD GPU 0x7fff (gfx1250)"
    assert product_of(Gpu(0, device_id=0x7FFF)) is None


def test_a_document_may_stand_among_messages():
    assert parse_document('WARNING: [low power]\n{"a": [1, 2,],}\nWritten') == {"a": [1, 2]}
    assert parse_document("[" * 100_000) is None
    assert parse_document("") is None


def every_parser(text: str) -> None:
    kfd.parse_node(0, text)
    kfd.parse_link(text)
    kfd.parse_memory(text)
    amd_smi.parse_static(text)
    amd_smi.parse_topology(text)
    rocm_smi.parse_json(text)
    rocm_smi.parse_text(text)
    rocm_smi.parse_links(text)
    rocminfo.parse(text)


@given(st.text(max_size=400))
def test_arbitrary_text_raises_nowhere(text: str):
    every_parser(text)


FRAGMENTS = (
    '{"gpu_data": [',
    '{"gpu": 0,',
    '"vram": {"size": {"value": "x"}}}',
    '"asic": 3',
    "]}",
    '{"card0": {"Device ID": "0xzz"}}',
    '{"system": 1}',
    "GPU[0] : VRAM Total Memory (B): many",
    "== Link Type between two GPUs ==",
    "GPU0 GPU1",
    "GPU0 XGMI",
    "Name: gfx942",
    "Device Type: GPU",
    "Size: 1e999(0x) KB",
    "simd_count 4",
    "simd_per_cu 0",
    "gfx_target_version 99999999",
    '{"gpu": 1e999, "links": [{"gpu": null}]}',
    '{"gpu": true, "vram": {"size": NaN}}',
)


@given(st.lists(st.sampled_from(FRAGMENTS), max_size=8).map("\n".join))
def test_damaged_output_raises_nowhere(text: str):
    every_parser(text)


@given(st.lists(st.sampled_from(FRAGMENTS), max_size=8).map("\n".join), st.text(max_size=8))
def test_whatever_the_tools_print_the_probe_answers(text: str, setting: str):
    env = {"ROCR_VISIBLE_DEVICES": setting, "HIP_VISIBLE_DEVICES": setting, "CUDA_VISIBLE_DEVICES": setting}
    found = rocm.probe(Host(Path("no such folder"), env, lambda argv: CommandResult(text, 0)))
    assert "rocm.physical" in found.facts
