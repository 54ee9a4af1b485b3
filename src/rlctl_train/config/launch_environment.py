"""What a run's processes find on other machines: the interpreter and packages there."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from rlctl_train.config.base import Config


class SameEnvironment(Config):
    """An environment that every node has already, with this version of rlctl."""

    type: Literal["same"] = "same"
    python: str | None = None
    """Path of its interpreter there; unset is the one that submits, on a shared file system."""


class WheelEnvironment(Config):
    """Made on each node by venv and pip: this very version of rlctl, its extras by hardware, and pinned versions."""

    type: Literal["wheel"] = "wheel"
    extras: tuple[str, ...] = ()
    """Further extras of rlctl, such as flash; those that hardware and run ask for need no mention."""
    python: str = "python3"
    """Interpreter on the nodes that makes it; rlctl needs 3.11 or newer."""
    folder: str = "$HOME/.cache/rlctl/environments"
    """Where environments are kept on the nodes; one with the same contents is used again."""


class ImageEnvironment(Config):
    """A container image with torch and the rollout engine."""

    type: Literal["image"] = "image"
    image: str | None = None
    """Name of the image; unset takes the vendor's public one for the device."""
    holds_rlctl: bool = False
    """Whether this version of rlctl is in it; otherwise it is added to the image's packages when the job starts."""


EnvironmentConfig = Annotated[SameEnvironment | WheelEnvironment | ImageEnvironment, Field(discriminator="type")]
