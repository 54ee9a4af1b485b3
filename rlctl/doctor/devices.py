"""The devices themselves: lost ones, mixed ones, slices of one, and memory that other processes hold."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from rlctl_hw.types import Device, MemoryPart
from rlctl_hw.vendors import nvidia_processes

from rlctl.doctor.case import Case
from rlctl.doctor.finding import Finding, Problem, fail, skip, verdict, warn
from rlctl_train.config.rollout import VllmRollout

NODES = {"cuda": "/dev/nvidia[0-9]*", "rocm": "/dev/kfd", "ascend": "/dev/davinci[0-9]*"}
"""Device files of each vendor: where one is, this process was given accelerators."""
VENDORS = {"cuda": "NVIDIA GPU", "rocm": "AMD GPU", "ascend": "Ascend NPU"}
TOOLS = {"cuda": "nvidia-smi", "rocm": "rocm-smi", "ascend": "npu-smi info"}
IDLE_SHARE = {"cuda": 0.05, "rocm": 0.05, "ascend": 0.10}
"""Share of memory that is in use on an idle device: an idle 910B holds about 3.4 of 64 GiB."""
SPARE_SHARE = 0.95
"""No plan is held to more of a device than this: the driver itself takes a little."""
ABSENT = re.compile(r"is not installed$|Library Not Found$|^no AMD driver and no tool|^not given to this process")
LOSS = re.compile(r"in error|cannot be used")


def health(case: Case) -> Finding:
    """Compare the devices the kernel knows with those that answer, and with each other."""
    devices = case.hardware.devices
    problems = [*_silent(case), *_lost(case), *_fabric(case), *_mixed(case, devices), *_slices(devices)]
    names = list(dict.fromkeys(device.name for device in devices))
    return verdict("devices", problems, f"{len(devices)} x {', '.join(names)}")


def occupancy(case: Case) -> Finding:
    """Look for memory that other processes hold on the devices the run may use."""
    name, kind = "device_memory", case.hardware.kind
    if "cpu" in (kind, case.kind):
        return skip(name, "no accelerator will be used")
    used: dict[str, float] = case.fact(f"{kind}.used_gib") or {}
    shown = [(device, used[str(device.index)]) for device in case.hardware.devices if str(device.index) in used]
    if not shown:
        return skip(name, "the survey does not tell how much memory is in use")
    need = _needed_gib(case)
    problems = [problem for device, taken in shown for problem in _taken(case, device, taken, need)]
    return verdict(name, problems, f"at most {max(taken for _, taken in shown):.1f} GiB in use on a device")


def peak_gib(parts: Iterable[MemoryPart]) -> float:
    """Return the sum of the fullest phase."""
    phases: dict[str, float] = {}
    for part in parts:
        phases[part.phase] = phases.get(part.phase, 0.0) + part.gib
    return max(phases.values(), default=0.0)


def _silent(case: Case) -> Iterator[Problem]:
    """Yield vendors of whose devices there are traces, and none that can be used."""
    for kind, pattern in NODES.items():
        if kind == case.hardware.kind:
            continue
        complaints, loaded = _complaints(case, kind), case.fact(f"{kind}.driver")
        if case.fact(f"{kind}.physical"):
            note = case.error(f"{kind}.visible")
            if note and not case.fact(f"{kind}.visible") and "VISIBLE" not in note:
                yield warn(f"no {VENDORS[kind]} can be used: {note}", f"look at `{TOOLS[kind]}`")
        elif loaded and not complaints and not case.host.glob(pattern):
            what = f"the driver of an {VENDORS[kind]} is loaded, and this process was given none"
            yield warn(what, "start the container with its devices (`--gpus all`, `--device`), if it should have any")
        elif loaded or complaints:
            # A desktop's own driver, a node without cards and a run on the CPU do without.
            meant = bool(loaded) and bool(case.host.glob(pattern)) and not str(loaded).startswith("in-kernel")
            by_plan = case.plan is not None and case.plan.device == "cpu"
            reason = "; ".join(complaints) or "its driver is loaded and shows none"
            remedy = f"look at `{TOOLS[kind]}`; reload the driver, or restart the machine or container"
            yield (fail if meant and not by_plan else warn)(f"no {VENDORS[kind]} answers: {reason}", remedy)


def _lost(case: Case) -> Iterator[Problem]:
    kind = case.hardware.kind
    if kind == "cpu":
        return
    told = _complaints(case, kind)
    if LOSS.search(case.error(f"{kind}.visible") or ""):
        told.append(str(case.error(f"{kind}.visible")))
    if missing := case.fact(f"{kind}.missing"):
        told.append(f"{', '.join(missing)}: {case.error(f'{kind}.missing') or 'missing'}")
    if told:
        remedy = f"look at `{TOOLS[kind]}` and `dmesg`; a lost device needs a reset"
        yield warn(f"not every device answers: {'; '.join(told)}", remedy)


def _complaints(case: Case, kind: str) -> list[str]:
    """Return what the survey heard from a vendor's driver and tools, their mere absence left out."""
    parts = (case.error(f"{kind}.physical") or "").split("; ")
    return [part for part in parts if part and not ABSENT.search(part)]


