"""Ray for one run: a private cluster with a token of its own, or an existing one that has what is needed."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partialmethod
from typing import Any

import ray
from ray._private.node import Node
from ray._private.parameter import RayParams
from ray.exceptions import RayError

from rlctl_train.config.errors import LAUNCH, UserError, first_line
from rlctl_train.config.trainer import NODES_VARIABLE, RayConfig

Resources = dict[str, float]
POLL_S = 0.2
SLOW_START = "timed out during startup"
"""What Ray says when its processes were not up in time."""


def connect(config: RayConfig, *, needed: Resources, object_store_gib: float, wait_s: float = 0.0) -> str:
    """Start a private cluster, or join the one named; return the address.

    Refuses a cluster that is too small, and stays so for `wait_s`: it may just have lost a node.
    Authentication comes from the environment, which Ray reads when it is imported.
    """
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR", "namespace": "rlctl"}
    address = config.to_join(os.environ)
    if address is None:
        context = _start(
            deadline=time.monotonic() + config.start_timeout_s,
            include_dashboard=False,
            num_cpus=max(1, round(needed.get("CPU", 1) + 0.5)),
            num_gpus=round(needed.get("GPU", 0)),
            object_store_memory=int(object_store_gib * 2**30),
            **quiet,
        )
    else:
        deadline = time.monotonic() + config.start_timeout_s
        nodes = os.environ.get(NODES_VARIABLE)
        if nodes is not None:
            _await_listener(address, deadline)
        context = _join(address, config.start_timeout_s, quiet)
        if nodes is not None:
            _await_nodes(nodes.split(","), deadline)
    _require(needed, wait_s)
    return context.address_info["gcs_address"]


def _start(*, deadline: float, **settings: Any) -> Any:
    """Start a private cluster. Ray gives its own processes 30 s, too little on a busy machine: try until `deadline`."""
    _trim_ray()
    while True:
        try:
            return ray.init(address="local", **settings)
        except Exception as error:  # Ray raises nothing narrower
            if SLOW_START not in str(error):
                raise
            ray.shutdown()
            if time.monotonic() > deadline:
                raise UserError(
                    "Ray did not start within ray.start_timeout_s",
                    "see what keeps this machine busy, or raise ray.start_timeout_s",
                    exit_code=LAUNCH,
                ) from error


def _trim_ray() -> None:
    """Have the private cluster's agent take any free port, and leave out what only other clusters need.

    Ray gives every cluster's agent 52365, and one that is started later and finds it taken accepts no jobs. Nobody adds
    nodes to this cluster, no driver prints its workers' logs, and without a dashboard its server has but Ray's usage
    statistics to send: the processes for that cost seconds of start-up.
    `ray.init` has no arguments for these, as `ray start` has.
    """
    trimmed = partialmethod(
        RayParams.__init__, dashboard_agent_listen_port=0, no_monitor=True, include_log_monitor=False
    )
    RayParams.__init__ = trimmed  # pyright: ignore[reportAttributeAccessIssue]
    Node.start_api_server = lambda *_, **__: None  # pyright: ignore[reportAttributeAccessIssue]


def _join(address: str, timeout_s: float, quiet: dict[str, Any]) -> Any:
    try:
        # Ray itself waits for minutes where nobody listens.
        host, port = address.rsplit(":", 1)
        socket.create_connection((host, int(port)), timeout=timeout_s).close()
        return ray.init(address=address, **quiet)
    except (OSError, RayError, RuntimeError, ValueError) as error:
        raise UserError(
            f"cannot connect to the Ray cluster at ray.address={address!r}: {first_line(error)}",
            "check HOST:PORT, that it runs (`ray status`) and its token (RAY_AUTH_MODE, RAY_AUTH_TOKEN), or unset "
            "ray.address",
            exit_code=LAUNCH,
        ) from error


def _await_listener(address: str, deadline: float) -> None:
    """Wait for the head of a cluster that is just being started; `_join` says what is wrong when it does not come."""
    host, port = address.rsplit(":", 1)
    while time.monotonic() < deadline:
        try:
            socket.create_connection((host, int(port)), timeout=POLL_S).close()
            return
        except OSError:
            time.sleep(POLL_S)


def _await_nodes(names: Sequence[str], deadline: float) -> None:
    """Wait until the nodes of a cluster that is just being started have joined it."""
    while missing := [name for name in names if name not in _node_names()]:
        if time.monotonic() > deadline:
            raise UserError(
                f"{len(missing)} of {len(names)} nodes did not join the Ray cluster within ray.start_timeout_s: "
                f"{', '.join(missing)}",
                f"read logs/ray-{missing[0]}.log of the run folder, or raise ray.start_timeout_s",
                exit_code=LAUNCH,
            )
        time.sleep(POLL_S)


def _node_names() -> set[str]:
    return {node["NodeName"] for node in ray.nodes() if node["Alive"]}


def _require(needed: Resources, wait_s: float) -> None:
    deadline = time.monotonic() + wait_s
    while short := _missing(needed, have := ray.cluster_resources()):
        if time.monotonic() < deadline:
            time.sleep(POLL_S)
            continue
        asked = ", ".join(f"{amount:g} {name}" for name, amount in short.items())
        found = ", ".join(f"{have.get(name, 0):g} {name}" for name in short)
        raise UserError(
            f"the Ray cluster has {found}, but the run asks for {asked}",
            "lower trainer.num_devices or rollout.num_devices, or add nodes to the cluster",
            exit_code=LAUNCH,
        )


def _missing(needed: Resources, have: Mapping[str, float]) -> Resources:
    return {name: amount for name, amount in needed.items() if have.get(name, 0) < amount}


def collect(refs: Iterable[ray.ObjectRef], on_each: Callable[[], None] = lambda: None) -> list[Any]:
    """Return the values in order, raising as soon as any one fails (a dead peer leaves the others waiting)."""
    refs = list(refs)
    pending = list(refs)
    while pending:
        ready, pending = ray.wait(pending, num_returns=1)
        ray.get(ready)
        on_each()
    return ray.get(refs)
