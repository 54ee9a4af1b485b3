"""What the host grants: shared memory, open files, and memory within the limits of its control groups."""

from __future__ import annotations

from collections.abc import Iterator

from rlctl_hw.types import Plan

from rlctl.doctor.case import GIB, Case
from rlctl.doctor.devices import peak_gib
from rlctl.doctor.finding import Finding, Problem, fail, skip, verdict, warn

SHM = "/dev/shm"
LEAST_SHM_GIB = 1.0
"""A small run's batches and buckets; Docker gives 1/16 of it unless told otherwise."""
RANK_SHM_GIB = 0.05
"""Of each rank on one node: the collectives' shared buffers (NCCL: about 10 MB a channel pair), rounded up."""
RAY_REFUSES_GIB = 10**10 / GIB
"""Ray puts a store of at most 10 GB on disk when shared memory is short, and refuses a larger one."""
FEW_FILES, ENOUGH_FILES = 1024, 4096
"""Ray raises the soft limit to the hard one, and warns below 4096."""


def shared_memory(case: Case) -> Finding:
    """Compare /dev/shm with the object store of the plan and the collectives' buffers."""
    place = case.host.at(SHM)
    if not place.is_dir():
        return verdict("shm", [fail("there is no /dev/shm", "mount one: --shm-size=16g in Docker")], "")
    free = case.tools.free(place) / GIB
    return verdict("shm", _shm(case, free), f"{free:.1f} GiB free in /dev/shm{_asked(case)}")


def open_files(case: Case) -> Finding:
    """Compare the limit of open files with what Ray and many workers need."""
    soft, hard = case.tools.open_files()
    reachable = ENOUGH_FILES if hard < 0 or soft < 0 else max(soft, min(hard, 65536))
    remedy = "raise it: `ulimit -n 65536`, or --ulimit nofile=65536:65536 in Docker"
    problems = []
    if reachable < FEW_FILES:
        problems.append(fail(f"at most {reachable} files may be open (soft {soft}, hard {hard})", remedy))
    elif reachable < ENOUGH_FILES:
        problems.append(warn(f"at most {reachable} files may be open, and Ray asks for {ENOUGH_FILES}", remedy))
    return verdict("open_files", problems, f"soft limit {soft}, hard limit {hard}")


def memory(case: Case) -> Finding:
    """Compare the host memory that the control groups leave with what the plan puts there."""
    limit, fact = case.hardware.host_memory_gib, case.hardware.facts.get("host.memory_gib")
    source = fact.source if fact is not None else "the survey"
    if case.plan is None:
        return skip("host_memory", f"{limit:.1f} GiB ({source}); without a plan nothing is known of the need")
    need = host_need_gib(case.plan)
    return verdict("host_memory", _memory(case, need, source), f"{limit:.1f} GiB ({source}), the plan needs {need:.1f}")


def host_need_gib(plan: Plan) -> float:
    """Return the most a plan takes of one node's memory; on CPU that is everything, and Ray's store."""
    if plan.device == "cpu":
        return peak_gib(plan.memory) + plan.object_store_gib
    return peak_gib(plan.host_memory)


def _shm(case: Case, free: float) -> Iterator[Problem]:
    plan = case.plan
    if plan is None:
        if free < LEAST_SHM_GIB:
            yield warn(f"/dev/shm has {free:.2f} GiB free", "mount more: --shm-size=16g in Docker")
        return
    private = case.config is not None and case.config.ray.address is None
    store = plan.object_store_gib if private else 0.0
    ranks = RANK_SHM_GIB * case.num_workers if plan.device != "cpu" and case.num_workers > 1 else 0.0
    if free >= store + ranks:
        return
    what = f"/dev/shm has {free:.2f} GiB free, and Ray's store of the plan takes {store:.2f}"
    what += f" and the collectives {ranks:.2f}" if ranks else ""
    remedy = f"mount at least {store + ranks + LEAST_SHM_GIB:.0f} GiB (--shm-size in Docker), or remove old files there"
    stops = free < ranks or store > RAY_REFUSES_GIB
    yield (fail if stops else warn)(what, f"{remedy}, or lower ray.object_store_gib")


def _memory(case: Case, need: float, source: str) -> Iterator[Problem]:
    limit = case.hardware.host_memory_gib
    if need > limit:
        remedy = "raise the limit of the container or job, or lower trainer.prompts_per_step"
        yield fail(f"the plan needs {need:.1f} GiB of host memory, and {source} gives {limit:.1f}", remedy)
        return
    left = case.fact("host.available_gib")
    if left is not None and need > left:
        what = f"the plan needs {need:.1f} GiB of host memory, and of {limit:.1f} only {left:.1f} are free now"
        yield warn(what, "end other processes, or lower trainer.prompts_per_step")


def _asked(case: Case) -> str:
    return "" if case.plan is None else f", the plan's object store takes {case.plan.object_store_gib:.2f}"
