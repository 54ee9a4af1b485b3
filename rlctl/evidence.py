"""What a preset was measured to do: its `[[verified]]` records, read strictly; without one a preset is only planned."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from rlctl_train.config.errors import UserError

PLANNED = "planned"
TEXTS = ("date", "commit", "hardware", "command")
TABLES = ("versions", "numbers")
DAY = re.compile(r"\d{4}-\d{2}-\d{2}")


@dataclass(frozen=True)
class Verified:
    """One measured run of a preset."""

    date: str
    """Day of the run, as YYYY-MM-DD."""
    commit: str
    """Of this repository, at which it ran."""
    hardware: str
    """The machine as `--hw` names it, such as `h100-80gb:8`."""
    command: str
    versions: dict[str, str]
    """Of what decides the result: torch, transformers, vLLM, the driver."""
    numbers: dict[str, float]
    """What came out, with the unit in the name."""

    @property
    def summary(self) -> str:
        """Return where and when, in one line."""
        return f"verified on {self.hardware}, {self.date}"


def status(records: tuple[Verified, ...]) -> str:
    """Return what the records of a preset amount to."""
    return records[-1].summary if records else PLANNED


def read_verified(entries: Any, where: str) -> tuple[Verified, ...]:
    """Read the `[[verified]]` tables of a preset, oldest first; `where` names the file in complaints."""
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise _complaint(where, "is not a list of tables")
    return tuple(sorted((_read(entry, where) for entry in entries), key=lambda record: record.date))


def _read(entry: dict[str, Any], where: str) -> Verified:
    values = {**entry, "date": str(entry.get("date", ""))}
    if unknown := sorted(values.keys() - {*TEXTS, *TABLES}):
        raise _complaint(where, f"has the unknown key {unknown[0]!r}")
    if missing := [key for key in TEXTS if not isinstance(values.get(key), str) or not values[key]]:
        raise _complaint(where, f"lacks {missing[0]!r}")
    if not DAY.fullmatch(values["date"]):
        raise _complaint(where, f"has the date {values['date']!r}, which is not YYYY-MM-DD")
    for key, kinds in (("versions", (str,)), ("numbers", (int, float))):
        table = values.get(key)
        if not isinstance(table, dict) or not table or any(not _is(value, kinds) for value in table.values()):
            raise _complaint(where, f"lacks {key!r}, a table of {'texts' if key == 'versions' else 'numbers'}")
    return Verified(**values)


def _is(value: Any, kinds: tuple[type, ...]) -> bool:
    return isinstance(value, kinds) and not isinstance(value, bool)


def _complaint(where: str, what: str) -> UserError:
    return UserError(f"{where}: [[verified]] {what}", f"a record holds {', '.join((*TEXTS, *TABLES))}")
