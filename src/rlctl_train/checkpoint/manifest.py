"""The manifest of a checkpoint: size and checksum of every file, place and checksum of every tensor, metrics.

`manifest.json` is {"schema_version", "step", "checksum": the algorithm, "files": {path: {"bytes", "sha256"}},
"tensors": {"<role>/<name>": [{"file", "offset", "bytes", "checksum"}]}, "metrics": {name: value}}. Paths are relative
to the folder. `metrics` are those of the last validation before the save.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

MANIFEST = "manifest.json"
HASHED_BYTES = 2**20
"""Files up to this size are hashed whenever a checkpoint is looked for; the larger ones only when it is verified."""


@dataclass(frozen=True)
class Best:
    """Which checkpoints are kept for what they reached, beside the newest."""

    num: int
    metric: str
    mode: Literal["max", "min"]

    def steps(self, manifests: Mapping[int, Mapping[str, Any]]) -> set[int]:
        """Return the best steps; of equal ones the earlier, which is nearer to where the metric was measured."""
        values = {step: manifest.get("metrics", {}).get(self.metric) for step, manifest in manifests.items()}
        sign = -1.0 if self.mode == "max" else 1.0
        ranked = sorted((sign * value, step) for step, value in values.items() if value is not None)
        return {step for _, step in ranked[: self.num]}


@dataclass(frozen=True)
class Keep:
    """Which checkpoints are kept: the last ones and the best ones."""

    last: int
    best: Best | None = None

    def steps(self, manifests: Mapping[int, Mapping[str, Any]]) -> set[int]:
        """Return those to keep of all complete ones, by step; always the newest."""
        assert self.last >= 1
        newest = sorted(manifests, reverse=True)[: self.last]
        return {*newest, *(self.best.steps(manifests) if self.best else ())}


def make_manifest(folder: Path, step: int, told: Mapping[str, Mapping[str, Any]], more: Mapping[str, Any]) -> Any:
    """Return the manifest of a written folder; what ranks have `told` of their files is not read again."""
    files = {}
    for path in files_of(folder):
        name = str(path.relative_to(folder))
        files[name] = told[name] if name in told else {"bytes": path.stat().st_size, "sha256": sha256(path)}
    absent = sorted(set(told) - set(files))
    if absent:
        raise FileNotFoundError(f"{folder / absent[0]} was written by another process and is not to be seen here")
    return {"schema_version": 1, "step": step, "checksum": "sha256", "files": files, **more}


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """Return a folder's manifest, or None where there is none to be read."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        return manifest if isinstance(manifest["files"], dict) else None
    except (OSError, ValueError, KeyError, TypeError):  # no manifest, or not one of ours
        return None


def is_complete(folder: Path) -> bool:
    """Say whether every file of the manifest is there in the listed size and, if it is small, with the listed hash."""
    manifest = read_manifest(folder)
    return manifest is not None and not any(True for _ in damages(folder, manifest, thorough=False))


def damages(folder: Path, manifest: Mapping[str, Any], *, thorough: bool = True) -> Iterator[str]:
    """Say what is not as listed, file by file; unless `thorough`, large files are held to their size alone."""
    for name, entry in manifest["files"].items():
        path = folder / name
        try:
            size, listed = path.stat().st_size, entry["bytes"]
            if size != listed:
                yield f"{path} has {size} bytes, not {listed}"
            elif (thorough or listed <= HASHED_BYTES) and sha256(path) != entry["sha256"]:
                yield f"{path} does not have the checksum of its manifest"
        except (OSError, KeyError, TypeError) as error:
            yield f"{path} cannot be read: {error}"


def files_of(folder: Path) -> list[Path]:
    """Return every file in a folder but its manifest."""
    return sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST)


def total_bytes(manifests: Iterable[Mapping[str, Any]]) -> int:
    """Return what the files of the largest of some checkpoints take together; 0 without any."""
    return max((sum(entry["bytes"] for entry in manifest["files"].values()) for manifest in manifests), default=0)


def step_name(step: int) -> str:
    """Return the name of a step's folder."""
    return f"step_{step:06d}"


def step_of(path: Path) -> int:
    """Return the step of a folder, hidden or not; -1 for one of another kind."""
    digits = path.name.strip(".").split(".")[0].removeprefix("step_")
    return int(digits) if digits.isdigit() else -1


def sha256(path: Path) -> str:
    """Hash a file, block by block."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
