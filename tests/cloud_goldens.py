"""What `rlctl launch --cloud --dry-run` hands over, place by place; `nox -s golden` writes the golden files anew."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from rlctl.launchers.base import Order
from rlctl.launchers.cloud import CloudLauncher
from rlctl_train.config import RunConfig
from tests.runs import PLAN

FOLDER = Path(__file__).parent / "golden"
THREE = {"machine": "h100:8", "nodes": 3}
HAS_ALL = {"type": "image", "image": "me/rlctl:1", "holds_rlctl": True}
SHARED = {"type": "same", "python": "/shared/env/bin/python"}
PLACES: dict[str, dict[str, Any]] = {
    "aws": {**THREE, "infra": "aws", "bucket": "s3://my-bucket/runs"},
    "gcp": {**THREE, "infra": "gcp/us-central1", "bucket": "gs://my-bucket/runs", "disk_gib": 1000},
    "azure": {**THREE, "infra": "azure", "bucket": "my-new-bucket"},
    "lambda": {**THREE, "infra": "lambda", "bucket": "s3://my-bucket/runs"},
    "runpod": {**THREE, "nodes": 1, "infra": "runpod", "environment": HAS_ALL},
    "kubernetes": {**THREE, "infra": "k8s", "bucket": "/mnt/shared/runs", "envs": {"NCCL_SOCKET_IFNAME": "eth0"}},
    "slurm": {**THREE, "infra": "slurm/mycluster/batch", "setup": ("module load cuda",), "environment": SHARED},
    "spot": {**THREE, "infra": "aws", "bucket": "s3://my-bucket/runs", "spot": True, "max_restarts": 5},
}
"""Three machines of eight in each place; RunPod joins no machines, and `spot` is a managed job."""


def order(folder: Path, *, variables: Mapping[str, str] | None = None, **launch: Any) -> Order:
    """Return the order of a run on a published model, with its data in `folder` and these variables around it."""
    (folder / "train.parquet").write_bytes(b"rows")
    config = {
        "model": {"type": "pretrained", "path": "Qwen/Qwen2.5-7B-Instruct"},
        "data": {"type": "parquet", "train": "train.parquet"},
        "reward": {"type": "math"},
        "launch": {"type": "cloud", **launch},
    }
    variables = {"HF_TOKEN": "hf_secret"} if variables is None else variables
    return Order(
        folder / "runs" / "golden", RunConfig.model_validate(config), replace(PLAN, device="cuda"), folder, variables
    )


def text(place: str, folder: Path) -> str:
    """Return the dry run of a place; `folder` is written as HERE."""
    parts = CloudLauncher().preview(order(folder, **PLACES[place]))
    return "\n".join(f"# {title}\n{part}\n" for title, part in parts.items()).replace(str(folder), "HERE")


def write() -> None:
    """Write all golden files, as without SkyPilot at hand."""
    os.environ["RLCTL_SKY"] = "nowhere"
    FOLDER.mkdir(exist_ok=True)
    for place in PLACES:
        with tempfile.TemporaryDirectory() as folder:
            (FOLDER / f"cloud_{place}.txt").write_text(text(place, Path(folder)))


if __name__ == "__main__":
    write()
