"""Launching in a cloud or on Kubernetes, through SkyPilot."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveInt

from rlctl_train.config.launch_base import Elsewhere
from rlctl_train.config.launch_environment import EnvironmentConfig, WheelEnvironment


class CloudLaunch(Elsewhere):
    """A cloud or Kubernetes, through SkyPilot."""

    type: Literal["cloud"] = "cloud"
    infra: str | None = None
    """Where, as SkyPilot names it: aws, gcp/us-central1, k8s, …; unset takes the cheapest that is set up."""
    environment: EnvironmentConfig = WheelEnvironment()
    """The interpreter and packages there."""
    spot: bool = False
    """Take machines that may be taken back, at a lower price, as a managed job that goes on elsewhere; `--spot` sets
    it."""
    accelerators: str | None = None
    """Accelerators of one machine in SkyPilot's words, such as H100-SXM:8; unset follows from `machine`."""
    disk_gib: PositiveInt | None = None
    """Disk of each machine, in GiB; unset leaves it to SkyPilot."""
    setup: tuple[str, ...] = ()
    """Shell lines for a fresh machine, before its environment is made."""
    bucket: str | None = None
    """Where checkpoints and results are kept: s3://NAME/FOLDER, gs://…, the name of a bucket to make, or the path of a
    folder that all machines share. Unset leaves them on the machines."""
    envs: dict[str, str] = Field(default_factory=dict)
    """Variables of the run there, such as NCCL_SOCKET_IFNAME; they are written into the task."""
    secrets: tuple[str, ...] = ()
    """Names of variables that the run needs and nobody may read: their values go from this environment to SkyPilot."""
    idle_minutes: PositiveInt = 10
    """Minutes after the run's end until the machines are given back."""
