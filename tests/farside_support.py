"""Orders for machines elsewhere, and the run folders they make."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from rlctl_hw.types import DeviceKind

from rlctl import rundir
from rlctl.launchers.base import Order
from rlctl.rundir import Run
from rlctl_train.config import RunConfig
from tests.runs import CONFIG, PLAN


def order(
    kind: DeviceKind = "cpu",
    environment: dict[str, Any] | None = None,
    *,
    machine: str = "cpu:1",
    root: Path = Path("/runs/first"),
    **sections: Any,
) -> Order:
    """Return a small run on two nodes through Slurm."""
    launch: dict[str, Any] = {"type": "slurm", "machine": machine, "nodes": 2}
    launch |= {} if environment is None else {"environment": environment}
    config = {**CONFIG, "reward": {"type": "arithmetic"}, "launch": launch, **sections}
    return Order(root, RunConfig.model_validate(config), replace(PLAN, device=kind, num_nodes=2), Path.cwd(), {})


def create(made: Order) -> Run:
    """Write the run folder of an order."""
    config, plan = made.config.model_dump(mode="json"), made.plan.to_json()
    return rundir.create(made.root.parent, made.root.name, config=config, plan=plan, origin={})
