"""Where a run is launched, and what is done when it is interrupted there."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from rlctl_train.config.base import Config
from rlctl_train.config.launch_environment import EnvironmentConfig, SameEnvironment, WheelEnvironment


class Launching(Config):
    """What every way of launching has."""

    max_restarts: NonNegativeInt = 3
    """How often a job replaces lost workers by itself: a rollout engine within its step, any other worker or a node by
    going back to the last checkpoint; 0 ends it at the first loss."""


class Elsewhere(Launching):
    """What every way of launching on other machines has."""

    machine: str | None = None
    """One of the machines, as `DEVICE:COUNT` such as h100-80gb:8 or cpu:2; `--gpus` sets it."""
    nodes: PositiveInt = 1
    """How many of them; `--nodes` sets it."""
    environment: EnvironmentConfig = SameEnvironment()
    """The interpreter and packages there."""


class LocalLaunch(Launching):
    """This machine."""

    type: Literal["local"] = "local"


class RayLaunch(Elsewhere):
    """A Ray cluster that runs already, by job submission."""

    type: Literal["ray"] = "ray"
    address: str
    """Of the dashboard, such as http://127.0.0.1:8265; `--ray` sets it."""


class SlurmLaunch(Elsewhere):
    """Slurm: a batch job that starts Ray on its nodes. The run folder lies where every node sees it."""

    type: Literal["slurm"] = "slurm"
    partition: str | None = None
    """Partition of the job; unset leaves it to Slurm."""


class CloudLaunch(Elsewhere):
    """A cloud or Kubernetes, through SkyPilot."""

    type: Literal["cloud"] = "cloud"
    infra: str | None = None
    """Where, as SkyPilot names it: aws, gcp/us-central1, k8s, …; unset takes the cheapest that is set up."""
    spot: bool = False
    """Take machines that may be taken back, at a lower price; `--spot` sets it."""
    environment: EnvironmentConfig = WheelEnvironment()
    """The interpreter and packages there."""


LaunchConfig = Annotated[LocalLaunch | RayLaunch | SlurmLaunch | CloudLaunch, Field(discriminator="type")]
