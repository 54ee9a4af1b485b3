"""Ports, the library of collectives, and the links and interfaces it will use."""

from __future__ import annotations

from collections.abc import Iterator

from rlctl.doctor import torch_build
from rlctl.doctor.case import Case
from rlctl.doctor.finding import Finding, Problem, fail, skip, verdict, warn

CONNECT_LIMIT_S = 5.0
LIBRARIES = {"cuda": "NCCL", "rocm": "RCCL", "ascend": "HCCL"}
NCCL_PACKAGES = ("nvidia-nccl-cu13", "nvidia-nccl-cu12", "nvidia-nccl-cu11")
LIBRARY_FOLDERS = ("/usr/lib/x86_64-linux-gnu", "/usr/lib/aarch64-linux-gnu", "/usr/lib64", "/usr/lib", "/opt/rocm/lib")
PREFIXED = {"cuda": ("NCCL_SOCKET_IFNAME",), "rocm": ("NCCL_SOCKET_IFNAME",), "ascend": ("HCCL_SOCKET_IFNAME",)}
"""Lists of prefixes: `^` excludes, `=` wants the whole name (NCCL's and CANN's references agree)."""
WHOLE = ("GLOO_SOCKET_IFNAME", "TP_SOCKET_IFNAME")
"""Lists of whole names."""
SWITCHED_OFF = {
    "NCCL_P2P_DISABLE": "direct copies between GPUs",
    "NCCL_SHM_DISABLE": "shared memory between ranks",
    "NCCL_IB_DISABLE": "InfiniBand and RoCE",
}


def ports(case: Case) -> Finding:
    """Connect to the configured Ray cluster, or see that a private one can listen here."""
    address = None if case.config is None else case.config.ray.address
    if address is None:
        refused = case.tools.listen("127.0.0.1")
        remedy = "free some ports, or look at the container's network"
        problems = [fail(f"nothing can listen on 127.0.0.1: {refused}", remedy)] if refused else []
        return verdict("ports", problems, "a private Ray cluster finds free ports here")
    return verdict("ports", _cluster(case, address), f"something listens at ray.address={address}")


def collectives(case: Case) -> Finding:
    """Look for the library by which devices exchange tensors."""
    library = LIBRARIES.get(case.kind)
    if library is None:
        return skip("collectives", "the CPU's (gloo) is part of torch")
    if torch_build.read(case.tools) is None:
        return skip("collectives", "torch is not installed here")
    found = {"cuda": _nccl, "rocm": _rccl, "ascend": _hccl}[case.kind](case)
    problems = [] if found else [_no_library(case, library)]
    problems += [
        warn(f"{name}={case.host.env[name]} switches off {what}", f"unset {name} unless a fault calls for it")
        for name, what in SWITCHED_OFF.items()
        if case.num_workers > 1 and case.host.env.get(name, "0") not in ("", "0")
    ]
    return verdict("collectives", problems, f"{library} {found}")


def links(case: Case) -> Finding:
    """Look at the state of InfiniBand and RoCE ports, and at the interfaces that variables name."""
    active: list[str] = case.fact("nics.rdma") or []
    problems = [*_interfaces(case), *_host_adapters(case, active), *_down(case, active)]
    return verdict("links", problems, f"active: {', '.join(active)}" if active else "no InfiniBand or RoCE port")


def _cluster(case: Case, address: str) -> Iterator[Problem]:
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        yield fail(f"ray.address={address} is not of the form HOST:PORT", "give the address that `ray status` shows")
        return
    refused = case.tools.connect(host, int(port), CONNECT_LIMIT_S)
    if refused:
        remedy = "check that the cluster runs (`ray status`) and that this host may reach it, or unset ray.address"
        yield fail(f"ray.address={address}: {refused}", remedy)


def _no_library(case: Case, library: str) -> Problem:
    what = f"{library} is not found beside torch nor on this machine"
    remedy = "install torch again with its dependencies" if case.kind != "ascend" else "install the CANN toolkit"
    return fail(what, remedy) if case.num_workers > 1 else warn(what, remedy)


def _nccl(case: Case) -> str | None:
    packages = (case.tools.version(name) for name in NCCL_PACKAGES)
    return next(filter(None, packages), None) or _library(case, "libnccl.so*")


def _rccl(case: Case) -> str | None:
    return _library(case, "librccl.so*")


def _hccl(case: Case) -> str | None:
    version = case.fact("ascend.cann")
    return f"of CANN {version}" if version else None


def _library(case: Case, pattern: str) -> str | None:
    torch = case.tools.folder("torch")
    places = [case.host.at(folder) for folder in LIBRARY_FOLDERS]
    for place in [torch / "lib", *places] if torch else places:
        found = next(iter(sorted(place.glob(pattern))), None)
        if found is not None:
            return f"in {found.parent}"
    return None


def _interfaces(case: Case) -> Iterator[Problem]:
    have = set(case.tools.interfaces())
    for name in PREFIXED.get(case.kind, ()):
        value = case.host.env.get(name, "")
        if value and not _matching(value, have):
            yield fail(f"{name}={value} matches no interface", f"one of {', '.join(sorted(have))}")
    for name in WHOLE:
        missing = [part for part in case.host.env.get(name, "").split(",") if part and part not in have]
        if missing:
            yield fail(f"{name} names {missing[0]}, which is no interface", f"one of {', '.join(sorted(have))}")


def _matching(value: str, have: set[str]) -> set[str]:
    excludes, rest = value.startswith("^"), value.removeprefix("^")
    whole, wanted = rest.startswith("="), rest.removeprefix("=").split(",")
    named = {
        i for i in have if any(i == part.split(":")[0] if whole else i.startswith(part) for part in wanted if part)
    }
    return have - named if excludes else named


def _host_adapters(case: Case, active: list[str]) -> Iterator[Problem]:
    value, names = case.host.env.get("NCCL_IB_HCA", ""), {port.partition(":")[0] for port in active}
    if case.kind in ("cuda", "rocm") and value and names and not _matching(value, names):
        yield fail(f"NCCL_IB_HCA={value} matches no active adapter", f"one of {', '.join(sorted(names))}")


def _down(case: Case, active: list[str]) -> Iterator[Problem]:
    error = case.error("nics.rdma")
    if error:
        remedy = "ask who runs the fabric, or leave them out with NCCL_IB_HCA=^NAME"
        make = fail if not active and case.num_nodes > 1 else warn
        yield make(f"InfiniBand or RoCE ports are {error}", remedy)
