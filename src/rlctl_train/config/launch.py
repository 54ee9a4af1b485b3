"""Where a run is launched, and what is done when it is interrupted there."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from rlctl_train.config.launch_base import Elsewhere, Launching
from rlctl_train.config.launch_environment import EnvironmentConfig, WheelEnvironment
from rlctl_train.config.launch_ray import RayLaunch


class LocalLaunch(Launching):
    """This machine."""

    type: Literal["local"] = "local"


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
