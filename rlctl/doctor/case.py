"""What the doctor looks at: the machine, the run and its plan, and the tools that reach outside this process."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlctl_hw.host import Host
from rlctl_hw.types import DeviceKind, Hardware, Plan

from rlctl.doctor.tools import Tools
from rlctl_train.config import RunConfig
from rlctl_train.config.errors import UserError

if TYPE_CHECKING:
    from rlctl.farside.promise import Promise

GIB = 2**30


@dataclass(frozen=True)
class Case:
    """One examination. Without `config` only the machine is examined; `refusal` says why there is no plan."""

    host: Host
    hardware: Hardware
    config: RunConfig | None = None
    plan: Plan | None = None
    refusal: UserError | None = None
    runs_root: Path = Path("runs")
    nodes: tuple[str, ...] = ()
    """Host names of the nodes a run is meant for, as given with `--nodes`."""
    promise: Promise | None = None
    """What the run was planned with, where this machine is one of its nodes."""
    tools: Tools = field(default_factory=Tools)

    @property
    def kind(self) -> DeviceKind:
        """Return the kind of device that will be used: the plan's, else the machine's."""
        return self.hardware.kind if self.plan is None else self.plan.device

    @property
    def num_nodes(self) -> int:
        """Return how many machines take part."""
        return max(1 if self.plan is None else self.plan.num_nodes, len(self.nodes))

    @property
    def num_workers(self) -> int:
        """Return how many devices of one kind exchange tensors: the run's, else the machine's."""
        if self.plan is None:
            return len(self.hardware.devices)
        return max(self.plan.trainer_devices, self.plan.rollout_devices)

    def fact(self, name: str) -> Any:
        """Return the value of one of the survey's facts, None where it is unknown."""
        found = self.hardware.facts.get(name)
        return None if found is None else found.value

    def error(self, name: str) -> str | None:
        """Return what the survey complains of in one of its facts."""
        found = self.hardware.facts.get(name)
        return None if found is None else found.error
