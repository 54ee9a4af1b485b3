"""A reward function from a user's own file, `FILE.py:FUNCTION`.

Arguments go by name: `response` (or `solution_str`), `ground_truth`, `data_source`, `extra_info`, every key of
the row's `extra_info`, every key of `reward.kwargs`; the function gets those it names, or all with `**kwargs`.
Where it does not name the response or the ground truth, its first arguments are these two, in this order.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, SupportsFloat

from rlctl_train.config.errors import UserError
from rlctl_train.config.reward import CustomReward
from rlctl_train.registry import UserCodeError, load_user_object
from rlctl_train.rewards.base import Grade, GradedSample, Grader

RESPONSE_NAMES = ("response", "solution_str")
KNOWN = (*RESPONSE_NAMES, "ground_truth", "data_source", "extra_info")


def make(config: CustomReward) -> Grader:
    """Load the function and return a grader around it; what cannot work is a UserError now, not a zero later."""
    try:
        function = load_user_object(config.path)
    except UserCodeError as error:
        raise UserError(
            f"reward.path: {error}", "name it as FILE.py:FUNCTION, a function in a file that imports"
        ) from error
    if not callable(function) or inspect.iscoroutinefunction(function):
        kind = "async" if callable(function) else "no function"
        raise UserError(
            f"reward.path: {config.path} is {kind}", "name a plain function: def score(response, ground_truth)"
        )
    call = _caller(function, config)

    def grade(sample: GradedSample) -> Grade:
        return _to_grade(call(sample))

    return grade


def _caller(function: Callable[..., Any], config: CustomReward) -> Callable[[GradedSample], Any]:
    parameters = _parameters(function)
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
    named = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    if not takes_all:
        _refuse_unknown(set(config.kwargs) - named, config)
    firsts = _first_arguments(parameters, config)
    by_position = [source for name, source in firsts.items() if name not in named]
    renamed = {name: source for name, source in firsts.items() if name in named}

    def call(sample: GradedSample) -> Any:
        known = {
            **sample.extra,
            **config.kwargs,
            **dict.fromkeys(RESPONSE_NAMES, sample.response),
            "ground_truth": sample.ground_truth,
            "data_source": sample.data_source,
            "extra_info": sample.extra,
        }
        by_name = known if takes_all else {name: value for name, value in known.items() if name in named}
        by_name = by_name | {name: known[source] for name, source in renamed.items()}
        return function(*(known[source] for source in by_position), **by_name)

    return call


def _first_arguments(parameters: Sequence[inspect.Parameter], config: CustomReward) -> dict[str, str]:
    """Map the first arguments whose names mean nothing here to what they receive: response, then ground truth."""
    names = {p.name for p in parameters if p.kind is not p.POSITIONAL_ONLY}
    has_response = bool(names.intersection(RESPONSE_NAMES))
    sources = [] if has_response else [RESPONSE_NAMES[0]]
    sources += [] if "ground_truth" in names else ["ground_truth"]
    given = {*KNOWN, *config.kwargs}
    plain = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    free = [p.name for p in plain if p.kind is p.POSITIONAL_ONLY or (p.name not in given and p.default is p.empty)]
    kinds = {p.kind for p in parameters}
    if not plain and inspect.Parameter.VAR_POSITIONAL in kinds:
        free = [f"*{i}" for i in range(len(sources))]
    if not has_response and not free and inspect.Parameter.VAR_KEYWORD not in kinds:
        raise UserError(
            f"reward.path: {config.path} takes no response", "write it as def score(response, ground_truth)"
        )
    return dict(zip(free, sources, strict=False))


def _parameters(function: Callable[..., Any]) -> list[inspect.Parameter]:
    try:
        return list(inspect.signature(function).parameters.values())
    except ValueError:  # some functions written in C do not tell
        return [inspect.Parameter("arguments", inspect.Parameter.VAR_POSITIONAL)]


def _refuse_unknown(unknown: set[str], config: CustomReward) -> None:
    if unknown:
        names = ", ".join(sorted(unknown))
        raise UserError(
            f"reward.kwargs: {config.path} takes no argument {names}", f"remove {names} or add it to the function"
        )


def _to_grade(result: Any) -> Grade:
    """Read a number, or a mapping with `score` (`reason` and further numbers are kept, `acc` says right or wrong)."""
    if not isinstance(result, Mapping):
        return Grade(_number(result, "the function"), "scored by the function")
    if "score" not in result:
        raise TypeError(f"the returned dict has no 'score', only {', '.join(map(repr, result)) or 'nothing'}")
    parts = {
        str(key): float(value) for key, value in result.items() if key != "score" and isinstance(value, SupportsFloat)
    }
    return Grade(
        score=_number(result["score"], "'score'"),
        reason=str(result.get("reason", "scored by the function")),
        parts=parts,
        correct=bool(result["acc"]) if isinstance(result.get("acc"), SupportsFloat) else None,
    )


def _number(value: Any, what: str) -> float:
    if not isinstance(value, SupportsFloat):
        raise TypeError(f"{what} gave {type(value).__name__}, not a number")
    return float(value)
