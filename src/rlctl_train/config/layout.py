"""The run folder: where each file of a run lies. The front desk and the workshop speak through it alone."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class RunFiles:
    """Paths inside one run folder."""

    root: Path

    config = property(lambda self: self.root / "config.json")
    """What the user wants: RunConfig."""
    plan = property(lambda self: self.root / "plan.json")
    """What follows: rlctl_hw Plan."""
    origin = property(lambda self: self.root / "origin.json")
    """Where each value came from."""
    history = property(lambda self: self.root / "history")
    """What config, plan and origin were before a resume on another machine: 1/, 2/, ..."""
    status = property(lambda self: self.root / "status.json")
    """State, phase and step, rewritten as the run goes."""
    driver = property(lambda self: self.root / "driver.json")
    """Which launcher started the driver process, where, and as which process."""
    launch = property(lambda self: self.root / "launch")
    """What travels to other machines with the run."""
    environment = property(lambda self: self.root / "launch" / "environment.json")
    """The machines and versions that the run was planned with."""
    doctor = property(lambda self: self.root / "doctor")
    """What the doctor found on each node before training, one file a node."""
    task = property(lambda self: self.root / "task.yaml")
    """What SkyPilot was given, where it carries the run."""
    lock = property(lambda self: self.root / ".lock")
    """Held while a driver is started: one driver per run."""
    driver_log = property(lambda self: self.root / "logs" / "driver.log")
    """What the driver process printed."""
    metrics = property(lambda self: self.root / "metrics.jsonl")
    """One line a step."""
    summary = property(lambda self: self.root / "summary.json")
    """Totals, written at the end."""
    logs = property(lambda self: self.root / "logs")
    stacks_wanted = property(lambda self: self.root / "logs" / "stacks.wanted")
    """Made by whoever wants to know where every thread is; the driver answers with logs/stacks-TIME.txt."""
    checkpoints = property(lambda self: self.root / "checkpoints")
    profile = property(lambda self: self.root / "profile")
    """What a profile recorded, one folder a step, and its report."""
    left = property(lambda self: self.root / "profile" / "left.json")
    """Which of that was too large to come home from other machines, and where it lies."""
    samples = property(lambda self: self.root / "samples")
    """Validation samples for reading, one file a validation."""
    model = property(lambda self: self.root / "model")
    """The random model, when the run makes one."""
    data = property(lambda self: self.root / "data")
    """train.parquet and val.parquet, when the run makes them."""
    hf = property(lambda self: self.root / "hf")
    """The exported Hugging Face folder."""
    tensorboard = property(lambda self: self.root / "tensorboard")
    report = property(lambda self: self.root / "report.html")
    curves = property(lambda self: self.root / "curves.png")


def write_json(path: Path, data: Any, *, durable: bool = True) -> None:
    """Write JSON so that a reader never sees half a file; `durable` waits until it would also survive a power cut."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("w") as file:
        json.dump(data, file, indent=2)
        file.write("\n")
        file.flush()
        if durable:
            os.fsync(file.fileno())
    temporary.replace(path)
