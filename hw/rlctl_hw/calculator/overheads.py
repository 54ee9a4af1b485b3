"""What is neither model nor data: workspaces, fragmentation, the device's context, collectives."""

from __future__ import annotations

from rlctl_hw.calculator.terms import Term
from rlctl_hw.setup import Setup

MIB = 2**20
WORKSPACE_MIB = {"a100": 68.0, "other": 97.0}
"""Median of what 209 runs of Megatron-LM's CI hold beyond states, activations and logits; Hopper's default cuBLAS
workspace is 32 MiB a handle where Ampere's is 8, and Transformer Engine has its own."""
GROUPED_WORKSPACE_MIB = {"a100": 16.0, "other": 128.0}
"""Transformer Engine's grouped product: a workspace for each of four streams, 32 MiB from Hopper on, 4 MiB before."""
TORCH_WORKSPACE_MIB = 32.0
"""torch's own cuBLAS workspace on Hopper (CUBLAS_WORKSPACE_CONFIG's default)."""
FRAGMENTATION = 0.05
"""Of what comes and goes. Blocks are rounded to 2 MiB and their remainders wait for a request that fits."""
CONTEXT_GIB = 0.75
"""CUDA context with the kernels of torch and its libraries; 0.5 to 1.4 GB are published. An H100 whose process was
1.2 GiB above its allocator, collectives included, is in the calibration table (the out-of-memory row)."""
COLLECTIVES_GIB = 0.36
"""NCCL's buffers of one communicator: 342 MB for 2 ranks, 392 MB for 4 to 8."""


def workspace(setup: Setup) -> Term:
    """Return the matrix-product workspaces that torch's allocator hands out."""
    if setup.device != "cuda":
        return Term("buffers", 0.0, "no workspace known", "assumed")
    if setup.engine == "fsdp2":
        return Term("buffers", TORCH_WORKSPACE_MIB * MIB, "cuBLAS workspace", "measured")
    family = "a100" if (setup.catalogue or "").startswith("a100") else "other"
    grouped = GROUPED_WORKSPACE_MIB[family] if setup.shape.experts and setup.grouped_experts else 0.0
    size = (WORKSPACE_MIB[family] + grouped) * MIB
    return Term("buffers", size, "cuBLAS and Transformer Engine workspaces", "measured")


DOUBT: dict[str, tuple[float, float]] = {
    "weights": (0.01, 0.01),
    "gradients": (0.02, 0.02),
    "optimizer": (0.02, 0.02),
    "activations": (0.15, 0.10),
    # Below: losses compiled into one kernel. Above: a framework that keeps the fp32 logits through the backward pass.
    "logits": (0.30, 0.15),
    "kv_cache": (0.02, 0.02),
    "cuda_graphs": (0.70, 1.0),
    "buffers": (0.25, 0.15),
    "fragmentation": (0.80, 0.50),
    "communication": (0.50, 1.0),
    "context": (0.30, 0.80),
}
"""By how much a part may be less, and more, than counted: the band. Shares of the part, from the spread of frameworks'
paths and of the published figures above."""


def communication(setup: Setup) -> Term:
    """Return the collectives' buffers. A lone rank is charged too: adding ranks is never said to cost memory."""
    size = COLLECTIVES_GIB * 1024**3 if setup.device != "cpu" else 0.0
    return Term("communication", size, "buffers of one communicator", "assumed")


def context(setup: Setup) -> Term:
    """Return the device's context."""
    size = CONTEXT_GIB * 1024**3 if setup.device != "cpu" else 0.0
    return Term("context", size, "context and kernels of the process", "assumed")
