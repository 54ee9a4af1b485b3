"""Where a run is launched, and what is done when it is interrupted there."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from rlctl_train.config.launch_base import Elsewhere, Launching
from rlctl_train.config.launch_cloud import CloudLaunch


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


LaunchConfig = Annotated[LocalLaunch | RayLaunch | SlurmLaunch | CloudLaunch, Field(discriminator="type")]
