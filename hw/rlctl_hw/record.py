"""Keep what a survey saw in a folder, and survey from that folder elsewhere.

`record.json` holds environment, commands, answers of libraries and where links lead; `files/` what was read, under the
paths of the machine; `commands/` what commands printed.
"""

from __future__ import annotations

import json
import os
import re
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from rlctl_hw.host import CommandResult, Host
from rlctl_hw.plain import read_plain
from rlctl_hw.scrub import Scrubber

SCHEMA_VERSION = 1
MAX_FILE_CHARS = 65536
"""Of one file: /proc/cpuinfo of a large host repeats itself for longer than that."""


@dataclass(frozen=True)
class KeptCommand:
    """One command: what it was, how it ended, and the file with what it printed."""

    argv: tuple[str, ...]
    code: int | None
    error: str | None
    stdout: str


@dataclass(frozen=True)
class Index:
    """The contents of `record.json`."""

    schema_version: int
    environment: dict[str, str]
    commands: tuple[KeptCommand, ...]
    answers: dict[str, Any]
    links: dict[str, str]


@dataclass
class Seen:
    """Everything that came through a recording host."""

    files: dict[str, str] = field(default_factory=dict)
    """Path to text; empty for what was only found to exist."""
    commands: dict[tuple[str, ...], CommandResult] = field(default_factory=dict)
    answers: dict[str, Any] = field(default_factory=dict)
    links: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class RecordingHost(Host):
    """A host that remembers what was asked of another; make one with `recording`."""

    asked: Host = field(default_factory=Host)
    seen: Seen = field(default_factory=Seen)

    def read(self, path: str) -> str | None:
        text = self.asked.read(path)
        if text is not None:
            self.seen.files[path] = text
        return text

    def exists(self, path: str) -> bool:
        found = self.asked.exists(path)
        if found:
            self.seen.files.setdefault(path, "")
        return found

    def listdir(self, path: str) -> list[str]:
        names = self.asked.listdir(path)
        for name in names:
            self.seen.files.setdefault(f"{path.rstrip('/')}/{name}", "")
        return names

    def glob(self, pattern: str) -> list[str]:
        paths = self.asked.glob(pattern)
        for path in paths:
            self.seen.files.setdefault(path, "")
        return paths

    def resolve(self, path: str) -> str | None:
        target = self.asked.resolve(path)
        if target is not None:
            self.seen.links[path] = target
        return target

    def answer(self, name: str, question: Callable[[], Any]) -> Any:
        self.seen.answers[name] = self.asked.answer(name, question)
        return self.seen.answers[name]

    def at(self, path: str) -> Path:
        return self.asked.at(path)


@dataclass(frozen=True)
class ReplayHost(Host):
    """A host that answers from a record; make one with `replay`."""

    answers: Mapping[str, Any] = field(default_factory=dict)
    links: Mapping[str, str] = field(default_factory=dict)

    def resolve(self, path: str) -> str | None:
        return self.links.get(path)

    def answer(self, name: str, question: Callable[[], Any]) -> Any:
        return self.answers.get(name)

    def at(self, path: str) -> Path:
        # A record comes from someone else: nothing in it may lead to this machine's own files.
        return _inside(self.root, path)


def recording(host: Host) -> RecordingHost:
    """Return the host with a memory."""
    seen = Seen()

    def run(argv: Sequence[str]) -> CommandResult:
        seen.commands[tuple(argv)] = result = host.run(argv)
        return result

    return RecordingHost(host.root, host.env, run, host, seen)


def save(host: RecordingHost, folder: Path, names: Sequence[tuple[str, str]] | None = None) -> None:
    """Write what the host has seen, secrets removed. Raises ValueError where the folder is in use."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists and is not an empty folder")
    scrubber = Scrubber(own_names() if names is None else names)
    seen = host.seen
    files = {scrubber.text(path): scrubber.text(text[:MAX_FILE_CHARS]) for path, text in sorted(seen.files.items())}
    _write_files(folder / "files", files)
    (folder / "commands").mkdir(parents=True)
    commands = [_save_command(folder, number, *item, scrubber) for number, item in enumerate(seen.commands.items(), 1)]
    index = Index(
        SCHEMA_VERSION,
        # The environment comes last: only now are all devices known that it may name.
        answers=scrubber.plain(seen.answers),
        links={scrubber.text(path): scrubber.text(target) for path, target in seen.links.items()},
        commands=tuple(commands),
        environment=scrubber.environment(host.env.items()),
    )
    (folder / "record.json").write_text(json.dumps(asdict(index), indent=2) + "\n", encoding="utf-8")


def replay(folder: Path) -> ReplayHost:
    """Return the recorded machine. Raises ValueError where the folder holds no record that can be read."""
    try:
        index = read_plain(Index, json.loads((folder / "record.json").read_text(encoding="utf-8")))
    except OSError as error:
        raise ValueError(f"{folder} holds no record: {error.strerror} (record.json)") from error
    except ValueError as error:
        raise ValueError(f"{folder / 'record.json'} is damaged: {error}") from error
    if index.schema_version != SCHEMA_VERSION:
        raise ValueError(f"{folder} is a record of schema {index.schema_version}; this rlctl reads {SCHEMA_VERSION}")
    exact = {kept.argv: kept for kept in index.commands}
    alike = {_form(kept.argv): kept for kept in index.commands}

    def run(argv: Sequence[str]) -> CommandResult:
        # Another version may ask for other fields, and what it reads it finds by name.
        kept = exact.get(tuple(argv)) or alike.get(_form(argv))
        if kept is None:
            return CommandResult("", None, f"{' '.join(argv)} is not in the record")
        return CommandResult(_text(_inside(folder, kept.stdout)), kept.code, kept.error)

    return ReplayHost(folder / "files", index.environment, run, index.answers, index.links)


def own_names() -> list[tuple[str, str]]:
    """Return the names of this host and of this user with their stand-ins."""
    host = socket.gethostname()
    users = {os.environ.get(variable, "") for variable in ("USER", "LOGNAME", "SUDO_USER")}
    return [(host, "host"), (host.partition(".")[0], "host"), *((user, "user") for user in sorted(users))]


def _write_files(root: Path, files: Mapping[str, str]) -> None:
    root.mkdir(parents=True)
    folders = {str(parent) for path in files for parent in PurePosixPath(path).parents}
    for path, text in files.items():
        if path in folders:
            continue
        place = _inside(root, path)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text, encoding="utf-8")


def _save_command(
    folder: Path, number: int, argv: Sequence[str], result: CommandResult, scrubber: Scrubber
) -> KeptCommand:
    name = re.sub(r"[^\w.-]+", "-", "-".join(argv))[:60].strip("-")
    stdout = f"commands/{number:02d}-{name}.txt"
    (folder / stdout).write_text(scrubber.text(result.stdout), encoding="utf-8")
    error = None if result.error is None else scrubber.text(result.error)
    return KeptCommand(tuple(argv), result.code, error, stdout)


def _form(argv: Sequence[str]) -> tuple[str, ...]:
    """Return a command without the values of its options."""
    return tuple(part.partition("=")[0] for part in argv)


def _inside(root: Path, path: str) -> Path:
    """Return where a path lies below a folder; what leads out of it becomes a name that is not there."""
    place = (root / path.lstrip("/")).resolve()
    return place if place.is_relative_to(root.resolve()) else root / "outside-the-record"


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
