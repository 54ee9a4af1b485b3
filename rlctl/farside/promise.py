"""What a run was planned with: the machines and the versions; `launch/environment.json` of the run folder keeps it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rlctl_hw.types import DeviceKind

from rlctl import planning
from rlctl_train.config.errors import UserError
from rlctl_train.config.launch import LaunchConfig, LocalLaunch

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Machine:
    """One node as it was planned for."""

    kind: DeviceKind
    num_devices: int
    """On CPU, cores."""
    memory_gib: float
    """Of the smallest device; on CPU, of the host."""
    device: str | None = None
    """Key in the device catalogue."""

    @property
    def words(self) -> str:
        """Return the machine in words."""
        if self.kind == "cpu":
            return f"CPU with {self.num_devices} cores"
        return f"{self.num_devices} x {self.device or self.kind} of {self.memory_gib:.1f} GiB"


@dataclass(frozen=True)
class Promise:
    """What every node of a run must have."""

    environment: str
    """`same`, `wheel` or `image`."""
    machine: Machine | None
    num_nodes: int
    versions: Mapping[str, str]
    """Of packages, by name; what is not listed may have any version."""
    image: str | None = None
    extras: tuple[str, ...] = ()
    source: str = ""
    """Where the versions come from, in words."""

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {"schema_version": SCHEMA_VERSION, **asdict(self)}


def read(file: Path) -> Promise | None:
    """Read a promise; None where nothing was promised."""
    if not file.is_file():
        return None
    try:
        return from_json(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError) as error:
        hint = "the run was launched by another version of rlctl: use that one"
        raise UserError(f"{file} is not of this version: {error}", hint) from error


def from_json(data: Mapping[str, Any]) -> Promise:
    """Read a promise back from `to_json`; raises ValueError, KeyError or TypeError where it is none."""
    fields = dict(data)
    if fields.pop("schema_version") != SCHEMA_VERSION:
        raise ValueError("another schema_version")
    fields["machine"] = None if fields["machine"] is None else Machine(**fields["machine"])
    return Promise(**{**fields, "extras": tuple(fields["extras"])})


def machine_of(launch: LaunchConfig) -> Machine | None:
    """Return the node that a run is launched on by name, None for this machine."""
    if isinstance(launch, LocalLaunch) or launch.machine is None:
        return None
    named = planning.hardware_named(launch.machine)
    if named.kind == "cpu":
        return Machine("cpu", named.cpu_cores, named.host_memory_gib)
    memory = min(device.memory_gib for device in named.devices)
    return Machine(named.kind, len(named.devices), memory, planning.device_key(named))
