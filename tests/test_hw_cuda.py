"""NVML, visibility, MIG and islands, on a pretended driver."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pynvml
import pytest
from rlctl_hw.devices import by_key
from rlctl_hw.host import CommandResult, Host
from rlctl_hw.types import Link
from rlctl_hw.vendors import nvml
from rlctl_hw.vendors.cuda import probe, select_visible
from rlctl_hw.vendors.nvidia_smi import Gpu, MigSlice

GPUS = tuple(Gpu(i, "NVIDIA L4", f"GPU-{i}{i}", 22600, "8.9") for i in range(4))
CUT = Gpu(0, "NVIDIA A100-SXM4-80GB", "GPU-ff", 80000, "8.0", None, True, (MigSlice("MIG-1", "3g.40gb", 39000),))
NOTHING = CommandResult("", None, "nvidia-smi is not installed")
TOPO = """\tGPU0\tGPU1\tGPU2\tNIC0\tCPU Affinity
GPU0\t X \tNV4\tSYS\tPIX\t0-3
GPU1\tNV4\t X \tSYS\tSYS\t0-3
GPU2\tSYS\tSYS\t X \tSYS\t0-3
NIC0\tPIX\tSYS\tSYS\t X

NIC Legend:

  NIC0: ibp23s0
"""


class FakeNvml:
    """GPUs in two NVLink pairs; some are lost, or the library is missing or old."""

    NVML_DEVICE_MIG_ENABLE = pynvml.NVML_DEVICE_MIG_ENABLE
    NVML_P2P_CAPS_INDEX_NVLINK = pynvml.NVML_P2P_CAPS_INDEX_NVLINK
    NVML_P2P_STATUS_OK = pynvml.NVML_P2P_STATUS_OK
    NVML_FEATURE_ENABLED = pynvml.NVML_FEATURE_ENABLED
    nvmlMemory_v2 = pynvml.nvmlMemory_v2
    c_nvmlGpuFabricInfo_t = pynvml.c_nvmlGpuFabricInfo_t

    def __init__(
        self, num: int = 4, *, lost: Sequence[int] = (), missing: bool = False, old: bool = False, used_mib: int = 1
    ) -> None:
        self.num, self.lost, self.missing, self.old, self.used_mib = num, lost, missing, old, used_mib

    def __getattr__(self, name: str) -> Any:
        def refuse(*_: Any) -> None:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)

        return refuse

    def nvmlInit(self) -> None:
        if self.missing:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    def nvmlShutdown(self) -> None:
        pass

    def nvmlDeviceGetCount(self) -> int:
        return self.num

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        if index in self.lost:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)
        return index

    def nvmlDeviceGetMemoryInfo(self, handle: int, version: int | None = None) -> SimpleNamespace:
        if self.old and version is not None:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_FUNCTION_NOT_FOUND)
        return SimpleNamespace(total=100 * 2**20, reserved=4 * 2**20, used=self.used_mib * 2**20)

    def nvmlDeviceGetName(self, handle: int) -> str:
        return "NVIDIA L4"

    def nvmlDeviceGetUUID(self, handle: int) -> str:
        return f"GPU-{handle}{handle}"

    def nvmlDeviceGetPciInfo(self, handle: int) -> SimpleNamespace:
        return SimpleNamespace(busId=f"00000000:{handle:02X}:00.0".encode(), domain=0, bus=handle, device=0)

    def nvmlDeviceGetCudaComputeCapability(self, handle: int) -> tuple[int, int]:
        return (8, 9)

    def nvmlSystemGetDriverVersion(self) -> str:
        return "570.1"

    def nvmlSystemGetCudaDriverVersion(self) -> int:
        return 12080

    def nvmlDeviceGetNvLinkState(self, handle: int, number: int) -> int:
        return int(number < 2)

    def nvmlDeviceGetNvLinkRemotePciInfo(self, handle: int, number: int) -> SimpleNamespace:
        return self.nvmlDeviceGetPciInfo(handle ^ 1)

    def nvmlDeviceGetP2PStatus(self, first: int, second: int, what: int) -> int:
        return self.NVML_P2P_STATUS_OK if first ^ 1 == second else pynvml.NVML_P2P_STATUS_NOT_SUPPORTED

    def nvmlDeviceGetTopologyCommonAncestor(self, first: int, second: int) -> int:
        if self.old:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return pynvml.NVML_TOPOLOGY_SYSTEM


def host_at(root: Path, setting: str | None = None, stdout: str | None = None) -> Host:
    result = NOTHING if stdout is None else CommandResult(stdout, 0)
    return Host(root, {} if setting is None else {"CUDA_VISIBLE_DEVICES": setting}, lambda _: result)


@pytest.mark.parametrize(
    ("setting", "indices"),
    [
        (None, [0, 1, 2, 3]),
        ("", []),
        ("-1", []),
        ("NoDevFiles", []),
        ("2,0", [2, 0]),
        (" 1 , 3 ", [1, 3]),
        ("1,9,2", [1]),
        ("0,-1,2", [0]),
        ("1,1", []),
        ("GPU-33,GPU-1", [3, 1]),
        ("GPU-", []),
        ("GPU-xx,0", []),
        ("²", []),
        ("9" * 5000, []),
    ],
)
def test_visible_devices_are_those_cuda_would_show(setting: str | None, indices: list[int]):
    assert [device.index for device in select_visible(GPUS, setting).devices] == indices


def test_a_list_that_ends_early_says_where():
    assert "called 9" in select_visible(GPUS, "1,9,2").notes[0]
    assert not select_visible(GPUS, "NoDevFiles").notes


def test_a_slice_counts_as_a_single_device_with_its_own_memory():
    for setting in (None, "0", "MIG-1"):
        (device,) = select_visible((CUT, *GPUS[1:]), setting).devices
        assert (device.uuid, round(device.memory_gib), device.compute_capability) == ("MIG-1", 38, "8.0")
        assert (device.partition, device.catalogue) == ("3g.40gb", None)


def test_a_cut_gpu_is_left_out_beside_whole_ones():
    visible = select_visible((CUT, *GPUS[1:]), "1,0,2")
    assert [device.index for device in visible.devices] == [1, 2]
    assert "MIG" in visible.notes[0]


def test_a_gpu_that_hides_its_memory_takes_it_from_the_catalogue_or_is_left_out():
    silent = [Gpu(0, "NVIDIA L4"), Gpu(1, "NVIDIA Unheard Of")]
    visible = select_visible(silent, None)
    assert [(device.memory_gib, device.compute_capability) for device in visible.devices] == [
        (by_key("l4").memory_gib, "8.9")
    ]
    assert "Unheard Of" in visible.notes[0]


def test_a_known_gpu_has_its_row_and_an_unknown_one_has_none():
    (known, unknown) = select_visible([GPUS[0], Gpu(1, "NVIDIA L4-24Q", memory_mib=22000)], None).devices
    assert (known.catalogue, unknown.catalogue) == ("l4-24gb", None)


def test_a_gpu_that_needs_a_reset_is_left_out_with_the_reason():
    visible = select_visible([replace(GPUS[0], recovery="Reset"), GPUS[1]], None)
    assert [device.index for device in visible.devices] == [1]
    assert "Reset" in visible.notes[0]


def test_nvml_leaves_out_a_lost_gpu_and_says_so():
    answer = nvml.ask(FakeNvml(2, lost=[1]))
    assert [(gpu.memory_mib, gpu.compute_capability, gpu.pci) for gpu in answer.gpus] == [(96, "8.9", "0000:00:00.0")]
    assert "GPU 1" in answer.errors[0]


def test_nvml_of_an_old_driver_gives_the_whole_memory():
    assert nvml.ask(FakeNvml(old=True)).gpus[0].memory_mib == 100


def test_nvml_tells_links_and_the_cuda_of_the_driver():
    answer = nvml.ask(FakeNvml())
    assert answer.links[:2] == (Link(0, 1, "NV2"), Link(0, 2, "SYS"))
    assert answer.cuda == "12.8"


def test_islands_are_places_among_visible_gpus(tmp_path: Path):
    found = probe(host_at(tmp_path, "3,0,2"), FakeNvml())
    assert [device.index for device in found.devices] == [3, 0, 2]
    assert found.islands == ((0, 2), (1,))
    assert Link(0, 2, "NV2") in found.links
    assert found.facts["cuda.islands"].value == [[3, 2], [0]]


def test_the_tool_draws_the_topology_where_the_library_cannot(tmp_path: Path):
    found = probe(host_at(tmp_path, stdout=TOPO), FakeNvml(3, old=True))
    assert found.islands == ((0, 1), (2,))
    assert found.facts["cuda.islands"].source == "nvidia-smi topo -m"
    assert found.facts["cuda.nics"].value["ibp23s0"] == {0: "PIX", 1: "SYS", 2: "SYS"}


def test_unknown_links_make_no_islands(tmp_path: Path):
    found = probe(host_at(tmp_path), FakeNvml(3, old=True))
    assert found.islands == ()
    assert "not installed" in str(found.facts["cuda.islands"].error)


def test_the_tool_answers_where_the_library_is_missing(tmp_path: Path):
    text = "index, name, memory.total [MiB]\n0, NVIDIA L4, 23034 MiB\n"
    found = probe(host_at(tmp_path, "0", text), FakeNvml(missing=True))
    assert [device.name for device in found.devices] == ["NVIDIA L4"]
    assert found.facts["cuda.physical"].source == "nvidia-smi"
    assert "NVML" in str(found.facts["cuda.physical"].error)


def test_a_loaded_driver_without_an_answer_is_said(tmp_path: Path):
    (tmp_path / "sys/module/nvidia").mkdir(parents=True)
    (tmp_path / "sys/module/nvidia/version").write_text("570.1\n")
    found = probe(host_at(tmp_path), FakeNvml(missing=True))
    assert not found.devices
    assert found.facts["cuda.driver"].value == "570.1"
    assert "the driver 570.1 is loaded" in str(found.facts["cuda.physical"].error)


def test_gpus_that_the_driver_knows_and_the_library_does_not_are_missing(tmp_path: Path):
    for address in ("0000:00:00.0", "0000:01:00.0"):
        (tmp_path / "proc/driver/nvidia/gpus" / address).mkdir(parents=True)
    (tmp_path / "dev").mkdir()
    for number in range(2):
        (tmp_path / f"dev/nvidia{number}").touch()
    found = probe(host_at(tmp_path), FakeNvml(2, lost=[1]))
    assert found.facts["cuda.missing"].value == ["0000:01:00.0"]


def test_physical_and_visible_devices_are_both_facts(tmp_path: Path):
    found = probe(host_at(tmp_path, ""), FakeNvml(1))
    assert found.facts["cuda.physical"].value == ["0: NVIDIA L4"]
    assert found.facts["cuda.visible"].value == []


def test_memory_that_others_hold_is_said(tmp_path: Path):
    found = probe(host_at(tmp_path), FakeNvml(1, used_mib=20480))
    assert found.facts["cuda.used_gib"].value == {"0": 20.0}
    assert "GPU 0: 20 GiB" in str(found.facts["cuda.used_gib"].error)
    assert probe(host_at(tmp_path), FakeNvml(1)).facts["cuda.used_gib"].error is None


def test_gpus_of_two_kinds_need_an_order(tmp_path: Path):
    text = "index, name, memory.total [MiB]\n0, NVIDIA L4, 23034 MiB\n1, Tesla T4, 15360 MiB\n"
    assert "cuda.order" in probe(host_at(tmp_path, stdout=text), FakeNvml(missing=True)).facts


def test_a_fabric_that_is_not_ready_is_said(tmp_path: Path):
    text = (
        "index, name, memory.total [MiB], fabric.state, fabric.cliqueId\n0, NVIDIA H200, 143771 MiB, In Progress, 0\n"
    )
    facts = probe(host_at(tmp_path, stdout=text), FakeNvml(missing=True)).facts
    assert "fabricmanager" in str(facts["cuda.fabric"].error)


@pytest.mark.parametrize("answer", [None, 3, [], {"gpus": 1, "source": "x"}, {"gpus": [{"index": "0"}], "source": "x"}])
def test_a_library_answer_of_another_shape_is_an_error(answer: Any):
    class Odd(Host):
        def answer(self, name: str, question: Any) -> Any:
            return answer

    assert "no answer that can be read" in nvml.read(Odd()).errors[0]
