"""How the environment comes to SkyPilot's machines: `rlctl.farside`'s lines and image, as a task has them."""

from __future__ import annotations

from rlctl.farside.environment import environment_of
from rlctl.launchers import vendors
from rlctl.launchers.base import Order
from rlctl_train.config.launch_cloud import CloudLaunch


def setup_lines(order: Order, config: CloudLaunch) -> tuple[str, ...]:
    """Return lines of bash for a fresh machine: the person's own, then the environment, which is made there once."""
    made = environment_of(order)
    lines = made.lines(_files(order)) if made.sends_wheel else ()
    return ("set -e", *config.setup, *lines) if config.setup or lines else ()


def run_lines(order: Order) -> tuple[str, ...]:
    """Return lines of bash that set `$python` on each node, and its visibility variables."""
    return (*vendors.visibility_lines(order.plan.device), *environment_of(order).lines(_files(order)))


def image(order: Order) -> str | None:
    """Return the machines' image as SkyPilot writes it, None for its own."""
    name = environment_of(order).image
    return None if name is None else f"docker:{name}"


def file_names(order: Order) -> tuple[str, ...]:
    """Return the files of the run folder's `launch/` that travel."""
    return environment_of(order).file_names


def _files(order: Order) -> str:
    return f'"$HOME/rlctl-runs/{order.name}/launch"'
