"""What the memory model counts in: needs of bytes, by part and origin, and the constants that no formula gives."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal, get_args

from rlctl_hw.types import Dtype, Origin

Phase = Literal[
    "load",
    "generation",
    "logprobs",
    "values",
    "actor_update",
    "critic_update",
    "optimizer_step",
    "weight_sync",
    "checkpoint",
]
PHASES: tuple[Phase, ...] = get_args(Phase)
PARTS = (
    "weights",
    "gradients",
    "optimizer",
    "activations",
    "logits",
    "kv_cache",
    "cuda_graphs",
    "buffers",
    "checkpoint_copy",
    "communication",
    "context",
    "fragmentation",
    "overhead",
)
FORWARD_ONLY = ("reference", "teacher")
"""Roles that answer and are never updated."""

GIB, MIB = 2**30, 2**20
DTYPE_BYTES: dict[Dtype, int] = {"float32": 4, "bfloat16": 2}
MASTER_BYTES, MOMENT_BYTES = 4, 8

CONTEXT_GIB = 0.9
"""CUDA context, loaded kernels and workspaces of one process; 0.5 to 1.4 GiB are seen."""
VLLM_WORKING_GIB = 2.0
"""vLLM beside weights and KV cache: profiled activations, CUDA graphs, context."""
VLLM_ASLEEP_GIB = 1.5
"""What vLLM keeps on the device while it sleeps: context and graphs."""
CPU_PROCESS_GIB = 0.6
"""Resident size of a worker process after importing torch, transformers and ray, and in use."""
CPU_VLLM_GIB = 1.2
"""Resident size of a vLLM process on CPU beside weights and KV cache."""
RAY_GIB = 1.0
"""Ray's own processes and the driver, on the host."""

SPREAD: dict[Origin, float] = {"measured": 0.02, "formula": 0.05, "interpolated": 0.1, "assumed": 0.3}
"""How far a need may be off, as a share of it, by where it came from."""


@dataclass(frozen=True)
class Need:
    """Bytes of one part, of one process or of several."""

    part: str
    bytes: float
    origin: Origin = "formula"
    spread: float | None = None
    """Share by which it may be off; None follows the origin."""

    @property
    def off(self) -> float:
        """Return the bytes by which it may be off, either way."""
        return self.bytes * (SPREAD[self.origin] if self.spread is None else self.spread)

    def times(self, count: float) -> Need:
        """Return the need of `count` such processes."""
        return replace(self, bytes=self.bytes * count)


def total(needs: Iterable[Need]) -> float:
    """Return the sum in bytes."""
    return sum(need.bytes for need in needs)
