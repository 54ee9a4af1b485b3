"""The machine as the survey sees it: files, environment, commands, libraries. Tests hand in one of their own.

Whatever a probe learns comes through a `Host`, so that a machine can be recorded here and surveyed elsewhere.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlctl_hw.types import Device, Fact, Link

COMMAND_LIMIT_S = 10.0


@dataclass(frozen=True)
class CommandResult:
    """What a command printed; `code` is None when it did not start or did not end in time."""

    stdout: str
    code: int | None
    error: str | None = None


def run_command(argv: Sequence[str]) -> CommandResult:
    """Run a vendor's tool under a time limit."""
    try:
        done = subprocess.run(
            list(argv), capture_output=True, timeout=COMMAND_LIMIT_S, stdin=subprocess.DEVNULL, check=False
        )
    except FileNotFoundError:
        return CommandResult("", None, f"{argv[0]} is not installed")
    except subprocess.TimeoutExpired:
        return CommandResult("", None, f"{argv[0]} gave no answer within {COMMAND_LIMIT_S:g} s")
    except OSError as error:
        return CommandResult("", None, f"{argv[0]} does not start: {error}")
    text = done.stdout.decode("utf-8", errors="replace")
    complaint = done.stderr.decode("utf-8", errors="replace").strip() or text.strip()
    error = None if done.returncode == 0 else f"{argv[0]} ended with code {done.returncode}: {first_line(complaint)}"
    return CommandResult(text, done.returncode, error)


@dataclass(frozen=True)
class Host:
    """Where to look: the root of the file system, the environment, and a way to run commands."""

    root: Path = Path("/")
    env: Mapping[str, str] = field(default_factory=lambda: os.environ)
    run: Callable[[Sequence[str]], CommandResult] = run_command

    def read(self, path: str) -> str | None:
        """Return a file's text without surrounding blanks, or None when it cannot be read."""
        try:
            return self.at(path).read_text(encoding="utf-8", errors="replace").strip()
        except OSError:
            return None

    def exists(self, path: str) -> bool:
        """Say whether there is such a file, folder or device."""
        try:
            return self.at(path).exists()
        except OSError:
            return False

    def listdir(self, path: str) -> list[str]:
        """Return the names in a folder, sorted; none where it cannot be read."""
        try:
            return sorted(entry.name for entry in self.at(path).iterdir())
        except OSError:
            return []

    def glob(self, pattern: str) -> list[str]:
        """Return the paths of this machine that match (`/dev/davinci[0-9]*`), sorted, ready for `read`."""
        try:
            return sorted(f"/{path.relative_to(self.root).as_posix()}" for path in self.root.glob(pattern.lstrip("/")))
        except OSError:
            return []

    def resolve(self, path: str) -> str | None:
        """Return where the links of a path lead (sysfs names a device's place on the bus so), or None."""
        try:
            return f"/{self.at(path).resolve(strict=True).relative_to(self.root.resolve()).as_posix()}"
        except (OSError, ValueError):
            return None

    def answer(self, name: str, question: Callable[[], Any]) -> Any:
        """Ask a library of this machine; the answer is plain JSON, kept in a record under `name`."""
        return question()

    def at(self, path: str) -> Path:
        """Return where a path of the surveyed machine lies on this one."""
        return self.root / path.lstrip("/")


@dataclass(frozen=True)
class Found:
    """What one vendor's probe found: the devices a process may use, and every fact on the way there."""

    devices: tuple[Device, ...]
    facts: dict[str, Fact]
    links: tuple[Link, ...] = ()
    """Between places in `devices`."""
    islands: tuple[tuple[int, ...], ...] = ()
    """Places in `devices` that fast links join; empty when unknown."""


def first_line(text: str) -> str:
    """Return the first line of a message, without surrounding blanks."""
    return text.strip().splitlines()[0].strip() if text.strip() else ""
