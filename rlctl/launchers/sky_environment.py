"""How an environment with this version of rlctl comes to the machines: lines for the task, and the image."""

from __future__ import annotations

import shlex

from rlctl_train.config.launch_cloud import CloudLaunch


def setup_lines(config: CloudLaunch) -> tuple[str, ...]:
    """Return lines of bash for a fresh machine; none where its image has everything."""
    return ("set -e", *config.setup) if config.setup else ()


def run_lines(config: CloudLaunch) -> tuple[str, ...]:
    """Return lines of bash, on each node before the run, that set `$python` to the interpreter."""
    return (f"python={shlex.quote(config.python)}",)


def image(config: CloudLaunch) -> str | None:
    """Return the machines' image, None for SkyPilot's own."""
    return config.image
