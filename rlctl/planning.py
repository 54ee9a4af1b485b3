"""Asking the survey and the planner for a run; what does not fit becomes a `UserError` with exit code 3."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from rlctl_hw.plan import plan
from rlctl_hw.probe import parse_hardware
from rlctl_hw.search import fits
from rlctl_hw.types import DoesNotFit, Hardware, Plan, Workload

from rlctl import launchers
from rlctl.machine import here
from rlctl.workload import shape_of, workload_from_config
from rlctl_train.config import RunConfig
from rlctl_train.config.errors import DOES_NOT_FIT, PREFLIGHT, UserError
from rlctl_train.config.launch import LaunchConfig
from rlctl_train.config.launch_base import Elsewhere

USUAL_MACHINES = ("rtx4090:1", "a100-80gb:1", "h100-80gb:8", "h100-80gb:8x4", "h100-80gb:8x32")
"""From small to large: what is named to a host without accelerators."""
LEAST_BYTES_PER_PARAM = 2


def plan_here(config: RunConfig, hardware: Hardware | None = None) -> Plan:
    """Return the plan of a run on this machine, or on the hardware given."""
    return plan_for(workload_of(config), hardware or here())


def workload_of(config: RunConfig, *, mean_response_tokens: int | None = None) -> Workload:
    """Return what a run asks of the hardware, with the expected length of a response where it is known."""
    return replace(workload_from_config(config, shape_of(config)), mean_response_tokens=mean_response_tokens)


def plan_for(workload: Workload, machine: Hardware) -> Plan:
    """Return the plan of a workload on a machine."""
    try:
        return plan(workload, machine)
    except DoesNotFit as error:
        ways = [*error.remedies, *(_elsewhere(workload) if machine.kind == "cpu" else ())]
        raise _refused(error, ways) from error


@contextmanager
def refusing() -> Iterator[None]:
    """Turn what does not fit into an error a person can mend."""
    try:
        yield
    except DoesNotFit as error:
        raise _refused(error, error.remedies) from error


def _refused(error: DoesNotFit, ways: Sequence[str]) -> UserError:
    remedy = "; or ".join(ways) or "use a smaller model or larger hardware"
    return UserError(error.what, remedy, exit_code=DOES_NOT_FIT)


def with_memory(hardware: Hardware, factor: float) -> Hardware:
    """Return the machine with so many times the memory."""
    devices = tuple(replace(device, memory_gib=factor * device.memory_gib) for device in hardware.devices)
    return replace(hardware, devices=devices, host_memory_gib=factor * hardware.host_memory_gib)


def check_can_train(config: RunConfig) -> None:
    """Refuse to launch what this version only plans for."""
    if config.engine.type != "fsdp2":
        raise UserError(
            f"engine.type={config.engine.type}: this version plans for {config.engine.type} and trains with fsdp2",
            "set engine.type=fsdp2, or look at the plan alone with `rlctl plan`",
            exit_code=PREFLIGHT,
        )


def hardware_named(spec: str | None) -> Hardware:
    """Return the machine that `h100-80gb:8` names, or this one."""
    if spec is None:
        return here()
    try:
        return parse_hardware(spec)
    except ValueError as error:
        raise UserError(f"--hw {error}", "name it like h100-80gb:8x4 or cpu:2") from error


def machine_of(config: LaunchConfig) -> Hardware:
    """Return the machines that a run is launched on; unnamed ones are taken to be like this one."""
    if not isinstance(config, Elsewhere):
        return here()
    machine = config.machine or launchers.machine_of(config)
    if machine is None:
        raise UserError(
            f"launch.machine is unset, and launch.type={config.type} leads to other machines",
            "say what they are, such as --gpus H100:8 --nodes 2, or launch.machine=cpu:4",
        )
    try:
        return hardware_named(f"{machine}x{config.nodes}")
    except UserError as error:
        raise UserError(f"launch.machine={machine}: {error}", "name it like h100-80gb:8 or cpu:4") from error


def _elsewhere(workload: Workload) -> list[str]:
    """Return the smallest usual machine with accelerators that would do, and how to plan for it."""
    least_gib = workload.shape.num_params * LEAST_BYTES_PER_PARAM / 2**30
    for spec in USUAL_MACHINES:
        machine = parse_hardware(spec)
        total_gib = machine.num_nodes * sum(device.memory_gib for device in machine.devices)
        if total_gib >= least_gib and fits(workload, machine):
            return [f"use accelerators: {spec} would do, and --hw {spec} plans for it"]
    return []


def device_key(hardware: Hardware) -> str | None:
    """Return the device catalogue's key of the accelerators, where all are of one kind that it knows."""
    keys = {device.catalogue for device in hardware.devices}
    return keys.pop() if len(keys) == 1 else None
