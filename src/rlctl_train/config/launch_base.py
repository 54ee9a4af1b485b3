"""What every way of launching has, and every way on other machines."""

from __future__ import annotations

from pydantic import NonNegativeInt, PositiveInt

from rlctl_train.config.base import Config
from rlctl_train.config.launch_environment import EnvironmentConfig, SameEnvironment


class Launching(Config):
    """What every way of launching has."""

    max_restarts: NonNegativeInt = 3
    """How often a job goes back to its last checkpoint by itself after losing a worker or a node."""


class Elsewhere(Launching):
    """What every way of launching on other machines has."""

    machine: str | None = None
    """One of the machines, as `DEVICE:COUNT` such as h100-80gb:8 or cpu:2; `--gpus` sets it."""
    nodes: PositiveInt = 1
    """How many of them; `--nodes` sets it."""
    environment: EnvironmentConfig = SameEnvironment()
    """The interpreter and packages there."""
