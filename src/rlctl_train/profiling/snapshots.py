"""Snapshots of CUDA's allocator: kept whole for its viewer, and as JSON for the report, which loads no pickle."""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rlctl_train import device
from rlctl_train.profiling.allocations import GIB, HISTORY, MOST, SNAPSHOT, line_of, of_snapshot


def keep_snapshot(kind: str, path: Path) -> None:
    """Write the allocator's blocks and history as a pickle, and beside it what a report needs; nothing but on CUDA."""
    snapshot = device.allocator_snapshot(kind)
    if snapshot is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        pickle.dump(snapshot, file)
    content = {"blocks": blocks(snapshot), "allocations": [asdict(one) for one in of_snapshot(snapshot)]}
    path.with_name(path.name.removesuffix(SNAPSHOT) + HISTORY).write_text(json.dumps(content))


def blocks(snapshot: Mapping[str, Any]) -> dict[str, Any]:
    """Return the GiB that the allocator has in use and keeps unused, its largest unused block, and large askers."""
    every = [block for segment in snapshot["segments"] for block in segment["blocks"]]
    used = [block for block in every if block["state"] == "active_allocated"]
    unused = [block["size"] for block in every if block["state"] == "inactive"]
    askers: dict[str, float] = {}
    for block in used:
        asker = line_of(block.get("frames", ()))
        askers[asker] = askers.get(asker, 0.0) + block["size"] / GIB
    return {
        "used_gib": sum(block["size"] for block in used) / GIB,
        "unused_gib": sum(unused) / GIB,
        "largest_unused_gib": max(unused, default=0) / GIB,
        "by_asker": dict(sorted(askers.items(), key=lambda item: -item[1])[:MOST]),
    }
