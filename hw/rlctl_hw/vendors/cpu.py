"""The host itself: cores, memory and shared memory, within the limits of cgroups and affinity; what contains it."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import psutil

from rlctl_hw.host import Found, Host
from rlctl_hw.types import Device, Fact

GIB = 2**30
CGROUP_ROOT = "/sys/fs/cgroup"
NO_LIMIT_BYTES = 2**60
"""cgroup v1 writes "no limit" as the largest page-aligned number, about 2**63."""


CONTAINER_FILES = {"/.dockerenv": "docker", "/run/.containerenv": "podman", "/.singularity.d": "apptainer"}
CONTAINER_GROUP = re.compile(r"\b(docker|kubepods|containerd|libpod|lxc)\b")


def probe(host: Host) -> Found:
    """Return the CPU as one device, with the facts `host.*`; what cannot be learned has an error."""
    facts = {
        "host.cpu": _name(host),
        "host.cores": _cores(host),
        "host.memory_gib": _memory(host),
        "host.available_gib": _available(host),
        "host.shm_gib": _shared_memory(host),
        "host.kernel": _kernel(host),
        "host.container": _container(host),
    }
    memory_gib = facts["host.memory_gib"].value
    return Found((Device("cpu", 0, str(facts["host.cpu"].value or "CPU"), memory_gib or 0.0),), facts)


def parse_cpu_model(cpuinfo: str) -> str | None:
    """Read the model name from /proc/cpuinfo; ARM prints none."""
    found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
    return found.group(1).strip() if found else None


def parse_meminfo(meminfo: str, key: str = "MemTotal") -> int | None:
    """Read one line of /proc/meminfo, in bytes."""
    found = re.search(rf"^{key}:\s*(\d{{1,18}})\s*kB", meminfo, re.MULTILINE)
    return int(found.group(1)) * 1024 if found else None


def parse_memory_limit(text: str) -> int | None:
    """Read memory.max or memory.limit_in_bytes, in bytes; None means no limit."""
    return int(text) if _is_number(text) and int(text) < NO_LIMIT_BYTES else None


def parse_cpu_max(text: str) -> float | None:
    """Read cgroup v2 cpu.max (`quota period` or `max period`), in cores; None means no limit."""
    match text.split():
        case [quota, period]:
            return parse_cpu_quota(quota, period)
    return None


def parse_cpu_quota(quota: str, period: str) -> float | None:
    """Divide a quota by its period, both in microseconds; None means no limit (`max` or -1)."""
    if not (_is_number(quota) and _is_number(period)) or int(period) == 0:
        return None
    return int(quota) / int(period)


def parse_cgroup_paths(text: str) -> dict[str, str]:
    """Read /proc/self/cgroup: controller to path, the empty name being the v2 hierarchy."""
    paths = {}
    for line in text.splitlines():
        parts = line.split(":", 2)
        if len(parts) == 3:
            paths |= dict.fromkeys(parts[1].split(","), parts[2])
    return paths


def _is_number(text: str) -> bool:
    return re.fullmatch(r"[0-9]{1,20}", text) is not None


def _name(host: Host) -> Fact:
    name = parse_cpu_model(host.read("/proc/cpuinfo") or "")
    if name:
        return Fact(name, "/proc/cpuinfo")
    machine = host.answer("machine", lambda: os.uname().machine)
    return Fact(machine, "uname") if isinstance(machine, str) else Fact(None, "uname", "not told")


def _cores(host: Host) -> Fact:
    affinity = _count(host.answer("affinity", _affinity))
    limits = [limit for limit in _cpu_limits(host) if limit < (affinity or float("inf"))]
    if limits:
        # A quota of one and a half cores runs one busy thread well and two badly.
        return Fact(max(1, int(min(limits))), "cgroup cpu quota")
    return Fact(affinity, "affinity", None if affinity else "not told")


def _affinity() -> int:
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def _memory(host: Host) -> Fact:
    total, source = parse_meminfo(host.read("/proc/meminfo") or ""), "/proc/meminfo"
    if total is None:
        total, source = _count(host.answer("memory", lambda: psutil.virtual_memory().total)), "psutil"
    limits = [limit for limit in _memory_limits(host) if limit < (total or float("inf"))]
    if limits:
        return Fact(min(limits) / GIB, "cgroup memory limit")
    return Fact(None, source, "not told") if total is None else Fact(total / GIB, source)


def _available(host: Host) -> Fact:
    free = parse_meminfo(host.read("/proc/meminfo") or "", "MemAvailable")
    return Fact(None if free is None else free / GIB, "/proc/meminfo", "not told" if free is None else None)


def _shared_memory(host: Host) -> Fact:
    size = _count(host.answer("shm", lambda: _folder_bytes(host.at("/dev/shm"))))
    return Fact(None, "/dev/shm", "no shared memory") if size is None else Fact(size / GIB, "/dev/shm")


def _folder_bytes(folder: Path) -> int | None:
    try:
        stat = os.statvfs(folder)
    except OSError:
        return None
    return stat.f_frsize * stat.f_blocks


def _count(answer: Any) -> int | None:
    """Return a number that a record may hold in any form."""
    return answer if isinstance(answer, int) and not isinstance(answer, bool) and answer > 0 else None


def _kernel(host: Host) -> Fact:
    release = host.read("/proc/sys/kernel/osrelease")
    return Fact(release, "/proc/sys/kernel/osrelease", None if release else "not told")


def _container(host: Host) -> Fact:
    """Return what runs this process: docker, podman, kubernetes, …, or none where nothing marks a container."""
    if host.env.get("KUBERNETES_SERVICE_HOST"):
        return Fact("kubernetes", "KUBERNETES_SERVICE_HOST")
    for path, name in CONTAINER_FILES.items():
        if host.exists(path):
            return Fact(name, path)
    if name := host.env.get("container"):
        return Fact(name, "the variable container")
    group = CONTAINER_GROUP.search(host.read("/proc/1/cgroup") or "")
    return Fact(group.group(1) if group else "none", "/proc/1/cgroup")


def _cpu_limits(host: Host) -> Iterator[float]:
    paths = _own_paths(host)
    yield from _along(host, paths.get(""), ("", "/unified"), lambda at: parse_cpu_max(host.read(f"{at}/cpu.max") or ""))
    yield from _along(host, paths.get("cpu"), ("/cpu", "/cpu,cpuacct"), lambda at: _v1_quota(host, at))


def _memory_limits(host: Host) -> Iterator[float]:
    paths = _own_paths(host)
    for path, mounts, name in (
        (paths.get(""), ("", "/unified"), "memory.max"),
        (paths.get("memory"), ("/memory",), "memory.limit_in_bytes"),
    ):
        yield from _along(host, path, mounts, lambda at, name=name: parse_memory_limit(host.read(f"{at}/{name}") or ""))


def _own_paths(host: Host) -> dict[str, str]:
    return parse_cgroup_paths(host.read("/proc/self/cgroup") or "")


def _v1_quota(host: Host, at: str) -> float | None:
    quota, period = host.read(f"{at}/cpu.cfs_quota_us"), host.read(f"{at}/cpu.cfs_period_us")
    return parse_cpu_quota(quota, period) if quota and period else None


def _along(
    host: Host, path: str | None, mounts: tuple[str, ...], limit_at: Callable[[str], float | None]
) -> Iterator[float]:
    # Every ancestor limits. Inside a container the path may be the host's own, which is not mounted: its
    # missing folders read as no limit, and the walk still ends at the container's root.
    if path is None:
        return
    own = PurePosixPath("/") / path.lstrip("/")
    for mount in mounts:
        for folder in (own, *own.parents):
            limit = limit_at(f"{CGROUP_ROOT}{mount}{folder}".rstrip("/"))
            if limit is not None:
                yield limit
