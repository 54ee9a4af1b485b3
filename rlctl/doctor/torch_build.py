"""What torch was built for, read from its files: importing torch costs seconds and starts the driver."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from pathlib import Path

from rlctl_hw.types import DeviceKind

from rlctl.doctor.tools import Tools


@dataclass(frozen=True)
class TorchBuild:
    """Version of torch, and of the CUDA or HIP it was built with."""

    version: str
    cuda: str | None
    hip: str | None

    @property
    def kind(self) -> DeviceKind:
        """Return the kind of device this build drives by itself; Ascend's is a CPU build with torch-npu beside it."""
        return "cuda" if self.cuda else "rocm" if self.hip else "cpu"


def read(tools: Tools) -> TorchBuild | None:
    """Return the build of the installed torch, or None where there is none."""
    folder = tools.folder("torch")
    return None if folder is None else _read(folder / "version.py")


def _read(file: Path) -> TorchBuild | None:
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError):
        return None
    values: dict[str, str] = {}
    for node in tree.body:
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        value = node.value if isinstance(node, ast.Assign | ast.AnnAssign) else None
        if isinstance(value, ast.Constant) and isinstance(value.value, str):
            values |= {target.id: value.value for target in targets if isinstance(target, ast.Name)}
    version = values.get("__version__")
    return None if version is None else TorchBuild(version, values.get("cuda"), values.get("hip"))
