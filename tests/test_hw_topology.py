"""The wiring of a node, on made-up tables in the shapes that `nvidia-smi topo -m` and its readers leave."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from rlctl_hw.topology import among, is_complete, islands, parse_topo
from rlctl_hw.types import Link

COLOURED = "\t\x1b[4mGPU0\tGPU1\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID\x1b[0m\n"
ROWS = "GPU0\t X \tNV6\t0-19\t\t\tN/A\nGPU1\tNV6\t X \t0-19\t0\t\tN/A\n"
SPACED = """        GPU0    GPU1    CPU Affinity    NUMA Affinity
GPU0     X      PHB     0-11            N/A
GPU1    PHB      X      0-11            N/A
"""
WITH_PORTS = """GPU0\tGPU1\tNIC0\tNIC1\tCPU Affinity
GPU0\t X \tSYS\tPXB\tNODE\t0-7
GPU1\tSYS\t X \tSYS\tN/A\t8-15
NIC0\tPXB\tSYS\t X \tPIX
NIC1\tNODE\tSYS\tPIX\t X

Legend:
  X    = Self
  PIX  = Connection traversing at most a single PCIe bridge

NIC Legend:

  NIC0: mlx5_ib0
  NIC1: rdmap0s6
"""
OLD_PORTS = "\tGPU0\tmlx5_0\tCPU Affinity\nGPU0\t X \tPIX\t0-3\nmlx5_0\tPIX\t X\n"


def square(*rows: str) -> str:
    names = [f"GPU{i}" for i in range(len(rows))]
    lines = [f"{name}\t" + "\t".join(row.split()) for name, row in zip(names, rows, strict=True)]
    return "\n".join(["\t" + "\t".join(names), *lines])


def test_colours_and_empty_cells_do_not_shift_columns():
    assert parse_topo(COLOURED + ROWS).links == (Link(0, 1, "NV6"),)


def test_tables_with_spaces_for_tabs_are_read():
    assert parse_topo(SPACED).links == (Link(0, 1, "PHB"),)


def test_a_header_without_its_first_tab_is_read_and_ports_have_their_names():
    topology = parse_topo(WITH_PORTS)
    assert topology.links == (Link(0, 1, "SYS"),)
    assert topology.nics == {"mlx5_ib0": {0: "PXB", 1: "SYS"}, "rdmap0s6": {0: "NODE"}}


def test_ports_of_old_drivers_stand_in_the_header_by_name():
    assert parse_topo(OLD_PORTS).nics == {"mlx5_0": {0: "PIX"}}


def test_one_gpu_alone_has_no_link():
    assert parse_topo("\t\x1b[4mGPU0\tCPU Affinity\x1b[0m\nGPU0\t X \t0-3\n").links == ()


def test_a_message_before_the_table_does_not_hide_it():
    text = "Unable to determine the device handle for GPU1: 0000:34:00.0: Unknown Error\n"
    assert parse_topo(text + COLOURED + ROWS).links == (Link(0, 1, "NV6"),)


def test_a_table_of_something_else_has_no_links():
    assert parse_topo(square("X OK", "OK X")).links == ()


def test_two_groups_of_four_are_two_islands():
    rows = [" ".join("X" if a == b else "NV18" if a // 4 == b // 4 else "SYS" for b in range(8)) for a in range(8)]
    links = parse_topo(square(*rows)).links
    assert len(links) == 28
    assert islands(8, links) == ((0, 1, 2, 3), (4, 5, 6, 7))


def test_a_chain_of_bridges_is_one_island_and_pcie_joins_nothing():
    assert islands(4, [Link(0, 1, "NV4"), Link(1, 2, "NV4"), Link(2, 3, "NODE")]) == ((0, 1, 2), (3,))
    assert islands(2, [Link(0, 1, "PIX")]) == ((0,), (1,))


def test_links_follow_the_order_in_which_devices_are_seen():
    links = [Link(0, 1, "NV1"), Link(0, 2, "SYS"), Link(1, 2, "PIX")]
    assert among([2, 0], links) == (Link(0, 1, "SYS"),)
    assert is_complete(2, among([2, 0], links))
    assert not is_complete(3, links[:2])


@given(st.text(alphabet="GPUNIC0123 \tXSYV\n\x1b[4m:affinity", max_size=200) | st.text(max_size=100))
def test_no_text_breaks_the_reader(text: str):
    for link in parse_topo(text).links:
        assert 0 <= link.first < link.second


@given(
    st.integers(0, 9),
    st.lists(
        st.builds(Link, st.integers(0, 9), st.integers(0, 9), st.sampled_from(["NV2", "SYS", "XGMI"])), max_size=9
    ),
)
def test_islands_cover_every_device_once(num_devices: int, links: list[Link]):
    groups = islands(num_devices, links)
    assert sorted(place for group in groups for place in group) == list(range(num_devices))
