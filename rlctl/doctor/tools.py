"""How the doctor reaches outside this process. Each is one function, so that tests hand in their own."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import resource
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
from rlctl_hw.host import CommandResult


def run_python(code: str, arguments: Sequence[str], limit_s: float) -> CommandResult:
    """Run code in a fresh interpreter like the driver's; its standard error comes back as `stdout` of the result."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments],
            capture_output=True, timeout=limit_s, stdin=subprocess.DEVNULL, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return CommandResult("", None, f"gave no answer within {limit_s:g} s")
    except OSError as error:
        return CommandResult("", None, f"{sys.executable} does not start: {error}")
    out, complaint = (stream.decode("utf-8", errors="replace").strip() for stream in (done.stdout, done.stderr))
    if done.returncode == 0:
        return CommandResult(out, 0)
    last = (complaint or out).splitlines()[-1:] or [f"it ended with code {done.returncode}"]
    return CommandResult(out, done.returncode, last[0].strip())


def version_of(distribution: str) -> str | None:
    """Return the installed version of a distribution, or None."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def requirements_of(distribution: str) -> tuple[str, ...]:
    """Return what a distribution asks for, extras included."""
    try:
        return tuple(importlib.metadata.requires(distribution) or ())
    except importlib.metadata.PackageNotFoundError:
        return ()


def folder_of(package: str) -> Path | None:
    """Return the folder of an installed package without importing it, or None."""
    spec = importlib.util.find_spec(package)
    if spec is None:
        return None
    places = spec.submodule_search_locations
    return Path(next(iter(places))) if places else Path(spec.origin or "").parent


def free_bytes(path: Path) -> int:
    """Return the free space of the file system that holds a path."""
    return shutil.disk_usage(path).free


def may_write(folder: Path) -> bool:
    """Say whether this user may make files in a folder."""
    return os.access(folder, os.W_OK | os.X_OK)


def open_file_limits() -> tuple[int, int]:
    """Return the soft and the hard limit of open files; -1 is no limit."""
    return resource.getrlimit(resource.RLIMIT_NOFILE)


def interfaces() -> dict[str, tuple[str, ...]]:
    """Return the network interfaces with their addresses."""
    return {name: tuple(a.address for a in entries) for name, entries in psutil.net_if_addrs().items()}


def addresses_of(host: str) -> tuple[str, ...]:
    """Return the addresses that a name resolves to, none when it does not."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return ()
    return tuple(dict.fromkeys(str(entry[4][0]) for entry in found))


def connect(host: str, port: int, limit_s: float) -> str | None:
    """Open and close a connection; return the reason when that fails."""
    try:
        socket.create_connection((host, port), timeout=limit_s).close()
    except (OSError, UnicodeError, OverflowError) as error:
        return str(error)
    return None


def listen(host: str) -> str | None:
    """Listen on any free port for a moment; return the reason when that fails."""
    try:
        with socket.create_server((host, 0)):
            return None
    except OSError as error:
        return str(error)


def http_status(url: str, token: str | None, limit_s: float) -> int | str:
    """Ask a web address; return its status code, or the reason why there is none."""
    headers = {"User-Agent": "rlctl"} | ({"Authorization": f"Bearer {token}"} if token else {})
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=limit_s) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code
    except (OSError, ValueError) as error:
        return str(getattr(error, "reason", error))


@dataclass(frozen=True)
class Tools:
    """The functions above, replaceable one by one."""

    python_version: str = platform.python_version()
    python: Callable[[str, Sequence[str], float], CommandResult] = run_python
    version: Callable[[str], str | None] = version_of
    requirements: Callable[[str], tuple[str, ...]] = requirements_of
    folder: Callable[[str], Path | None] = folder_of
    free: Callable[[Path], int] = free_bytes
    may_write: Callable[[Path], bool] = may_write
    open_files: Callable[[], tuple[int, int]] = open_file_limits
    interfaces: Callable[[], dict[str, tuple[str, ...]]] = interfaces
    addresses: Callable[[str], tuple[str, ...]] = addresses_of
    connect: Callable[[str, int, float], str | None] = connect
    listen: Callable[[str], str | None] = listen
    http: Callable[[str, str | None, float], int | str] = http_status
    hostname: Callable[[], str] = socket.gethostname
    now: Callable[[], float] = time.time
