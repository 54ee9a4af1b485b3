"""What the memory calculator is asked, for any framework: one model, one task, one layout; and what it answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rlctl_hw.types import DeviceKind, ModelShape, Origin

EngineName = Literal["fsdp2", "megatron"]
Task = Literal["sft", "update", "logprob", "rollout"]
Recompute = Literal["none", "selective", "full"]
LossPath = Literal["plain", "chunked", "fused"]
Attention = Literal["flash", "eager"]
Optimizer = Literal["adamw", "adamw8bit", "sgd"]
WeightDtype = Literal["float32", "bfloat16", "float16", "float8", "nf4"]


@dataclass(frozen=True)
class Mesh:
    """Degrees of parallelism; world size = dp_replicate * dp_shard * tp * pp * cp."""

    dp_replicate: int = 1
    dp_shard: int = 1
    """Ranks that share one copy of the states (Megatron: the distributed optimizer's ranks, dp_replicate being 1)."""
    tp: int = 1
    pp: int = 1
    cp: int = 1
    ep: int = 1
    """Expert parallelism, inside dp_shard * cp (times tp / etp)."""
    etp: int = 1
    """Tensor parallelism inside an expert."""
    sequence_parallel: bool = False
    virtual_stages: int = 1
    """Model chunks per pipeline stage (interleaved schedule)."""

    @property
    def world_size(self) -> int:
        """Return the number of devices."""
        return self.dp_replicate * self.dp_shard * self.tp * self.pp * self.cp


@dataclass(frozen=True)
class Setup:
    """One engine's work on one model: everything that decides its memory."""

    shape: ModelShape
    engine: EngineName
    task: Task
    mesh: Mesh = Mesh()
    seq_len: int = 4096
    micro_batch: int = 1
    """Sequences of `seq_len` tokens in one micro-batch; for rollout, sequences decoded at one time."""
    num_micro_batches: int = 1
    """Micro-batches of one optimizer step and data-parallel rank (a pipeline holds several at one time)."""
    recompute: Recompute = "none"
    loss: LossPath = "plain"
    logits_chunk_tokens: int = 1024
    """Tokens per chunk of a chunked loss."""
    attention: Attention = "flash"
    param_dtype: WeightDtype = "float32"
    """Of the parameters the optimizer updates (FSDP2: the sharded ones; Megatron: the model's, masters are apart)."""
    compute_dtype: WeightDtype = "bfloat16"
    grad_dtype: WeightDtype = "float32"
    optim_dtype: WeightDtype = "float32"
    optimizer: Optimizer = "adamw"
    param_offload: bool = False
    optim_offload: bool = False
    optim_offload_share: float = 1.0
    lora_rank: int = 0
    """0 trains every parameter."""
    base_dtype: WeightDtype | None = None
    """Of the frozen weights under LoRA; None is `param_dtype`."""
    reshard_after_forward: bool = True
    critic: bool = False
    """A value head in place of the output projection."""
    dropout: bool = False
    device: DeviceKind = "cuda"
    catalogue: str | None = None
    """Key of the device in `devices.toml`; it settles workspace sizes."""
    gpu_memory_share: float | None = None
    """Rollout: share of the device that the engine takes whole; None counts weights and `micro_batch` sequences."""


@dataclass(frozen=True)
class Band:
    """A number with the range it is expected in, in GiB."""

    gib: float
    low_gib: float
    high_gib: float


@dataclass(frozen=True)
class Part:
    """One part of the memory at the peak, in GiB: what it is, how it was found, and the formula in words."""

    name: str
    """weights, gradients, optimizer, activations, logits, kv_cache, cuda_graphs, buffers, communication, context,
    fragmentation."""
    gib: float
    origin: Origin
    why: str = ""


@dataclass(frozen=True)
class Estimate:
    """Memory of one device. `parts` sum to `device`."""

    peak: Band
    """What the framework's allocator holds at its peak (torch: max_memory_allocated)."""
    reserved: Band
    """With fragmentation and caching (torch: max_memory_reserved)."""
    device: Band
    """What the vendor's tool shows: reserved, context and communication."""
    steady: Band
    """Between steps: weights, gradients where kept, optimizer."""
    parts: tuple[Part, ...]
    host_gib: float = 0.0
    """Host memory of one device's rank: what is offloaded."""
    path: str = ""
    """The software path the numbers hold for, in words (loss, attention, recompute, prefetch)."""


class IllegalLayout(ValueError):
    """A layout no framework can run with this model: the message names the sizes that do not divide."""
