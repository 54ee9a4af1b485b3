"""Read JSON lines as people have them: with or without a byte-order mark, CRLF and blank lines."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlctl_train.config.errors import PREFLIGHT, USAGE, UserError

MAX_NAMED = 5
"""Bad lines named in one message; the rest are counted."""


@dataclass(frozen=True)
class Line:
    """One JSON object and its line number, from 1."""

    number: int
    value: dict[str, Any]


def read_jsonl(path: Path, *required: str) -> list[Line]:
    """Return every object of the file; all lines that are none, or lack a required key, are refused at once."""
    lines: list[Line] = []
    problems: list[tuple[int, str]] = []
    for number, raw in enumerate(_bytes(path).removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if not raw.strip():
            continue
        value = _parsed(raw)
        if isinstance(value, str):
            problems.append((number, value))
        elif missing := [key for key in required if key not in value]:
            problems.append((number, f"no {' and no '.join(map(repr, missing))}, only {_names(value)}"))
        else:
            lines.append(Line(number, value))
    if problems:
        raise _refusal(path, problems, num_good=len(lines))
    if not lines:
        raise UserError(f"{path} holds no lines", "give a file with one JSON object a line")
    return lines


def _refusal(path: Path, problems: list[tuple[int, str]], num_good: int) -> UserError:
    if num_good == 0 and len(problems) > 1 and len({what for _, what in problems}) == 1:
        return UserError(f"{path}: every line: {problems[0][1]}", "name the file, and the keys, that fit each other")
    named = listed([f"line {number}: {what}" for number, what in problems])
    return UserError(f"{path}: {named}", "mend or remove these lines: each must be one JSON object with all keys")


def listed(problems: list[str]) -> str:
    """Join the first few problems and count the rest."""
    more = len(problems) - MAX_NAMED
    return "; ".join(problems[:MAX_NAMED]) + (f"; and {more} more" if more > 0 else "")


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise UserError(f"no such file: {path}", "check the path", exit_code=PREFLIGHT) from error
    except OSError as error:
        code = USAGE if path.is_dir() else PREFLIGHT
        raise UserError(
            f"cannot read {path}: {error.strerror}", "give a readable JSON lines file", exit_code=code
        ) from error


def _parsed(raw: bytes) -> dict[str, Any] | str:
    """Return the line's object, or what is wrong with the line."""
    try:
        value = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        return f"not UTF-8 text at byte {error.start}"
    except json.JSONDecodeError as error:
        return f"not JSON ({error.msg} at column {error.colno})"
    except RecursionError:
        return "nested too deeply"
    return value if isinstance(value, dict) else f"a JSON {_json_type(value)}, not an object"


def _json_type(value: Any) -> str:
    names = {list: "array", str: "string", bool: "boolean", int: "number", float: "number", type(None): "null"}
    return names[type(value)]


def _names(value: dict[str, Any]) -> str:
    return ", ".join(map(repr, value)) or "no keys at all"
