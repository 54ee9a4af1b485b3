"""The device catalogue: names that people type and tools print, and figures that agree with each other."""

from __future__ import annotations

import pytest
from rlctl_hw.devices import CatalogueEntry, by_key, by_printed_name, catalogue
from rlctl_hw.probe import parse_hardware

BUS_GB_PER_S = 63.0
EVERY = pytest.mark.parametrize("entry", catalogue(), ids=lambda entry: entry.key)


@pytest.mark.parametrize(
    ("spec", "key", "count", "num_nodes"),
    [
        ("mi300x:8x4", "mi300x-192gb", 8, 4),
        ("ascend-910b:8", "910b3-64gb", 8, 1),
        ("l4:1", "l4-24gb", 1, 1),
        ("rtx4090:1", "rtx4090-24gb", 1, 1),
        ("a100-80gb:8", "a100-80gb", 8, 1),
        ("B200:8", "b200-180gb", 8, 1),
        ("h200:8", "h200-141gb", 8, 1),
        ("h100-80gb:8x32", "h100-80gb", 8, 32),
        ("ascend-910c:16", "910c-64gb", 16, 1),
    ],
)
def test_a_machine_can_be_named_as_people_say_it(spec: str, key: str, count: int, num_nodes: int):
    machine = parse_hardware(spec)
    entry = by_key(spec.partition(":")[0])
    assert (entry.key, len(machine.devices), machine.num_nodes) == (key, count, num_nodes)
    assert machine.devices[0].memory_gib == entry.memory_gib


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("NVIDIA L40", "l40-48gb"),
        ("NVIDIA L40S", "l40s-48gb"),
        ("NVIDIA A10", "a10-24gb"),
        ("NVIDIA A10G", "a10g-24gb"),
        ("A100-SXM4-40GB", "a100-40gb"),
        ("NVIDIA GH200 480GB", "gh200-96gb"),
        ("NVIDIA H100 PCIe", "h100-pcie-80gb"),
        ("NVIDIA H200 NVL", "h200-nvl-141gb"),
        ("Tesla V100-SXM3-32GB-H", "v100-32gb"),
        ("AMD Instinct MI308X OAM", "mi308x-192gb"),
        ("Ascend910B3", "910b3-64gb"),
        ("910B4-1", "910b4-64gb"),
    ],
)
def test_a_printed_name_finds_its_own_row(name: str, key: str):
    entry = by_printed_name(name)
    assert entry is not None
    assert entry.key == key


@pytest.mark.parametrize("name", ["910B", "NVIDIA H100", "NVIDIA L4 24Q", "Quadro RTX 6000", "gfx942"])
def test_a_name_that_is_not_in_the_catalogue_matches_nothing(name: str):
    assert by_printed_name(name) is None


def test_an_unknown_key_shows_the_nearest():
    with pytest.raises(ValueError, match=r"nearest: .*h100-80gb"):
        by_key("h100-90gb")


@EVERY
def test_usable_memory_is_a_little_less_than_the_printed(entry: CatalogueEntry):
    if entry.memory_mib is not None:
        assert 0.92 < entry.memory_gib / (entry.memory_mib / 1024) <= 1.0


@EVERY
def test_links_are_as_fast_as_their_kind(entry: CatalogueEntry):
    if entry.link == "PCIe":
        assert entry.link_gb_per_s <= BUS_GB_PER_S
    else:
        assert entry.link_gb_per_s > BUS_GB_PER_S
    if entry.pair_gb_per_s is not None:
        assert entry.pair_gb_per_s < entry.link_gb_per_s


@EVERY
def test_only_parts_with_bfloat16_have_a_share_of_it_and_8_bit_doubles_it(entry: CatalogueEntry):
    assert (entry.matmul_share is None) == (entry.matmul_origin is None)
    assert entry.bf16_tflops or (entry.matmul_share is None and entry.fp8_tflops is None)
    if entry.fp8_tflops and entry.bf16_tflops:
        assert entry.fp8_tflops == pytest.approx(2 * entry.bf16_tflops, rel=0.02)


@EVERY
def test_the_architecture_is_named_as_its_vendor_names_it(entry: CatalogueEntry):
    starts = {"cuda": "sm_", "rocm": "gfx", "ascend": "Ascend"}
    assert entry.architecture.startswith(starts[entry.kind])
    if entry.compute_capability is not None:
        assert entry.architecture == f"sm_{entry.compute_capability.replace('.', '')}"


def test_a_reachable_share_says_whether_it_was_measured():
    assert by_key("h100").reachable_share == (0.803, "measured")
    assert by_key("h200").reachable_share == (0.803, "interpolated")
    assert by_key("l4").reachable_share[1] == "assumed"


def test_parts_with_the_same_architecture_keep_their_own_compute():
    assert by_key("mi308x").architecture == by_key("mi300x").architecture
    assert by_key("mi308x").bf16_tflops == 232
    assert by_key("mi300x").bf16_tflops == 1307
