"""The variables that hide devices: lists that name none, and pairs that contradict each other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from rlctl.doctor.case import Case
from rlctl.doctor.finding import Finding, Problem, fail, verdict, warn

NAME = "visibility"
CUDA, HIP, ROCR = "CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"
ASCEND_RT, ASCEND, NPU = "ASCEND_RT_VISIBLE_DEVICES", "ASCEND_VISIBLE_DEVICES", "NPU_VISIBLE_DEVICES"
OBEYED = {"cuda": (CUDA,), "rocm": (ROCR, HIP, CUDA), "ascend": (ASCEND_RT,)}
"""Variables that hide devices from a process, by vendor. Slurm sets ROCR's on NVIDIA too, where it does nothing."""
HIDES_ALL = ("", "-1", "NoDevFiles")


def check(case: Case) -> Finding:
    """Read the visibility variables of the vendors whose devices are here."""
    env = case.host.env
    here = [kind for kind in OBEYED if kind == case.hardware.kind or case.fact(f"{kind}.physical")]
    problems = [problem for kind in here for problem in _list(case, kind)]
    problems += _rocm(env) if "rocm" in here else ()
    problems += _ascend(env) if "ascend" in here else ()
    shown = {f"{name}={env[name]}": None for kind in here for name in OBEYED[kind] if name in env}
    return verdict(NAME, problems, ", ".join(shown) or "no variable hides devices")


def entries(text: str) -> list[str]:
    """Return the entries of a list of devices; empty where it hides all."""
    return [] if text.strip() in HIDES_ALL else [part.strip() for part in text.split(",")]


def _list(case: Case, kind: str) -> Iterator[Problem]:
    """Yield what the survey noted when it applied the list to the physical devices."""
    note, left = case.error(f"{kind}.visible"), case.fact(f"{kind}.visible")
    given = [name for name in OBEYED[kind] if name in case.host.env]
    if not given:
        return
    way_out = f"list indices such as 0,1 or UUIDs as the vendor's tool prints them, or unset {' and '.join(given)}"
    if case.hardware.kind != kind and not left:
        words = " ".join(f"{name}={case.host.env[name]!r}" for name in given)
        by_choice = all(case.host.env[name].strip() in HIDES_ALL for name in given)
        make = warn if by_choice and case.kind == "cpu" and case.plan is not None else fail
        yield make(f"{words} hides every device{f': {note}' if note else ''}", way_out)
    elif note and any(name in note for name in given):
        yield fail(note, way_out)


def _rocm(env: Mapping[str, str]) -> Iterator[Problem]:
    rocr, hip, cuda = (env.get(name) for name in (ROCR, HIP, CUDA))
    if rocr is not None and hip is None and cuda is None:
        way_out = f"set {HIP} instead: unset {ROCR}; export {HIP}={rocr}"
        yield fail(f"{ROCR} is set without {HIP}, which Ray refuses", way_out)
    for name, value in ((HIP, hip), (CUDA, cuda)):
        if rocr is not None and value is not None:
            yield from _relative(name, entries(value), len(entries(rocr)))
    if hip is not None and cuda is not None and entries(hip) != entries(cuda):
        yield fail(f"{HIP}={hip} and {CUDA}={cuda} differ, and HIP obeys both", f"unset {CUDA}")


def _relative(name: str, listed: list[str], left: int) -> Iterator[Problem]:
    beyond = [entry for entry in listed if entry.isdecimal() and int(entry[:9]) >= left]
    if beyond:
        what = f"{name} counts among the {left} device(s) that {ROCR} leaves, and {beyond[0]} is beyond them"
        yield fail(what, f"unset {ROCR}, or count from 0 in {name}")


def _ascend(env: Mapping[str, str]) -> Iterator[Problem]:
    used = env.get(ASCEND_RT)
    for name, whose in ((ASCEND, "the container runtime's"), (NPU, "another tool's")):
        value = env.get(name)
        if value is None:
            continue
        if used is None:
            yield warn(f"{name}={value} is {whose} variable and hides nothing from a process", f"set {ASCEND_RT}")
        elif entries(value) != entries(used):
            yield warn(f"{ASCEND_RT}={used} and {name}={value} differ; the first one counts", f"unset {name}")
