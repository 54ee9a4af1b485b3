"""Filling the templates of `sky/`: a run becomes one SkyPilot task."""

from __future__ import annotations

import re
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from rlctl.launchers import sky_environment
from rlctl.launchers.base import Order
from rlctl.launchers.sky_machine import accelerators, cpu_cores, devices_per_machine, place
from rlctl.launchers.sky_upload import uploads
from rlctl_train.config.errors import UserError
from rlctl_train.config.launch_cloud import CloudLaunch

PLACEHOLDER = re.compile(r"<([\w.]+)>")
BUCKET = "~/rlctl-bucket"
"""Where a bucket is mounted."""
TOKEN_VARIABLE = "RAY_AUTH_TOKEN"
SECRETS = ("HF_TOKEN", "WANDB_API_KEY", "SWANLAB_API_KEY", "MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_PASSWORD")
"""Passed on without being asked for, where this environment has them."""


def settings(order: Order) -> CloudLaunch:
    """Return the section `launch` of a run that goes to a cloud."""
    assert isinstance(order.config.launch, CloudLaunch)
    return order.config.launch


def cluster(name: str) -> str:
    """Return the name of a run's cluster or managed job, in the letters SkyPilot allows."""
    return "rlctl-" + re.sub(r"[^A-Za-z0-9-]+", "-", name).strip("-").lower()


def secret_names(order: Order) -> list[str]:
    """Return the variables whose values SkyPilot takes from the environment; refuse one that is not set."""
    asked = settings(order).secrets
    missing = [name for name in asked if name not in order.environment]
    if missing:
        raise UserError(f"launch.secrets names {missing[0]}, which is not set here", f"export {missing[0]} first")
    return list(dict.fromkeys([*asked, *(name for name in SECRETS if name in order.environment), TOKEN_VARIABLE]))


def task(order: Order) -> str:
    """Return the task as YAML."""
    config = settings(order)
    kind = "spot" if config.spot else "nodes" if config.nodes > 1 else "one"
    template = yaml.safe_load((folder() / f"{kind}.yaml").read_text(encoding="utf-8"))
    return yaml.dump(_fill(template, _values(order)), Dumper=_Readable, sort_keys=False, width=120)


@cache
def folder() -> Path:
    """Return the folder of the templates: inside the package, or beside it in a checkout."""
    packaged = Path(str(files("rlctl") / "sky"))
    return packaged if packaged.is_dir() else Path(__file__).resolve().parent.parent.parent / "sky"


def _values(order: Order) -> dict[str, Any]:
    config = settings(order)
    cores = cpu_cores(config)
    autostop = None if place(config) == "slurm" else {"idle_minutes": config.idle_minutes, "down": True}
    return {
        "name": cluster(order.name), "nodes": config.nodes, "infra": config.infra,
        "accelerators": accelerators(config), "cpus": None if cores is None else f"{cores}+",
        "disk_gib": config.disk_gib, "image": sky_environment.image(order), "autostop": autostop,
        "envs": _envs(order), "secrets": dict.fromkeys(secret_names(order)), "file_mounts": _file_mounts(order),
        "setup": _lines(sky_environment.setup_lines(order, config)),
        "environment": _lines(sky_environment.run_lines(order)),
    }  # fmt: skip


def _envs(order: Order) -> dict[str, str]:
    config = settings(order)
    shared = "" if config.bucket is None else config.bucket if config.bucket.startswith("/") else BUCKET
    cores = cpu_cores(config)
    # A private Ray sizes its store by itself; where all share one machine's memory, the plan says how much.
    store = "" if cores is None else str(int(order.plan.object_store_gib * 2**30))
    own = {
        "RLCTL_RUN": order.name, "RLCTL_BUCKET": shared,
        "RLCTL_GPUS": str(devices_per_machine(config)), "RLCTL_CPUS": "" if cores is None else str(cores),
        "RLCTL_STORE": store,
    } | ({"RLCTL_MAX_RESTARTS": str(config.max_restarts)} if config.spot else {})  # fmt: skip
    return own | dict(config.envs)


def _file_mounts(order: Order) -> dict[str, Any]:
    config = settings(order)
    mounts: dict[str, Any] = {upload.target: str(upload.source) for upload in uploads(order)}
    if config.bucket is not None and not config.bucket.startswith("/"):
        origin = {"source": config.bucket} if "://" in config.bucket else {"name": config.bucket}
        # Several writers see each other's files only in a bucket mounted without a cache.
        mounts[BUCKET] = origin | {"mode": "MOUNT" if config.nodes > 1 else "MOUNT_CACHED"}
    return mounts


def _fill(node: Any, values: dict[str, Any]) -> Any:
    """Return a template with its placeholders replaced; what nobody set, and mappings left empty, are dropped."""
    if isinstance(node, dict):
        filled = {key: _fill(value, values) for key, value in node.items()}
        return {key: value for key, value in filled.items() if value is not None and value != {}}
    if not isinstance(node, str) or not PLACEHOLDER.search(node):
        return node
    names = PLACEHOLDER.findall(node)
    if len(names) == 1:
        return values[names[0]]
    return "\n".join(
        values[name] if name in values else (folder() / name).read_text(encoding="utf-8") for name in names
    )


def _lines(lines: tuple[str, ...]) -> str | None:
    return "".join(f"{line}\n" for line in lines) or None


class _Readable(yaml.SafeDumper):
    """Writes shell as blocks of lines, and `null` for a secret without a value."""


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style="|" if "\n" in value else None)


_Readable.add_representer(str, _text)
