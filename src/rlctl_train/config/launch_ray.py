"""A Ray cluster: what a run hands to it beside itself."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, PositiveInt

from rlctl_train.config.launch_base import Elsewhere


class RayLaunch(Elsewhere):
    """A Ray cluster that runs already, by job submission."""

    type: Literal["ray"] = "ray"
    address: str
    """Of the dashboard, such as http://127.0.0.1:8265; `--ray` sets it."""
    folder: str | None = None
    """Folder on the cluster for checkpoints and weights, which every node of the run sees; unset is ~/rlctl-runs."""
    runtime_env: dict[str, Any] = Field(default_factory=dict)
    """More of Ray's runtime environment, such as `{"pip": [...]}`; never secrets, for Ray shows it to everybody."""
    save_timeout_s: PositiveInt = 600
    """Time a stopped run has for its step and for saving, in seconds; then Ray kills it."""
