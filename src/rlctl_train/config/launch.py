"""Where a run is launched, and what is done when it is interrupted there."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from rlctl_train.config.launch_base import Launching
from rlctl_train.config.launch_cloud import CloudLaunch
from rlctl_train.config.launch_ray import RayLaunch
from rlctl_train.config.launch_slurm import SlurmLaunch


class LocalLaunch(Launching):
    """This machine."""

    type: Literal["local"] = "local"


LaunchConfig = Annotated[LocalLaunch | RayLaunch | SlurmLaunch | CloudLaunch, Field(discriminator="type")]
