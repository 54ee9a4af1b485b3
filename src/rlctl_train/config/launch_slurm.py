"""Slurm: what a run asks of it, in Slurm's own words where it has them."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, PositiveFloat, PositiveInt

from rlctl_train.config.base import Choices, Config
from rlctl_train.config.launch_base import Elsewhere


def _in_form(pattern: str, meaning: str) -> AfterValidator:
    """Return a validator that refuses text of another form; it says what it is not, and how to write it."""

    def check(value: str) -> str:
        if re.fullmatch(pattern, value) is None:
            raise ValueError(meaning)
        return value

    return AfterValidator(check)


TimeLimit = Annotated[
    str,
    Field(coerce_numbers_to_str=True),
    _in_form(r"[0-9]+(:[0-5][0-9]:[0-5][0-9])?", "is not a time; give it as H:MM:SS or in minutes, such as 4:00:00"),
]
Word = Annotated[str, _in_form(r"\S+", "is not one word; give it without spaces")]
Line = Annotated[str, _in_form(r"[^\n]+", "is not one line; give each line by itself")]
Option = Annotated[str, _in_form(r"--\S.*", "is not an option; give it as --NAME=VALUE")]


class ContainerConfig(Config):
    """How the image of `launch.environment` is run; the runs' folder, the folder of submission and /tmp are mounted."""

    runtime: Annotated[
        Literal["apptainer", "enroot", "podman"],
        Choices(
            {
                "apptainer": "`apptainer exec`; the image is a .sif file or a registry's name",
                "enroot": "`enroot start`; the image is a .sqsh file or a container made before",
                "podman": "`podman run`; the image is a registry's name",
            }
        ),
    ] = "apptainer"
    """Program that runs the container on each node."""
    mounts: tuple[Line, ...] = ()
    """Further folders of the node to mount, as HOST or HOST:INSIDE."""


class SlurmLaunch(Elsewhere):
    """Slurm: a batch job that starts Ray on its nodes. The run folder lies where every node sees it."""

    type: Literal["slurm"] = "slurm"
    partition: Word | None = None
    """Partition of the job; unset leaves it to Slurm, as do the others below."""
    account: Word | None = None
    """Account that is charged."""
    qos: Word | None = None
    """Quality of service."""
    time_limit: TimeLimit | None = None
    """Longest time in one piece, as H:MM:SS or in minutes; the job saves before it, and queues again."""
    save_before_s: PositiveInt = 120
    """Seconds before the time limit or preemption at which the job is told to save; more than a step takes."""
    cpus_per_node: PositiveInt | None = None
    """CPU cores of each node; unset asks for the plan's threads of all workers of a node."""
    memory_gib: PositiveFloat | None = None
    """Memory of each node, in GiB; unset asks for what the plan expects of a node and a quarter more."""
    gres: Word | None = None
    """Accelerators of each node as the site names them, such as gpu:h100:8; unset is gpu:COUNT, on Ascend npu:COUNT."""
    constraint: Word | None = None
    """Features the nodes must have."""
    exclude: Word | None = None
    """Nodes to leave out, such as node[3,7-9]."""
    reservation: Word | None = None
    """Reservation to use."""
    modules: tuple[Word, ...] = ()
    """Environment modules to load, in this order."""
    setup: tuple[Line, ...] = ()
    """Lines of bash that run first on every node."""
    network_interface: Word | None = None
    """Network interface of Ray and of collectives, such as ib0; unset leaves it to the node's routes."""
    container: ContainerConfig = ContainerConfig()
    """How an image is run, with `launch.environment.type=image`."""
    sbatch: tuple[Option, ...] = ()
    """Further options of sbatch, such as --mail-type=END."""

    @property
    def time_limit_s(self) -> int | None:
        """Return the time limit in seconds."""
        if self.time_limit is None:
            return None
        *hours, minutes, seconds = (int(part) for part in f"{self.time_limit}:0".split(":")[:3])
        return sum(hours) * 3600 + minutes * 60 + seconds
