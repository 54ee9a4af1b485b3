"""Asking the survey and the planner for a run; what does not fit becomes a `UserError` with exit code 3."""

from __future__ import annotations

from rlctl_hw.plan import plan
from rlctl_hw.probe import parse_hardware, survey
from rlctl_hw.types import DoesNotFit, Hardware, Plan

from rlctl.workload import shape_of, workload_from_config
from rlctl_train.config import RunConfig
from rlctl_train.config.errors import DOES_NOT_FIT, PREFLIGHT, UserError


def plan_here(config: RunConfig, hardware: Hardware | None = None) -> Plan:
    """Return the plan of a run on this machine, or on the hardware given."""
    try:
        return plan(workload_from_config(config, shape_of(config)), hardware or survey())
    except DoesNotFit as error:
        remedy = "; or ".join(error.remedies) or "use a smaller model or larger hardware"
        raise UserError(error.what, remedy, exit_code=DOES_NOT_FIT) from error


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
        return survey()
    try:
        return parse_hardware(spec)
    except ValueError as error:
        raise UserError(f"--hw {error}", "name it like h100-80gb:8x4 or cpu:2") from error


def device_key(hardware: Hardware) -> str | None:
    """Return the device catalogue's key of the accelerators, where all are of one kind that it knows."""
    keys = {device.catalogue for device in hardware.devices}
    return keys.pop() if len(keys) == 1 else None
