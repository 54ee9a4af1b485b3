"""Plan -> Ray placement groups: which worker gets which share of which device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table
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
    engine_size: int = 1
    """Consecutive rollout workers that are one engine together."""

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
    where: dict[str, range] = {role: range(plan.trainer_devices) for role in config.roles()}
    if config.reward is not None:
        where["rollout"] = range(first_rollout, first_rollout + plan.rollout_devices)
    num_bundles = max(max(bundles) for bundles in where.values()) + 1
    tenants = [sum(bundle in bundles for bundles in where.values()) for bundle in range(num_bundles)]
    slots = {
        role: tuple(Slot(bundle, _share(tenants[bundle])) for bundle in bundles) for role, bundles in where.items()
    }
    return Layout(plan.device, num_bundles, slots, plan.rollout_tensor_parallel)


def reserve(layout: Layout, *, timeout_s: float) -> PlacementGroup:
    """Reserve the bundles; raise when the cluster does not give them in time."""
    bundle = {"CPU": 1.0} | ({} if layout.device == "cpu" else {RESOURCE[layout.device]: 1.0})
    # Accelerators are packed onto as few nodes as hold them; CPUs are only counted, and would all come from one node.
    strategy = "SPREAD" if layout.device == "cpu" else "PACK"
    group = placement_group([dict(bundle) for _ in range(layout.num_bundles)], strategy=strategy)
    if not group.wait(timeout_seconds=timeout_s):
        free = ray.available_resources()
        raise UserError(
            f"the Ray cluster did not give {layout.num_bundles} x {bundle} within {timeout_s:g} s; "
            f"free now: { {name: free.get(name, 0) for name in bundle} }",
            "wait for other jobs to end, ask for fewer devices, or raise ray.start_timeout_s",
            exit_code=LAUNCH,
        )
    return group


def settle(layout: Layout, group: PlacementGroup) -> Layout:
    """Return the layout with its bundles in the order of nodes and devices, so that an engine has neighbours."""
    if layout.engine_size == 1:
        return layout
    nodes: dict[int, str] = placement_group_table(group)["bundles_to_node_id"]
    return in_order(layout, nodes, _devices_of(layout, group))


def in_order(layout: Layout, nodes: Mapping[int, str], devices: Mapping[int, int]) -> Layout:
    """Sort bundles by node and device; refuse an engine that would span nodes."""
    order = sorted(range(layout.num_bundles), key=lambda bundle: (nodes[bundle], devices[bundle]))
    slots = {
        role: tuple(replace(slot, bundle=order[slot.bundle]) for slot in taken) for role, taken in layout.slots.items()
    }
    rollout, size = slots.get("rollout", ()), layout.engine_size
    for first in range(0, len(rollout), size):
        spanned = {nodes[slot.bundle] for slot in rollout[first : first + size]}
        if len(spanned) > 1:
            raise UserError(
                f"a rollout engine of {size} devices would span {len(spanned)} nodes: the cluster's free devices do "
                "not divide that way",
                "lower rollout.tensor_parallel, choose numbers of devices that it divides, or wait for whole nodes",
                exit_code=LAUNCH,
            )
    return replace(layout, slots=slots)


def _devices_of(layout: Layout, group: PlacementGroup) -> dict[int, int]:
    """Return the number of each bundle's device on its node; on CPU the bundle's own."""
    bundles = range(layout.num_bundles)
    if layout.device == "cpu":
        return {bundle: bundle for bundle in bundles}
    kind, ask = RESOURCE[layout.device], ray.remote(_own_device)
    asked = [ask.options(**actor_options(layout, group, Slot(bundle, 1.0))).remote(kind) for bundle in bundles]
    return dict(zip(bundles, ray.get(asked), strict=True))


def _own_device(kind: str) -> int:
    return int(ray.get_runtime_context().get_accelerator_ids()[kind][0])


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
