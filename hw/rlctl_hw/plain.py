"""Read frozen dataclasses back from plain JSON values, refusing what has another shape."""

from __future__ import annotations

from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints


def read_plain(kind: Any, value: Any, at: str = "") -> Any:
    """Return `value` as `kind`: a dataclass, tuple, dict, union, literal or scalar.

    Keys that the dataclass lacks are refused. Raises ValueError that names the place.
    """
    origin = get_origin(kind)
    if is_dataclass(kind):
        return _record(kind, value, at)
    if kind is Any:
        return value
    if origin in (Union, UnionType):
        return _union(kind, value, at)
    if origin is Literal:
        return value if value in get_args(kind) else _refuse(value, f"one of {get_args(kind)}", at)
    if origin is tuple:
        return _sequence(kind, value, at)
    if origin is dict:
        if not isinstance(value, dict):
            return _refuse(value, "an object", at)
        return {key: read_plain(get_args(kind)[1], item, f"{at}.{key}") for key, item in value.items()}
    return _scalar(kind, value, at)


def _record(kind: Any, value: Any, at: str) -> Any:
    if not isinstance(value, dict):
        return _refuse(value, "an object", at)
    hints = _hints(kind)
    if unknown := sorted(set(value) - set(hints)):
        raise ValueError(f"{at or kind.__name__} has no field {', '.join(map(str, unknown))}")
    required = {field.name for field in fields(kind) if field.default is MISSING and field.default_factory is MISSING}
    if missing := sorted(required - set(value)):
        raise ValueError(f"{at or kind.__name__} lacks {', '.join(missing)}")
    return kind(**{name: read_plain(hints[name], item, f"{at}.{name}".lstrip(".")) for name, item in value.items()})


@cache
def _hints(kind: Any) -> dict[str, Any]:
    known = {field.name for field in fields(kind)}
    return {name: hint for name, hint in get_type_hints(kind).items() if name in known}


def _union(kind: Any, value: Any, at: str) -> Any:
    choices = get_args(kind)
    if value is None and NoneType in choices:
        return None
    (choice,) = (choice for choice in choices if choice is not NoneType)
    return read_plain(choice, value, at)


def _sequence(kind: Any, value: Any, at: str) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        return _refuse(value, "a list", at)
    return tuple(read_plain(get_args(kind)[0], item, f"{at}[{place}]") for place, item in enumerate(value))


def _scalar(kind: Any, value: Any, at: str) -> Any:
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    # True is an int in Python, but 1 is not what a person means by true.
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        return _refuse(value, kind.__name__, at)
    return value


def _refuse(value: Any, wanted: str, at: str) -> Any:
    raise ValueError(f"{at or 'the value'} is {str(value)[:60]!r}, not {wanted}")
