"""NVML, visibility and MIG, on a pretended driver."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pynvml
import pytest
from rlctl_hw.host import CommandResult, Host
from rlctl_hw.vendors.cuda import probe, read_nvml, select_visible
from rlctl_hw.vendors.nvidia_smi import Gpu, MigSlice

GPUS = tuple(Gpu(i, "NVIDIA L4", f"GPU-{i}{i}", 22600, "8.9") for i in range(4))
CUT = Gpu(0, "NVIDIA A100-SXM4-80GB", "GPU-ff", 80000, "8.0", None, True, (MigSlice("MIG-1", "3g.40gb", 39000),))


class FakeNvml:
    """Two GPUs; the second is lost, or the library is missing."""

    NVML_DEVICE_MIG_ENABLE = 1
    nvmlMemory_v2 = 2

    def __init__(self, *, missing: bool = False, old: bool = False) -> None:
        self.missing, self.old = missing, old

    def nvmlInit(self) -> None:
        if self.missing:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    def nvmlShutdown(self) -> None:
        pass

    def nvmlDeviceGetCount(self) -> int:
        return 2

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        if index == 1:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)
        return index

    def nvmlDeviceGetMemoryInfo(self, handle: int, version: int | None = None) -> SimpleNamespace:
        if self.old and version is not None:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_FUNCTION_NOT_FOUND)
        return SimpleNamespace(total=100 * 2**20, reserved=4 * 2**20)

    def nvmlDeviceGetName(self, handle: int) -> str:
        return "NVIDIA L4"

    def nvmlDeviceGetUUID(self, handle: int) -> str:
        return "GPU-00"

    def nvmlDeviceGetCudaComputeCapability(self, handle: int) -> tuple[int, int]:
        return (8, 9)

    def nvmlSystemGetDriverVersion(self) -> str:
        return "570.1"

    def nvmlDeviceGetMigMode(self, handle: int) -> tuple[int, int]:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)


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
    ],
)
def test_visible_devices_are_those_cuda_would_show(setting: str | None, indices: list[int]):
    assert [device.index for device in select_visible(GPUS, setting).devices] == indices


def test_a_slice_counts_as_a_single_device_with_its_own_memory():
    for setting in (None, "0", "MIG-1"):
        (device,) = select_visible((CUT, *GPUS[1:]), setting).devices
        assert (device.uuid, round(device.memory_gib), device.compute_capability) == ("MIG-1", 38, "8.0")


def test_a_cut_gpu_is_left_out_beside_whole_ones():
    visible = select_visible((CUT, *GPUS[1:]), "1,0,2")
    assert [device.index for device in visible.devices] == [1, 2]
    assert "MIG" in visible.notes[0]


def test_a_gpu_that_hides_its_memory_takes_it_from_the_catalogue_or_is_left_out():
    silent = [Gpu(0, "NVIDIA L4"), Gpu(1, "NVIDIA Unheard Of")]
    visible = select_visible(silent, None)
    assert [(device.memory_gib, device.compute_capability) for device in visible.devices] == [(22.5, "8.9")]
    assert "Unheard Of" in visible.notes[0]


def test_nvml_leaves_out_a_lost_gpu_and_says_so():
    answer = read_nvml(FakeNvml())
    assert [(gpu.memory_mib, gpu.compute_capability) for gpu in answer.gpus] == [(96, "8.9")]
    assert "GPU 1" in answer.errors[0]


def test_nvml_of_an_old_driver_gives_the_whole_memory():
    assert read_nvml(FakeNvml(old=True)).gpus[0].memory_mib == 100


def test_the_tool_answers_where_the_library_is_missing(tmp_path: Path):
    text = "index, name, memory.total [MiB]\n0, NVIDIA L4, 23034 MiB\n"
    host = Host(tmp_path, {"CUDA_VISIBLE_DEVICES": "0"}, lambda _: CommandResult(text, 0))
    found = probe(host, FakeNvml(missing=True))
    assert [device.name for device in found.devices] == ["NVIDIA L4"]
    assert found.facts["cuda.physical"].source == "nvidia-smi"
    assert "NVML" in str(found.facts["cuda.physical"].error)


def test_a_loaded_driver_without_an_answer_is_said(tmp_path: Path):
    (tmp_path / "sys/module/nvidia").mkdir(parents=True)
    (tmp_path / "sys/module/nvidia/version").write_text("570.1\n")
    host = Host(tmp_path, {}, lambda _: CommandResult("", None, "nvidia-smi is not installed"))
    found = probe(host, FakeNvml(missing=True))
    assert not found.devices
    assert found.facts["cuda.driver"].value == "570.1"
    assert "the driver 570.1 is loaded" in str(found.facts["cuda.physical"].error)


def test_physical_and_visible_devices_are_both_facts(tmp_path: Path):
    found = probe(Host(tmp_path, {"CUDA_VISIBLE_DEVICES": ""}), FakeNvml())
    assert found.facts["cuda.physical"].value == ["0: NVIDIA L4"]
    assert found.facts["cuda.visible"].value == []
