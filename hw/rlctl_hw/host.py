"""The machine as the survey sees it: files, environment, commands. Tests hand in one of their own."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rlctl_hw.types import Device, Fact

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
            return (self.root / path.lstrip("/")).read_text(encoding="utf-8", errors="replace").strip()
        except OSError:
            return None


@dataclass(frozen=True)
class Found:
    """What one vendor's probe found: the devices a process may use, and every fact on the way there."""

    devices: tuple[Device, ...]
    facts: dict[str, Fact]


def first_line(text: str) -> str:
    """Return the first line of a message, without surrounding blanks."""
    return text.strip().splitlines()[0].strip() if text.strip() else ""
