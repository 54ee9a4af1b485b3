"""The nouns of the survey and the planner: frozen facts in, frozen plan out, both plain JSON when written."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Origin = Literal["measured", "formula", "interpolated", "assumed"]


@dataclass(frozen=True)
class Fact:
    """One observed value with where it came from; `value` is None and `error` set when it is unknown."""

    value: Any
    source: str
    error: str | None = None


@dataclass(frozen=True)
class Device:
    """One accelerator, or the CPU of a host without any."""

    kind: Literal["cuda", "rocm", "ascend", "cpu"]
    index: int
    name: str
    memory_gib: float
    uuid: str | None = None
    compute_capability: str | None = None


@dataclass(frozen=True)
class Hardware:
    """What is there: the devices of one node, how many such nodes, and the host's limits."""

    devices: tuple[Device, ...]
    num_nodes: int
    cpu_cores: int
    host_memory_gib: float
    shm_gib: float
    facts: dict[str, Fact] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """Return the kind of every device of the node: cuda, rocm, ascend or cpu."""
        return self.devices[0].kind


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a decoder; `num_params` counts tied embeddings once."""

    architecture: str
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    tied: bool
    num_params: int


@dataclass(frozen=True)
class MemoryPart:
    """One part of one phase's memory on the fullest device, in GiB."""

    phase: str
    part: str
    gib: float
    origin: Origin


@dataclass(frozen=True)
class Choice:
    """One number the planner set, with the reason in words."""

    key: str
    value: Any
    reason: str
    origin: Origin


@dataclass(frozen=True)
class Plan:
    """What follows from a workload and the hardware. The controller reads these numbers and derives none."""

    device: Literal["cuda", "rocm", "ascend", "cpu"]
    num_nodes: int
    trainer_devices: int
    """Trainer ranks."""
    rollout_devices: int
    """Devices that generate, over all rollout engines."""
    threads_per_worker: int
    compute_dtype: Literal["float32", "bfloat16"]
    rollout_dtype: Literal["float32", "bfloat16"]
    max_tokens_per_micro_batch: int
    rollout_max_concurrent: int
    rollout_gpu_memory_share: float
    object_store_gib: float
    memory: tuple[MemoryPart, ...] = ()
    choices: tuple[Choice, ...] = ()
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return the plan as plain JSON values."""
        return asdict(self)

    @staticmethod
    def from_json(data: dict[str, Any]) -> Plan:
        """Read a plan back from `to_json`."""
        fields = dict(data)
        fields["memory"] = tuple(MemoryPart(**part) for part in data["memory"])
        fields["choices"] = tuple(Choice(**choice) for choice in data["choices"])
        fields["notes"] = tuple(data["notes"])
        return Plan(**fields)


class DoesNotFit(Exception):
    """The workload cannot run on this hardware; `remedies` are the nearest settings that would."""

    def __init__(self, what: str, remedies: tuple[str, ...]) -> None:
        super().__init__(what)
        self.what = what
        self.remedies = remedies
