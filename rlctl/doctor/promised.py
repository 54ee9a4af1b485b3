"""A node against what its run was planned with: devices, precision and the versions of packages."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rlctl_hw.placing import has_bf16
from rlctl_hw.types import Hardware

import rlctl
from rlctl.doctor.case import Case
from rlctl.doctor.devices import SPARE_SHARE
from rlctl.doctor.finding import Finding, Problem, fail, skip, verdict, warn

if TYPE_CHECKING:
    from rlctl.farside.promise import Machine, Promise

NOTHING = "nothing was promised of this machine"
WAYS_TO_PACKAGES = {
    "same": "install that version in this environment, or set launch.environment.type=wheel",
    "wheel": "remove this environment's folder on the node, so that it is made again",
    "image": "name an image with that version in launch.environment.image",
}


def devices(case: Case) -> Finding:
    """Compare kind, number and memory of the devices with the machine that was planned for."""
    planned = None if case.promise is None else case.promise.machine
    if planned is None:
        return skip("planned_devices", NOTHING)
    return verdict("planned_devices", _devices(case, planned), _words(case, planned))


def precision(case: Case) -> Finding:
    """See that the devices compute in the precisions of the plan."""
    plan = case.plan
    if case.promise is None or plan is None:
        return skip("planned_precision", NOTHING)
    wanted = {"trainer.compute_dtype": plan.compute_dtype, "rollout.dtype": plan.rollout_dtype}
    without = next((device for device in case.hardware.devices if not has_bf16(device)), None)
    problems = [
        fail(f"planned for {key}={dtype}, and {without.name} has no units for it", f"set {key}=float32")
        for key, dtype in wanted.items()
        if without is not None and plan.device != "cpu" and dtype == "bfloat16"
    ]
    return verdict("planned_precision", problems, ", ".join(dict.fromkeys(wanted.values())))


def versions(case: Case) -> Finding:
    """Compare the installed packages with the versions that were planned with."""
    if case.promise is None:
        return skip("planned_versions", NOTHING)
    fine = ", ".join(f"{name} {version}" for name, version in case.promise.versions.items())
    return verdict("planned_versions", _versions(case, case.promise), fine)


def device_words(hardware: Hardware) -> str:
    """Return how many devices of what model this machine has."""
    if hardware.kind == "cpu":
        return "CPU"
    names = dict.fromkeys(device.catalogue or device.name for device in hardware.devices)
    return f"{len(hardware.devices)} x {', '.join(names)}"


def least_memory_gib(hardware: Hardware) -> float:
    """Return the memory of the smallest device; on CPU, of the host."""
    return hardware.host_memory_gib if hardware.kind == "cpu" else min(d.memory_gib for d in hardware.devices)


def _devices(case: Case, planned: Machine) -> Iterator[Problem]:
    hardware = case.hardware
    what = _words(case, planned)
    remedy = "see that the job is given the devices it asks for, or launch on what is there with launch.machine"
    if hardware.kind != planned.kind:
        yield fail(what, remedy)
        return
    if planned.kind == "cpu":
        if hardware.cpu_cores < planned.num_devices:
            yield warn(what, "ask for as many cores, or the workers share them and are slower")
        return
    least = least_memory_gib(hardware)
    if len(hardware.devices) < planned.num_devices or least < SPARE_SHARE * planned.memory_gib:
        yield fail(what, remedy)
    elif {device.catalogue for device in hardware.devices} != {planned.device}:
        yield warn(what, "times will differ from the plan's; name what is there in launch.machine")


def _words(case: Case, planned: Machine) -> str:
    hardware = case.hardware
    cores = f" with {hardware.cpu_cores} cores" if hardware.kind == "cpu" else ""
    found = f"{device_words(hardware)}{cores} of {least_memory_gib(hardware):.1f} GiB"
    return f"planned for {planned.words} a node; found {found}"


def _versions(case: Case, promise: Promise) -> Iterator[Problem]:
    remedy = WAYS_TO_PACKAGES[promise.environment]
    for name, planned in promise.versions.items():
        found = rlctl.__version__ if name == "rlctl" else case.tools.version(name)
        if found is None:
            yield fail(f"planned with {name} {planned}; it is not installed here", remedy)
        elif found.partition("+")[0] != planned:
            yield fail(f"planned with {name} {planned}; found {found}", remedy)
