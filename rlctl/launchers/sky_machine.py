"""What SkyPilot calls a machine: accelerators by its names, and what its places cannot do."""

from __future__ import annotations

import re
from typing import Any

from rlctl_hw import devices

from rlctl_train.config.errors import UserError
from rlctl_train.config.launch_cloud import CloudLaunch

ACCELERATORS = {
    "t4-16gb": "T4", "v100-16gb": "V100", "v100-32gb": "V100-32GB", "a10-24gb": "A10", "a10g-24gb": "A10G",
    "a40-48gb": "A40", "rtxa6000-48gb": "RTXA6000", "l4-24gb": "L4", "l40-48gb": "L40", "l40s-48gb": "L40S",
    "rtx3090-24gb": "RTX3090", "rtx4090-24gb": "RTX4090", "rtx5090-32gb": "RTX5090", "rtx6000ada-48gb": "RTX6000-Ada",
    "a100-40gb": "A100", "a100-80gb": "A100-80GB", "a100-pcie-80gb": "A100-80GB", "a800-80gb": "A800",
    "h100-80gb": "H100", "h100-nvl-94gb": "H100-NVL", "h200-141gb": "H200", "gh200-96gb": "GH200",
    "b200-180gb": "B200", "mi300x-192gb": "MI300X",
}  # fmt: skip
"""Key of the device catalogue -> name in SkyPilot's."""
ELSEWHERE_CALLED = {
    ("runpod", "a100-80gb"): "A100-80GB-SXM", ("runpod", "h100-80gb"): "H100-SXM", ("runpod", "h200-141gb"): "H200-SXM",
    ("runpod", "h100-pcie-80gb"): "H100", ("lambda", "rtxa6000-48gb"): "A6000",
}  # fmt: skip
"""Where one cloud has another name for it."""
LACKS = {
    "runpod": {"nodes": "joins no machines to a cluster", "bucket": "mounts no buckets"},
    "lambda": {"spot": "has no spot machines", "environment.image": "takes no image"},
    "kubernetes": {"spot": "has no spot machines"},
    "slurm": {"spot": "has no spot machines", "bucket": "mounts no buckets"},
}
"""Place -> setting -> why SkyPilot 0.14 refuses it there."""
ASKED = re.compile(r"[\w.-]+:[1-9]\d*")
MACHINE = re.compile(r"(?P<name>[\w.-]+?)(?::(?P<count>\d+))?")


def place(config: CloudLaunch) -> str:
    """Return the cloud that `launch.infra` names, in lower case; empty where any will do."""
    name = (config.infra or "").partition("/")[0].lower()
    return {"k8s": "kubernetes"}.get(name, name)


def accelerators(config: CloudLaunch) -> str | None:
    """Return NAME:COUNT for SkyPilot, or None for a machine without accelerators."""
    if config.accelerators is not None:
        if not ASKED.fullmatch(config.accelerators):
            what = f"launch.accelerators={config.accelerators} is not NAME:COUNT"
            raise UserError(what, "write it like H100-SXM:8; `sky show-gpus --all` lists the names")
        return config.accelerators
    name, count = _parse(config)
    if name == "cpu":
        return None
    key = devices.by_key(name).key
    known = ELSEWHERE_CALLED.get((place(config), key)) or ACCELERATORS.get(key)
    if known is None:
        raise UserError(
            f"launch.machine={config.machine}: SkyPilot has no name for {key}",
            "give its own with launch.accelerators=NAME:COUNT; `sky show-gpus --all` lists them",
        )
    return f"{known}:{count}"


def cpu_cores(config: CloudLaunch) -> int | None:
    """Return the cores of a machine without accelerators, else None."""
    if config.accelerators is not None:
        return None
    name, count = _parse(config)
    return count if name == "cpu" else None


def devices_per_machine(config: CloudLaunch) -> int:
    """Return how many accelerators one machine has."""
    named = accelerators(config)
    return 0 if named is None else int(named.rpartition(":")[2])


def check_place(config: CloudLaunch, image: str | None) -> None:
    """Refuse what SkyPilot cannot do there; `image` is that of the environment."""
    given = {"nodes": config.nodes, "bucket": config.bucket, "spot": config.spot, "environment.image": image}
    for key, why in LACKS.get(place(config), {}).items():
        value: Any = given[key]
        asked = value > 1 if key == "nodes" else bool(value)
        if key == "bucket" and asked and value.startswith("/"):
            continue
        if asked:
            raise UserError(f"launch.{key}={value}: {config.infra} {why}", _way_out(key))


def _way_out(key: str) -> str:
    if key == "nodes":
        return "take one larger machine, or another launch.infra"
    if key == "bucket":
        return "give the path of a folder that all its machines share, unset it, or take another launch.infra"
    return f"unset launch.{key}, or take another launch.infra"


def _parse(config: CloudLaunch) -> tuple[str, int]:
    match = MACHINE.fullmatch(config.machine or "")
    if match is None:
        raise UserError(
            f"launch.machine={config.machine} is not a machine that can be asked for", "name it like H100:8 or cpu:4"
        )
    return match["name"].lower(), int(match["count"] or 1)
