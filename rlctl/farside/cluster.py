"""The doctor on the nodes of a Ray cluster, asked through Ray: where a launcher has no shell on each node."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from rlctl.farside import examination
from rlctl.farside.promise import Promise
from rlctl.farside.report import Report
from rlctl.launchers import vendors
from rlctl.rundir import Run
from rlctl_train.config.errors import LAUNCH, UserError

if TYPE_CHECKING:
    import ray

LIMIT_S = 240.0


def examine_cluster(run: Run, address: str) -> list[Report]:
    """Run the checks on every node of the cluster that has what was planned; keep a report of each that answers."""
    import ray

    case = examination.case_of(run)
    assert case.config is not None
    try:
        ray.init(address=address, namespace="rlctl", log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(
            f"the Ray cluster at {address} cannot be asked: {error}", "look at `ray status` there", exit_code=LAUNCH
        ) from error
    try:
        nodes = [node for node in ray.nodes() if node["Alive"] and _is_meant(node, case.promise)]
        asked = [_ask(run, node, index) for index, node in enumerate(sorted(nodes, key=lambda n: n["NodeID"]))]
        ray.wait(asked, num_returns=len(asked), timeout=LIMIT_S)
        found = [_answer(ref) for ref in asked]
    finally:
        ray.shutdown()
    return [examination.keep(run, report) for report in found if report is not None]


def report_from(data: dict[str, Any], index: int) -> Report:
    """Examine the machine of this process as a node of the run that the data describe."""
    return examination.report_of(examination.case_from(data), index)


def _is_meant(node: dict[str, Any], promise: Promise | None) -> bool:
    """Say whether a node has as many devices as were planned for; a head without any is no node of the run."""
    machine = None if promise is None else promise.machine
    wanted = {} if machine is None else vendors.ray_resources(machine.kind, machine.num_devices)
    return all(node["Resources"].get(name, 0) >= amount for name, amount in wanted.items())


def _ask(run: Run, node: dict[str, Any], index: int) -> ray.ObjectRef:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    # Without it Ray hides every device from a task that asks for none.
    shown = {"env_vars": {"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}}
    there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
    task = ray.remote(num_cpus=0, max_retries=0)(report_from)
    return task.options(scheduling_strategy=there, runtime_env=shown).remote(examination.told(run), index)


def _answer(ref: ray.ObjectRef) -> Report | None:
    """Return a node's report, None where the node gave none: the comparison names it."""
    import ray
    from ray.exceptions import RayError

    try:
        return ray.get(ref, timeout=0)
    except RayError:
        return None
