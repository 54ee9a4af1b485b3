"""What `rlctl calibrate` measured, kept per machine in the settings folder, and the survey that brings it along."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rlctl_hw.probe import survey
from rlctl_hw.types import Corrections, Hardware

from rlctl import settings
from rlctl_train.config.errors import UserError
from rlctl_train.config.layout import write_json

SCHEMA_VERSION = 1


def here() -> Hardware:
    """Survey this machine, with what was measured on it."""
    found = survey()
    file = file_of(found)
    return replace(found, corrections=_read(file)) if file.is_file() else found


def file_of(hardware: Hardware) -> Path:
    """Return where the measurements of this machine lie; the file need not exist."""
    return settings.settings_file().parent / "machines" / f"{_fingerprint(hardware)}.json"


def keep(hardware: Hardware, corrections: Corrections, evidence: dict[str, Any]) -> Path:
    """Write the measurements of this machine down, with how they came about."""
    file = file_of(hardware)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, {"schema_version": SCHEMA_VERSION, "corrections": asdict(corrections), "evidence": evidence})
    except OSError as error:
        raise UserError(f"the measurements cannot be kept: {error}", "set RLCTL_HOME to a folder of yours") from error
    return file


def _read(file: Path) -> Corrections:
    try:
        return Corrections(**json.loads(file.read_text(encoding="utf-8"))["corrections"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} cannot be read: {error}", "remove it, and measure again: `rlctl calibrate`") from error


def _fingerprint(hardware: Hardware) -> str:
    """Return a name that changes with what decides speed and memory: the devices, and the cores of the host."""
    devices = Counter((device.name, round(device.memory_gib)) for device in hardware.devices)
    text = json.dumps([hardware.kind, sorted(devices.items()), hardware.cpu_cores])
    return f"{hardware.kind}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"
