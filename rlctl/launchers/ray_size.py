"""What a Ray cluster has: which machine to plan for, and whether a plan fits it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from rlctl_hw.types import Plan

from rlctl_train.config import RunConfig
from rlctl_train.config.errors import LAUNCH, USAGE, UserError

KIND = "accelerator_type:"
RESOURCE = {"cpu": "CPU", "cuda": "GPU", "rocm": "GPU", "ascend": "NPU"}
SCORER_CPUS = 0.5
Resources = Mapping[str, float]


def machine_of(nodes: Sequence[Mapping[str, Any]], address: str) -> str:
    """Return what all nodes are alike, as `DEVICE:COUNT`: those with accelerators where there are any."""
    have = [node["resources_total"] for node in nodes]
    machines = {machine for node in have if (machine := _accelerators(node))}
    machines = machines or {machine for node in have if (machine := _cores(node))}
    if len(machines) != 1:
        found = " and ".join(sorted(machines)) or "no nodes"
        raise UserError(
            f"the Ray cluster at {address} has {found}: that is not one kind of machine to plan for",
            "say which you mean, such as --gpus H100:8 --nodes 2",
            exit_code=USAGE if machines else LAUNCH,
        )
    return machines.pop()


def require(plan: Plan, config: RunConfig, nodes: Sequence[Mapping[str, Any]], address: str) -> None:
    """Refuse a plan that asks for more than the whole cluster has, with both numbers."""
    have: Counter[str] = Counter()
    for node in nodes:
        have.update(node["resources_total"])
    for name, amount in needed(plan, config).items():
        if have[name] < amount:
            raise UserError(
                f"the Ray cluster at {address} has {have[name]:g} {name}, but the run asks for {amount:g}",
                "lower trainer.num_devices or rollout.num_devices, or add nodes to the cluster",
                exit_code=LAUNCH,
            )
    if len(nodes) < plan.num_nodes:
        raise UserError(
            f"the Ray cluster at {address} has {len(nodes)} node(s), but the run asks for {plan.num_nodes}",
            "lower launch.nodes (--nodes), or add nodes to the cluster",
            exit_code=LAUNCH,
        )


def needed(plan: Plan, config: RunConfig) -> dict[str, float]:
    """Return the resources that the driver will reserve: one CPU beside each device, and the graders'."""
    rollout_devices = 0 if config.reward is None else plan.rollout_devices
    devices = (max if config.placement == "colocated" else sum)((plan.trainer_devices, rollout_devices))
    wanted = {"CPU": devices + SCORER_CPUS}
    return wanted if plan.device == "cpu" else {RESOURCE[plan.device]: float(devices)} | wanted


def _accelerators(have: Resources) -> str | None:
    count = math.floor(max(have.get("GPU", 0), have.get("NPU", 0)))
    if not count:
        return None
    kind = next((name.removeprefix(KIND) for name in have if name.startswith(KIND)), "accelerator")
    return f"{kind.lower().removeprefix('amd-instinct-').removesuffix('-oam')}:{count}"


def _cores(have: Resources) -> str | None:
    return f"cpu:{max(1, math.floor(have['CPU']))}" if have.get("CPU") else None
