"""Presets and configuration files: where they lie, what they say about themselves, and their text as tables.

A file holds settings, and beside them three tables that are none: `[preset]` (what it is), `[hardware.ID]` (settings
for one device of the catalogue, with the reason) and `[[verified]]` (what was measured).
"""

from __future__ import annotations

import json
import tomllib
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from rlctl_hw import devices

from rlctl.evidence import Verified, read_verified
from rlctl.spelling import unknown
from rlctl_train.config.errors import UserError

HEADER = "preset"
HEADER_KEYS = ("title", "hardware", "evidence", "extends")
HARDWARE, VERIFIED, REASON = "hardware", "verified", "reason"


@dataclass(frozen=True)
class HardwarePins:
    """Settings that a document gives for one device, and why; `device` is its key in the device catalogue."""

    device: str
    reason: str
    tree: dict[str, Any]


@dataclass(frozen=True)
class Document:
    """One preset or file: `source` is its origin label, `tree` its settings, `header` its `[preset]` table.

    `evidence` in the header says whose settings these are; what was measured is in `verified`.
    """

    name: str
    source: str
    path: Path
    tree: dict[str, Any]
    header: dict[str, str]
    pins: tuple[HardwarePins, ...] = ()
    verified: tuple[Verified, ...] = ()


@cache
def folder() -> Path:
    """Return the folder of the shipped presets: inside the package, or beside it in a checkout."""
    packaged = Path(str(files("rlctl") / "presets"))
    return packaged if packaged.is_dir() else Path(__file__).resolve().parent.parent / "presets"


def names() -> list[str]:
    """Return the names of all presets, in alphabetical order."""
    return sorted(path.stem for path in folder().glob("*.toml"))


def load_preset(name: str) -> Document:
    """Read a preset; an unknown name shows the nearest one."""
    path = folder() / f"{name}.toml"
    if name not in names():
        raise unknown("preset", name, names(), "`rlctl preset ls` lists them")
    return read(path, source=f"preset {name}")


def is_file(name: str) -> bool:
    """Return whether a NAME_OR_FILE argument means a file."""
    return name.endswith((".toml", ".json")) or "/" in name


def load(name_or_file: str) -> Document:
    """Read a preset by name, or a file by path."""
    return load_file(Path(name_or_file)) if is_file(name_or_file) else load_preset(name_or_file)


def load_file(path: Path) -> Document:
    """Read a user's configuration file."""
    return read(path.expanduser(), source=f"file {path}")


def chain(document: Document) -> list[Document]:
    """Return the documents a document extends, farthest first, and itself last."""
    found = [document]
    while (parent := found[0].header.get("extends")) is not None:
        if any(seen.source == f"preset {parent}" for seen in found):
            raise UserError(f"{document.source} extends itself through {parent!r}", "break the circle of `extends`")
        found.insert(0, load_preset(parent))
    return found


def read(path: Path, *, source: str) -> Document:
    """Parse one TOML or JSON file into settings and header."""
    tree = _parse(path)
    header = tree.pop(HEADER, {})
    if not isinstance(header, dict) or any(not isinstance(value, str) for value in header.values()):
        raise UserError(f"{path}: [{HEADER}] is not a table of texts", f"it may hold {', '.join(HEADER_KEYS)}")
    unknown = [key for key in header if key not in HEADER_KEYS]
    if unknown:
        raise UserError(f"{path}: [{HEADER}] has the unknown key {unknown[0]!r}", f"known are {', '.join(HEADER_KEYS)}")
    pins = _read_pins(tree.pop(HARDWARE, {}), path)
    verified = read_verified(tree.pop(VERIFIED, []), str(path))
    return Document(path.stem, source, path, tree, header, pins, verified)


def _read_pins(tables: Any, path: Path) -> tuple[HardwarePins, ...]:
    if not isinstance(tables, dict) or any(not isinstance(table, dict) for table in tables.values()):
        raise UserError(f"{path}: [{HARDWARE}] is not a table of tables", "write [hardware.h100-80gb]")
    return tuple(_read_device_pins(name, dict(table), path) for name, table in tables.items())


def _read_device_pins(name: str, table: dict[str, Any], path: Path) -> HardwarePins:
    try:
        key = devices.by_key(name).key
    except ValueError as error:
        raise UserError(f"{path}: [{HARDWARE}.{name}]: {error}", "name a device of the catalogue") from error
    if key != name:
        raise UserError(f"{path}: [{HARDWARE}.{name}] is a nickname", f"write [{HARDWARE}.{key}]")
    reason = table.pop(REASON, None)
    if not isinstance(reason, str) or not reason:
        raise UserError(f"{path}: [{HARDWARE}.{name}] gives no reason", 'add reason = "..."')
    return HardwarePins(key, reason, table)


def _parse(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"there is no file {path}", "check the path; presets are named without .toml") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder", "give a TOML or JSON file") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}", "check its permissions") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not a text file", "give a TOML or JSON file in UTF-8") from error
    kind = "JSON" if path.suffix == ".json" else "TOML"
    try:
        tree = json.loads(text) if kind == "JSON" else tomllib.loads(text)
    except ValueError as error:
        raise UserError(f"{path} is not valid {kind}: {error}", "correct the file at that place") from error
    except RecursionError as error:
        raise UserError(f"{path} is nested too deeply", "no setting needs that") from error
    if not isinstance(tree, dict):
        raise UserError(f"{path} holds no table at the top", 'write sections such as {"trainer": {...}}')
    return tree
