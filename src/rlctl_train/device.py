"""The only file that names an accelerator's module in torch."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlctl_train.config.profile import MsprofConfig

COLLECTIVES = {"cpu": "gloo", "cuda": "nccl", "npu": "hccl"}
"""Communication backend of torch.distributed for each device type."""
ON_PCI = Path("/sys/bus/pci/devices")


def current(kind: str) -> torch.device:
    """Return the device of this process: the host, or the first visible accelerator (a worker sees only its own)."""
    if kind == "cpu":
        return torch.device("cpu")
    device = torch.device(kind, 0)
    torch.get_device_module(device).set_device(device)
    return device


def release_cache(device: torch.device) -> None:
    """Give memory that torch holds but does not use back to the device, for other processes."""
    if device.type != "cpu":
        torch.get_device_module(device).empty_cache()


def synchronize(kind: str) -> None:
    """Wait until the accelerator has done what it was given; a CPU has already."""
    if kind != "cpu":
        torch.get_device_module(kind).synchronize()


def reset_peak(kind: str) -> None:
    """Start the accelerator's memory peaks again from what is held now."""
    torch.get_device_module(kind).reset_peak_memory_stats()


def peak_bytes(kind: str) -> tuple[int, int]:
    """Return the accelerator's peaks since `reset_peak`: bytes handed out, bytes held by the allocator."""
    module = torch.get_device_module(kind)
    return module.max_memory_allocated(), module.max_memory_reserved()


def reserved_bytes(kind: str) -> int:
    """Return the bytes that torch's allocator holds on the accelerator now."""
    return torch.get_device_module(kind).memory_reserved()


def allocated_bytes(kind: str) -> int:
    """Return the bytes of all tensors on the accelerator now."""
    return torch.get_device_module(kind).memory_allocated()


def used_bytes(kind: str) -> int:
    """Return the bytes in use on the whole accelerator, by any process."""
    free, total = torch.get_device_module(kind).mem_get_info()
    return total - free


def utilization(kind: str) -> float | None:
    """Return the share of the last moments in which the accelerator computed, as its driver samples it; None unknown.

    A CPU's own is for the process to measure.
    """
    try:
        if kind == "cuda" and torch.version.hip is not None:
            return _amdgpu_load()
        return float(torch.get_device_module(kind).utilization()) / 100
    except Exception:  # the vendors' libraries have errors of their own, and no metric is worth a run
        return None


def _amdgpu_load() -> float:
    """Return what AMD's driver says in sysfs: reading it needs no library of theirs."""
    of = torch.cuda.get_device_properties(0)
    address = f"{of.pci_domain_id:04x}:{of.pci_bus_id:02x}:{of.pci_device_id:02x}.0"
    return int((ON_PCI / address / "gpu_busy_percent").read_text()) / 100


@contextmanager
def allocator_history(kind: str, max_events: int) -> Iterator[None]:
    """Have the allocator keep its last events in the body, with the Python lines that asked; nothing but on CUDA."""
    if kind != "cuda":
        yield
        return
    torch.cuda.memory._record_memory_history(max_entries=max_events)
    try:
        yield
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)


def allocator_snapshot(kind: str) -> Any:
    """Return every block of the allocator, and its history where it keeps one; None but on CUDA.

    Schema: `torch.cuda.memory._snapshot`. Pickled, it is what https://pytorch.org/memory_viz draws.
    """
    return torch.cuda.memory._snapshot() if kind == "cuda" else None


def at_out_of_memory(kind: str, act: Callable[[], None]) -> None:
    """Have CUDA's allocator call `act` at the moment in which memory runs out; nothing on other devices."""
    if kind == "cuda":
        bindings: Any = torch._C  # builds without CUDA lack it
        bindings._cuda_attach_out_of_memory_observer(lambda *_: act())


def vendor_range(name: str) -> AbstractContextManager[object]:
    """Return a range that the vendor's profiler shows: Ascend's by torch_npu (mstx), NVIDIA's by the nvtx package
    (extra `profile`) where it is installed, else by torch, under whose NVTX name ROCm has roctx."""
    torch_npu = _optional("torch_npu")
    if torch_npu is not None:
        return _mstx_range(torch_npu.npu.mstx, name)
    nvtx = _optional("nvtx")
    if nvtx is not None and torch.version.hip is None:
        return nvtx.annotate(name, domain="rlctl")
    return torch.cuda.nvtx.range(name) if torch.cuda.is_available() else nullcontext()


@contextmanager
def _mstx_range(mstx: Any, name: str) -> Iterator[None]:
    """On the host alone: a range with a stream would be a task of the device too."""
    number = mstx.range_start(name)
    try:
        yield
    finally:
        mstx.range_end(number)


@cache
def _optional(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


@contextmanager
def vendor_capture(kind: str) -> Iterator[None]:
    """Have a profiler around this process that waits for it record the body."""
    if kind != "cuda":
        yield
        return
    torch.cuda.profiler.start()
    try:
        yield
    finally:
        synchronize(kind)
        torch.cuda.profiler.stop()


@contextmanager
def ascend_profiled(
    options: MsprofConfig, target: Path, kind: str, *, shapes: bool = False, stacks: bool = False
) -> Iterator[None]:
    """Have torch_npu's profiler record the body into a folder `TARGET_*_ascend_pt`.

    It says what fails and goes on; whether anything was written is for the reader to see.
    """
    profiler = importlib.import_module("torch_npu").profiler
    # The folder is set when the handler is made, so that one has to be made where no analysis is wanted too.
    handler = profiler.tensorboard_trace_handler(str(target.parent), target.name, analyse_flag=options.analyse_flag)
    with profiler.profile(
        activities=[profiler.ProfilerActivity.CPU, profiler.ProfilerActivity.NPU],
        on_trace_ready=handler,
        record_shapes=shapes,
        with_stack=stacks,
        experimental_config=profiler._ExperimentalConfig(
            profiler_level=getattr(profiler.ProfilerLevel, options.profiler_level),
            aic_metrics=getattr(profiler.AiCMetrics, options.aic_metrics),
            l2_cache=options.l2_cache,
            data_simplification=options.data_simplification,
            export_type=profiler.ExportType.Text,
            mstx=True,
        ),
    ):
        yield
        synchronize(kind)


def random_state(device: torch.device) -> Tensor:
    """Return the state of the device's random generator, uint8."""
    return torch.get_rng_state() if device.type == "cpu" else torch.get_device_module(device).get_rng_state()


def set_random_state(device: torch.device, state: Tensor) -> None:
    """Set the state of the device's random generator."""
    if device.type == "cpu":
        torch.set_rng_state(state)
    else:
        torch.get_device_module(device).set_rng_state(state)


def has_fused_adamw(device: torch.device) -> bool:
    """Say whether torch has a one-kernel AdamW for this device."""
    return device.type in ("cpu", "cuda")


def has_varlen_attention(device: torch.device, dtype: torch.dtype) -> bool:
    """Say whether torch's attention over sequences of different lengths runs here (it wants half precision)."""
    if device.type != "cuda" or torch.version.cuda is None or dtype not in (torch.bfloat16, torch.float16):
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)
