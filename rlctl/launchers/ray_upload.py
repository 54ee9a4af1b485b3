"""What travels to a Ray cluster: the run's own files, and small files that its configuration names by relative path."""

from __future__ import annotations

import hashlib
import io
import zipfile
from collections.abc import Iterator
from pathlib import Path

from rlctl.launchers.base import Order
from rlctl_train.config import RunConfig
from rlctl_train.config.data import ParquetData
from rlctl_train.config.errors import UserError
from rlctl_train.config.model import PretrainedModel
from rlctl_train.config.reward import CustomReward, SumReward

RUN_FILES = ("config.json", "plan.json", "origin.json", "launch/environment.json")
LARGEST_MIB = 100
MEMBER_TIME = (1980, 1, 1, 0, 0, 0)
"""The same content makes the same archive, and the same name."""


def contents(order: Order) -> dict[str, Path]:
    """Return the user's files that travel, by their path from the folder of the launch; raises UserError."""
    found: dict[str, Path] = {}
    for key, text in _named(order.config):
        path = Path(text)
        if path.is_absolute() or ".." in path.parts:
            continue
        here = order.cwd / path
        inside = sorted(file for file in here.rglob("*") if file.is_file()) if here.is_dir() else [here]
        found |= {str(file.relative_to(order.cwd)): file for file in inside if file.is_file()}
        if not here.exists():
            raise UserError(f"{key}={text}: there is no such file in {order.cwd}", "go to its folder, or correct it")
    model = order.config.model
    if isinstance(model, PretrainedModel) and not Path(model.path).is_absolute() and (order.cwd / model.path).is_dir():
        raise UserError(
            f"model.path={model.path} is a folder of this machine, and does not travel",
            "name a hub id, or an absolute path on the cluster",
        )
    size_mib = sum(file.stat().st_size for file in found.values()) / 2**20
    if size_mib > LARGEST_MIB:
        raise UserError(
            f"the files to upload have {size_mib:.0f} MiB, and a Ray job takes {LARGEST_MIB}: {', '.join(found)}",
            "put large data on storage of the cluster and name it by an absolute path",
        )
    return found


def archive(order: Order) -> bytes:
    """Return the zip archive that the job starts in; the run folder exists."""
    files = {name: file.read_bytes() for name, file in contents(order).items()}
    files |= {f"run/{name}": (order.root / name).read_bytes() for name in RUN_FILES}
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as into:
        for name, data in sorted(files.items()):
            into.writestr(zipfile.ZipInfo(name, MEMBER_TIME), data)
    return made.getvalue()


def package_name(data: bytes) -> str:
    """Return the name of an archive, as Ray forms them."""
    return f"_ray_pkg_{hashlib.sha256(data).hexdigest()[:32]}.zip"


def _named(config: RunConfig) -> Iterator[tuple[str, str]]:
    """Yield what the configuration names that may lie here: key and path."""
    if isinstance(config.data, ParquetData):
        yield "data.train", config.data.train
        if config.data.val is not None:
            yield "data.val", config.data.val
    rewards = config.reward.parts if isinstance(config.reward, SumReward) else (config.reward,)
    for reward in rewards:
        if isinstance(reward, CustomReward):
            yield "reward.path", reward.path.rpartition(":")[0]
