"""Plan -> Ray placement groups: which worker gets which share of which device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
from rlctl_hw.types import Plan

from rlctl_train.config import RunConfig
from rlctl_train.config.errors import LAUNCH, UserError

RESOURCE = {"cpu": "CPU", "cuda": "GPU", "rocm": "GPU", "ascend": "NPU"}
SCORE_CPUS = 0.5


@dataclass(frozen=True)
class Slot:
    """A share of one bundle, for one worker."""

    bundle: int
    share: float


@dataclass(frozen=True)
class Layout:
    """Bundles of one device each, and for every role the slot of each of its workers."""

    device: str
    num_bundles: int
    slots: dict[str, tuple[Slot, ...]]

    @property
    def needed(self) -> dict[str, float]:
        """Resources the whole layout asks of the cluster."""
        needed = {"CPU": self.num_bundles + SCORE_CPUS}
        if self.device != "cpu":
            needed[RESOURCE[self.device]] = float(self.num_bundles)
        return needed


def lay_out(plan: Plan, config: RunConfig) -> Layout:
    """Give every worker a device: trainer roles share theirs; rollout shares them too, or has its own."""
    first_rollout = 0 if config.placement == "colocated" else plan.trainer_devices
    where: dict[str, range] = {role: range(plan.trainer_devices) for role in config.algo.roles()}
    if config.reward is not None:
        where["rollout"] = range(first_rollout, first_rollout + plan.rollout_devices)
    num_bundles = max(max(bundles) for bundles in where.values()) + 1
    tenants = [sum(bundle in bundles for bundles in where.values()) for bundle in range(num_bundles)]
    slots = {
        role: tuple(Slot(bundle, _share(tenants[bundle])) for bundle in bundles) for role, bundles in where.items()
    }
    return Layout(plan.device, num_bundles, slots)


def reserve(layout: Layout, *, timeout_s: float) -> PlacementGroup:
    """Reserve the bundles; raise when the cluster does not give them in time."""
    bundle = {"CPU": 1.0} | ({} if layout.device == "cpu" else {RESOURCE[layout.device]: 1.0})
    group = placement_group([dict(bundle) for _ in range(layout.num_bundles)], strategy="PACK")
    if not group.wait(timeout_seconds=timeout_s):
        free = ray.available_resources()
        raise UserError(
            f"the Ray cluster did not give {layout.num_bundles} x {bundle} within {timeout_s:g} s; "
            f"free now: { {name: free.get(name, 0) for name in bundle} }",
            "wait for other jobs to end, ask for fewer devices, or raise ray.start_timeout_s",
            exit_code=LAUNCH,
        )
    return group


def actor_options(layout: Layout, group: PlacementGroup, slot: Slot) -> dict[str, Any]:
    """Return the Ray options that put an actor into its slot."""
    options: dict[str, Any] = {
        "scheduling_strategy": PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=slot.bundle),
        "num_cpus": slot.share,
    }
    if layout.device in ("cuda", "rocm"):
        options["num_gpus"] = slot.share
    elif layout.device == "ascend":
        options["resources"] = {"NPU": slot.share}
    return options


def _share(tenants: int) -> float:
    # Ray counts resources in ten-thousandths; rounding down keeps the sum within one device.
    return int(10_000 / tenants) / 10_000
