"""Expandable segments of torch's allocator against the memory pool of vLLM's sleep mode (pytorch#147851)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from rlctl.doctor.case import Case
from rlctl.doctor.finding import Finding, Problem, fail, skip, verdict, warn
from rlctl_train.config.rollout import VllmRollout

NAME = "allocator"
VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
"""In torch's order of precedence; the later ones are older names of the first."""
NPU_VARIABLES = ("PYTORCH_NPU_ALLOC_CONF",)
EXPANDABLE = re.compile(r"expandable_segments\s*:\s*true", re.IGNORECASE)
REFUSAL = "Expandable segments are not compatible"
"""vLLM before #40812 (April 2026) refuses to start; later ones switch the setting off around their pool."""


def check(case: Case) -> Finding:
    """Compare the allocator's settings with the rollout engine that will run under them."""
    if case.kind == "cpu":
        return skip(NAME, "no accelerator will be used")
    names = NPU_VARIABLES if case.kind == "ascend" else VARIABLES
    given = {name: case.host.env[name] for name in names if case.host.env.get(name)}
    fine = ", ".join(f"{name}={value}" for name, value in given.items()) or "torch's defaults"
    return verdict(NAME, [*_contradictions(given), *_expandable(case, given)], fine)


def _contradictions(given: Mapping[str, str]) -> Iterator[Problem]:
    if len(set(given.values())) > 1:
        first, *others = given
        yield warn(f"{' and '.join(given)} differ; torch reads {first}", f"unset {' and '.join(others)}")


def _expandable(case: Case, given: Mapping[str, str]) -> Iterator[Problem]:
    name = next(iter(given), None)
    if name is None or not EXPANDABLE.search(given[name]):
        return
    remedy = f"take expandable_segments:True out of {name}"
    if case.config is None:
        yield warn(f"{name} asks for expandable segments, which some versions of vLLM refuse in sleep mode", remedy)
    elif isinstance(case.config.rollout, VllmRollout) and _refuses(case):
        what = f"{name} asks for expandable segments, and vLLM's sleep mode refuses to start with them"
        yield fail(what, f"{remedy}, or set rollout.type=hf")


def _refuses(case: Case) -> bool:
    """Say whether the installed vLLM refuses; one whose file is elsewhere is taken to."""
    package, file = ("vllm_ascend", "camem.py") if case.kind == "ascend" else ("vllm", "cumem.py")
    folder = case.tools.folder(package)
    if folder is None:
        return True
    try:
        return REFUSAL in (folder / "device_allocator" / file).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return True
