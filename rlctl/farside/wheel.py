"""This very rlctl as a wheel: built from the checkout it runs from, or packed again from where it is installed."""

from __future__ import annotations

import base64
import hashlib
import importlib.metadata
import importlib.util
import subprocess
import sys
import zipfile
from pathlib import Path

import rlctl
from rlctl_train.config.errors import LAUNCH, UserError

NAME = f"rlctl-{rlctl.__version__}-py3-none-any.whl"
BUILD_LIMIT_S = 180.0
LEFT_BY_THE_INSTALLER = ("RECORD", "INSTALLER", "REQUESTED", "direct_url.json")
OLDEST = (1980, 1, 1, 0, 0, 0)
"""A zip's earliest date: equal contents give equal bytes."""


def write(folder: Path) -> Path:
    """Write the wheel into a folder; equal contents give equal bytes, so that an environment is known by them."""
    root = checkout()
    return _pack(folder) if root is None else _build(root, folder)


def checkout() -> Path | None:
    """Return the checkout that this rlctl runs from, or None where it is installed."""
    root = Path(rlctl.__file__).resolve().parent.parent
    return root if (root / "pyproject.toml").is_file() else None


def _build(root: Path, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(root)]
    if importlib.util.find_spec("hatchling") is not None:
        command.insert(-1, "--no-build-isolation")
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=BUILD_LIMIT_S, check=False)
    except subprocess.TimeoutExpired:
        raise _cannot_build(root, f"not done within {BUILD_LIMIT_S:g} s") from None
    made = folder / NAME
    if done.returncode or not made.is_file():
        last = (done.stderr.strip() or done.stdout.strip() or "no reason given").splitlines()[-1]
        raise _cannot_build(root, last)
    return made


def _pack(folder: Path) -> Path:
    """Zip the installed files of the distribution, as its record lists them."""
    distribution = importlib.metadata.distribution("rlctl")
    inside = [file for file in distribution.files or () if ".." not in file.parts and "__pycache__" not in file.parts]
    kept = {
        file.as_posix(): Path(str(distribution.locate_file(file))).read_bytes()
        for file in inside
        if not (file.parts[0].endswith(".dist-info") and file.name in LEFT_BY_THE_INSTALLER)
    }
    info = next((name.split("/")[0] for name in kept if ".dist-info/" in name), None)
    if info is None or "rlctl/__init__.py" not in kept:
        raise UserError(
            "the installed rlctl has no record of its files, so it cannot be sent along",
            "install it with pip, or set launch.environment.type=same or image",
            exit_code=LAUNCH,
        )
    record = [f"{name},{_digest(data)},{len(data)}" for name, data in sorted(kept.items())]
    kept[f"{info}/RECORD"] = "\n".join([*record, f"{info}/RECORD,,\n"]).encode()
    made = folder / NAME
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in sorted(kept.items()):
            archive.writestr(zipfile.ZipInfo(name, OLDEST), data, zipfile.ZIP_DEFLATED)
    return made


def _digest(data: bytes) -> str:
    return "sha256=" + base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()


def _cannot_build(root: Path, why: str) -> UserError:
    return UserError(
        f"no wheel can be built of {root}: {why}",
        "install pip and hatchling here, or set launch.environment.type=same or image",
        exit_code=LAUNCH,
    )
