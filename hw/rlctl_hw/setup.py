"""What the memory calculator is asked, for any framework: one model, one task, one layout; and what it answers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from rlctl_hw.types import DeviceKind, EngineName, Mesh, ModelShape, Origin, Recompute

Task = Literal["sft", "update", "logprob", "rollout"]
LossPath = Literal["plain", "chunked", "fused"]
Attention = Literal["flash", "eager"]
Optimizer = Literal["adamw", "adamw8bit", "sgd"]
WeightDtype = Literal["float32", "bfloat16", "float16", "float8", "nf4"]


@dataclass(frozen=True)
class Setup:
    """One engine's work on one model: everything that decides its memory."""

    shape: ModelShape
    engine: EngineName
    task: Task
    mesh: Mesh = field(default_factory=Mesh)
    seq_len: int = 4096
    micro_batch: int = 1
    """Sequences of `seq_len` tokens in one micro-batch; for rollout, sequences decoded at one time."""
    num_micro_batches: int = 1
    """Micro-batches of one optimizer step and data-parallel rank (a pipeline holds several at one time)."""
    recompute: Recompute = "none"
    loss: LossPath = "plain"
    fp32_logits: Literal["none", "dropped", "held"] | None = None
    """Of a plain loss: there is no fp32 copy of the logits, the loss drops it, or the caller holds it through the
    backward pass; None where that is not known."""
    compiled_loss: bool = False
    """A plain loss under torch.compile."""
    logits_chunk_tokens: int = 1024
    """Tokens per chunk of a chunked loss."""
    attention: Attention = "flash"
    param_dtype: WeightDtype = "float32"
    """Of the parameters the optimizer updates (FSDP2: the sharded ones; Megatron: the model's, masters are apart)."""
    compute_dtype: WeightDtype = "bfloat16"
    grad_dtype: WeightDtype = "float32"
    optim_dtype: WeightDtype = "float32"
    optimizer: Optimizer = "adamw"
    distributed_optimizer: bool = True
    """Megatron: data- and context-parallel ranks share the optimizer's states."""
    grouped_experts: bool = True
    """Megatron: experts run as one grouped product, with a workspace for each of its streams."""
    param_offload: bool = False
    optim_offload: bool = False
    optim_offload_share: float = 1.0
    activation_offload: bool = False
    """Layer inputs kept for recomputation wait in host memory."""
    lora_rank: int = 0
    """0 trains every parameter."""
    lora_targets: Literal["linear", "attention"] = "linear"
    """Every projection of a layer, or query and value only."""
    base_dtype: WeightDtype | None = None
    """Of the frozen weights under LoRA; None is `param_dtype`."""
    reshard_after_forward: bool = True
    """False keeps what FSDP2 gathered, and gradients whole until the last micro-batch (usual beside a pipeline)."""
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
