"""What goes from this machine to the cloud: the run's own files, and every local path its configuration names."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rlctl.doctor.materials import is_hub_id
from rlctl.doctor.packages import custom_rewards
from rlctl.launchers.base import Order
from rlctl.launchers.sky_environment import file_names
from rlctl_train.config import RunConfig
from rlctl_train.config.data import ParquetData
from rlctl_train.config.distill import DistillConfig
from rlctl_train.config.errors import UserError
from rlctl_train.config.layout import RunFiles
from rlctl_train.config.model import PretrainedModel

RUNS, WORK = "~/rlctl-runs", "~/rlctl-work"
"""Folders there: of the runs, and the one from which relative paths are meant."""


@dataclass(frozen=True)
class Upload:
    """One file or folder, here and there."""

    source: Path
    target: str
    key: str = ""
    """The setting that names it; empty for the run's own files."""

    def num_bytes(self) -> int:
        """Return its size; 0 for what is written only at the launch."""
        if self.source.is_dir():
            return sum(path.stat().st_size for path in self.source.rglob("*") if path.is_file())
        return self.source.stat().st_size if self.source.is_file() else 0


def uploads(order: Order) -> list[Upload]:
    """Return everything that goes there; refuse what is missing here or cannot lie under the same path there."""
    files = RunFiles(order.root)
    paths = [files.config, files.plan, files.origin, *(files.launch / name for name in file_names(order))]
    own = [Upload(path, f"{RUNS}/{order.name}/{path.relative_to(files.root)}") for path in paths]
    return own + [_upload(order.cwd, key, value) for key, value in dict.fromkeys(_local_paths(order))]


def _local_paths(order: Order) -> Iterator[tuple[str, str]]:
    """Yield (setting, path) of everything the configuration reads from a disk."""
    config = order.config
    if isinstance(config.data, ParquetData):
        yield "data.train", config.data.train
        if config.data.val is not None:
            yield "data.val", config.data.val
    for key, path in _models(config):
        if not is_hub_id(path):
            yield key, path
    for part in custom_rewards(config.reward):
        yield "reward.path", part.path.rpartition(":")[0]


def _models(config: RunConfig) -> Iterator[tuple[str, str]]:
    if isinstance(config.model, PretrainedModel):
        yield "model.path", config.model.path
        if config.model.tokenizer is not None:
            yield "model.tokenizer", config.model.tokenizer
    if isinstance(config.algo, DistillConfig):
        yield "algo.teacher_path", config.algo.teacher_path


def _upload(cwd: Path, key: str, value: str) -> Upload:
    source = cwd / Path(value).expanduser()
    if not source.exists():
        raise UserError(f"{key}={value}: there is no such file or folder here to upload", "correct the path")
    if ".." in Path(value).parts:
        raise UserError(
            f"{key}={value}: a path above the current folder has no place on other machines",
            "give an absolute path, or one below the current folder",
        )
    target = value if value.startswith(("/", "~")) else f"{WORK}/{Path(value)}"
    return Upload(source, target, key)
