"""Where a run is launched, and what is done when it is interrupted there."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from rlctl_train.config.launch_base import Elsewhere, Launching
from rlctl_train.config.launch_environment import EnvironmentConfig, WheelEnvironment
from rlctl_train.config.launch_ray import RayLaunch
from rlctl_train.config.launch_slurm import SlurmLaunch


class LocalLaunch(Launching):
    """This machine."""

    type: Literal["local"] = "local"


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
