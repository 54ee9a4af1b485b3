"""Settings given as text, on the command line and in the environment, turned into keys and typed values."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlctl import schema
from rlctl.problems import nearest_key
from rlctl.spelling import nearest
from rlctl_train.config.errors import UserError

ENV_PREFIX = "RLCTL_"
COMMAND_LINE = "command line"


@dataclass(frozen=True)
class Assignment:
    """One value for one key, and where it came from."""

    path: schema.Path
    value: Any
    source: str

    @property
    def key(self) -> str:
        """Return the key as a user writes it."""
        return ".".join(self.path)


@dataclass(frozen=True)
class Arguments:
    """The free arguments of a command: bare names, and overrides in the order given."""

    names: tuple[str, ...]
    overrides: tuple[Assignment, ...]

    def one_name(self, what: str) -> str:
        """Return the single bare name; `what` says what it stands for."""
        if name := self.optional_name():
            return name
        raise UserError(f"{what} is missing", f"give {what} as the first argument")

    def optional_name(self) -> str | None:
        """Return the single bare name, or None when there is none."""
        if len(self.names) > 1:
            extra = self.names[1]
            raise UserError(f"unexpected argument {extra!r}", "an override has the form key=value or --key value")
        return self.names[0] if self.names else None


def parse_arguments(arguments: Sequence[str], options: Iterable[str] = ()) -> Arguments:
    """Split into names and overrides: `a.b=c`, `--a.b c`, `--a.b=c`, `--set a.b=c`; `options` are the command's own."""
    names: list[str] = []
    overrides: list[Assignment] = []
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        if word == "--set":
            word = _value_of(word, rest)
            if "=" not in word:
                raise UserError(f"--set {word} has no value", "write --set key=value")
        if word.startswith("-") and word.strip("-"):
            key, equals, text = word.lstrip("-").partition("=")
            _check_option(word.partition("=")[0], key, options)
            overrides.append(_override(key, text if equals else _value_of(word, rest)))
        elif "=" in word:
            key, _, text = word.partition("=")
            overrides.append(_override(key, text))
        else:
            names.append(word)
    return Arguments(tuple(names), tuple(overrides))


def environment_assignments(environ: Mapping[str, str], reserved: Iterable[str]) -> list[Assignment]:
    """Return the settings among `RLCTL_*` variables (`RLCTL_TRAINER__NUM_STEPS`); `reserved` names are other things."""
    skip = {name.upper() for name in reserved}
    found = sorted(name for name in environ if name.upper().startswith(ENV_PREFIX) and name.upper() not in skip)
    return [_variable(name, environ[name]) for name in found]


def parse_text(text: str, node: schema.Node | None) -> Any:
    """Return the value `text` stands for: a JSON or TOML value, or the text itself where only text is allowed."""
    if node is not None and node.is_text:
        value = _literal(text) if text[:1] in ("'", '"') else text
        return value if isinstance(value, str) else text
    if node is not None and node.is_list:
        return _list(text)
    return _literal(text)


def _override(key: str, text: str) -> Assignment:
    path = tuple(key.replace("-", "_").split("."))
    return Assignment(path, parse_text(text, schema.find(path)), COMMAND_LINE)


def _variable(name: str, text: str) -> Assignment:
    path = tuple(name[len(ENV_PREFIX) :].lower().split("__"))
    return Assignment(path, parse_text(text, schema.find(path)), f"environment {name}")


def _value_of(word: str, rest: list[str]) -> str:
    if not rest:
        raise UserError(f"{word} has no value", f"write {word} VALUE")
    return rest.pop(0)


def _check_option(word: str, key: str, options: Iterable[str]) -> None:
    """Refuse what is neither an option nor a key, before its neighbour is taken for its value."""
    name = key.replace("-", "_")
    is_long = word.startswith("--")
    if is_long and ("." in name or schema.find((name,)) is not None):
        return
    near = nearest(word, options) or (is_long and nearest_key(name))
    hint = f"did you mean {near}?" if near else "`--help` lists the options; settings are --section.key VALUE"
    raise UserError(f"{word} is neither an option nor a setting", hint)


def _list(text: str) -> Any:
    value = _literal(text)
    if not isinstance(value, str) or value.lower() in ("none", "null"):
        return value if isinstance(value, list) or value is None or isinstance(value, str) else [value]
    inner = value[1:-1] if value.startswith("[") and value.endswith("]") else value
    return [_literal(part.strip()) for part in inner.split(",") if part.strip()]


def _literal(text: str) -> Any:
    """Return a JSON or TOML value, or the text itself when it is neither."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass
    try:
        table = tomllib.loads(f"v = {text}")
    except (ValueError, RecursionError):
        return text
    return table["v"] if set(table) == {"v"} else text