def _fabric(case: Case) -> Iterator[Problem]:
    error = case.error("cuda.fabric") if case.hardware.kind == "cuda" else None
    if error:
        make = fail if case.num_workers > 1 else warn
        yield make(error, "start it: `systemctl start nvidia-fabricmanager`, of the driver's version")


def _mixed(case: Case, devices: Iterable[Device]) -> Iterator[Problem]:
    names = list(dict.fromkeys(device.name for device in devices))
    if len(names) < 2:
        return
    smallest = min(device.memory_gib for device in devices)
    yield warn(
        f"the devices differ ({', '.join(names)}): the smallest ({smallest:.1f} GiB) and the slowest set the pace",
        "list devices of one kind in the visibility variable",
    )
    order = case.host.env.get("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    if case.hardware.kind == "cuda" and order != "PCI_BUS_ID":
        what = f"CUDA_DEVICE_ORDER={order} numbers them otherwise than the survey did"
        yield fail(what, "export CUDA_DEVICE_ORDER=PCI_BUS_ID")


def _slices(devices: Iterable[Device]) -> Iterator[Problem]:
    sliced = [device for device in devices if " MIG " in device.name]
    if sliced:
        yield warn(
            f"{sliced[0].name} is a slice of a GPU: a process sees one, without a path to others",
            "switch MIG off for a whole GPU, or keep to runs of one device",
        )


def _taken(case: Case, device: Device, taken: float, need: float) -> Iterator[Problem]:
    kind, total = device.kind, device.memory_gib
    tool = TOOLS.get(kind, "")
    words = (
        f"{VENDORS.get(kind, kind)} {device.index}: others hold {taken:.1f} of {total:.1f} GiB{_holders(case, device)}"
    )
    remedy = f"end the other processes (`{tool}`), or leave this device out"
    if total - taken < min(need, SPARE_SHARE * total):
        yield fail(f"{words}, and the plan needs {need:.1f} GiB", remedy)
    elif taken > IDLE_SHARE.get(kind, 0.0) * total:
        yield warn(words, remedy)


def _holders(case: Case, device: Device) -> str:
    processes = nvidia_processes.read(case.host).get(device.uuid or "", ()) if device.kind == "cuda" else ()
    return f" ({', '.join(processes[:3])})" if processes else ""


def _needed_gib(case: Case) -> float:
    """Return the most that the plan puts on one device, or that vLLM takes of it at the start."""
    plan = case.plan
    if plan is None:
        return 0.0
    share = 0.0
    if case.config is not None and isinstance(case.config.rollout, VllmRollout):
        share = plan.rollout_gpu_memory_share * plan.device_memory_gib
    return max(peak_gib(plan.memory), share)
