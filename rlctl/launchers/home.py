"""Files of a run that its job sent home within its output, written into the run folder here."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path


def bring(root: Path, files: Mapping[str, bytes]) -> None:
    """Write files by their names below a run folder; a name that leads out of it is left alone."""
    for name, data in files.items():
        path = root / name
        if root.resolve() in path.resolve().parents:
            _bring_up_to(path, data)


def _bring_up_to(path: Path, data: bytes) -> None:
    """Make a file hold `data`; what only grew is added to, so that a reader may stand in its middle."""
    path.parent.mkdir(parents=True, exist_ok=True)
    have = path.read_bytes() if path.is_file() else None
    if have == data:
        return
    if have and data.startswith(have):
        with path.open("ab") as file:
            file.write(data[len(have) :])
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(data)
    temporary.replace(path)
