"""What ways of launching have in common."""

from __future__ import annotations

from pydantic import NonNegativeInt, PositiveInt

from rlctl_train.config.base import Config
from rlctl_train.config.launch_environment import EnvironmentConfig, SameEnvironment


class Launching(Config):
    """What every way of launching has."""

    max_restarts: NonNegativeInt = 3
    """How often a job replaces lost workers by itself: a rollout engine within its step, any other worker or a node by
    going back to the last checkpoint; 0 ends it at the first loss."""


class Elsewhere(Launching):
    """What every way of launching on other machines has."""

    machine: str | None = None
    """One of the machines, as `DEVICE:COUNT` such as h100-80gb:8; `--gpus` sets it. Unset asks a Ray cluster."""
    nodes: PositiveInt = 1
    """How many of them; `--nodes` sets it."""
    environment: EnvironmentConfig = SameEnvironment()
    """The interpreter and packages there."""
