"""The host itself: cores, memory and shared memory, within the limits of cgroups and affinity."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import PurePosixPath

import psutil

from rlctl_hw.host import Found, Host
from rlctl_hw.types import Device, Fact

GIB = 2**30
CGROUP_ROOT = "/sys/fs/cgroup"
NO_LIMIT_BYTES = 2**60
"""cgroup v1 writes "no limit" as the largest page-aligned number, about 2**63."""


def probe(host: Host) -> Found:
    """Return the CPU as one device, with the facts `host.cores`, `host.memory_gib` and `host.shm_gib`."""
    facts = {
        "host.cpu": _name(host),
        "host.cores": _cores(host),
        "host.memory_gib": _memory(host),
        "host.shm_gib": _shared_memory(host),
    }
    device = Device("cpu", 0, str(facts["host.cpu"].value), facts["host.memory_gib"].value)
    return Found((device,), facts)


def parse_cpu_model(cpuinfo: str) -> str | None:
    """Read the model name from /proc/cpuinfo; ARM prints none."""
    found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
    return found.group(1).strip() if found else None


def parse_mem_total(meminfo: str) -> int | None:
    """Read MemTotal of /proc/meminfo, in bytes."""
    found = re.search(r"^MemTotal:\s*(\d+)\s*kB", meminfo, re.MULTILINE)
    return int(found.group(1)) * 1024 if found else None


def parse_memory_limit(text: str) -> int | None:
    """Read memory.max or memory.limit_in_bytes, in bytes; None means no limit."""
    return int(text) if text.isdigit() and int(text) < NO_LIMIT_BYTES else None


def parse_cpu_max(text: str) -> float | None:
    """Read cgroup v2 cpu.max (`quota period` or `max period`), in cores; None means no limit."""
    match text.split():
        case [quota, period]:
            return parse_cpu_quota(quota, period)
    return None


def parse_cpu_quota(quota: str, period: str) -> float | None:
    """Divide a quota by its period, both in microseconds; None means no limit (`max` or -1)."""
    if not (quota.isdigit() and period.isdigit()) or int(period) == 0:
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


def _name(host: Host) -> Fact:
    name = parse_cpu_model(host.read("/proc/cpuinfo") or "")
    return Fact(name, "/proc/cpuinfo") if name else Fact(os.uname().machine, "uname")


def _cores(host: Host) -> Fact:
    if sys.platform == "linux":
        affinity, source = len(os.sched_getaffinity(0)), "affinity"
    else:
        affinity, source = os.cpu_count() or 1, "cpu count"
    limits = [limit for limit in _cpu_limits(host) if limit < affinity]
    # A quota of one and a half cores runs one busy thread well and two badly.
    return Fact(max(1, int(min(limits))), "cgroup cpu quota") if limits else Fact(affinity, source)


def _memory(host: Host) -> Fact:
    total, source = parse_mem_total(host.read("/proc/meminfo") or ""), "/proc/meminfo"
    if total is None:
        total, source = psutil.virtual_memory().total, "psutil"
    limits = [limit for limit in _memory_limits(host) if limit < total]
    return Fact(min(limits) / GIB, "cgroup memory limit") if limits else Fact(total / GIB, source)


def _shared_memory(host: Host) -> Fact:
    folder = host.root / "dev/shm"
    try:
        stat = os.statvfs(folder)
    except OSError as error:
        return Fact(None, "/dev/shm", f"no shared memory: {error.strerror}")
    return Fact(stat.f_frsize * stat.f_blocks / GIB, "/dev/shm")


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
