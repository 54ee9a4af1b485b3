"""The nouns of the survey and the planner: frozen facts in, frozen plan out, both plain JSON when written."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Origin = Literal["measured", "formula", "interpolated", "assumed"]
DeviceKind = Literal["cuda", "rocm", "ascend", "cpu"]
Dtype = Literal["float32", "bfloat16"]
EngineName = Literal["fsdp2", "megatron"]
Recompute = Literal["none", "selective", "full"]
Placement = Literal["colocated", "split"]


@dataclass(frozen=True)
class Fact:
    """One observed value with where it came from; `value` is None and `error` set when it is unknown."""

    value: Any
    source: str
    error: str | None = None


@dataclass(frozen=True)
class Device:
    """One accelerator, or the CPU of a host without any."""

    kind: DeviceKind
    index: int
    name: str
    memory_gib: float
    uuid: str | None = None
    compute_capability: str | None = None
    """CUDA only."""
    catalogue: str | None = None
    """Key in `devices.toml`; None for a device that is not in it."""
    architecture: str | None = None
    """`gfx942` on ROCm, the SoC on Ascend."""
    partition: str | None = None
    """MIG profile, AMD compute partition (`CPX`) or die, where the device is part of a package."""
    pci: str | None = None
    """Address on the PCI bus."""


@dataclass(frozen=True)
class Link:
    """How two devices of a node reach each other; `first` and `second` are places in `Hardware.devices`."""

    first: int
    second: int
    kind: str
    """As the vendor says: NV18, XGMI, HCCS, SIO, PIX, PXB, PHB, NODE, SYS."""


@dataclass(frozen=True)
class Nic:
    """One active network port for collectives."""

    name: str
    rate_gb_per_s: float | None = None
    """1e9 bytes per second, one direction."""
    link_layer: str | None = None
    """InfiniBand or Ethernet."""


@dataclass(frozen=True)
class Corrections:
    """What was measured on this machine, in place of the catalogue's and the assumed; None leaves one as it is."""

    matmul_tflops: float | None = None
    """1e12 operations per second that large matrix products reach on one device, in the precision of training."""
    bandwidth_gb_per_s: float | None = None
    """1e9 bytes per second of a device's memory that a copy reads and writes."""
    overhead_factor: float | None = None
    """Measured over assumed memory of processes: context, communication, runtime."""
    time_factors: dict[str, float] = field(default_factory=dict)
    """Measured over roofline time, by phase."""


@dataclass(frozen=True)
class Hardware:
    """What is there: the devices of one node, how many such nodes, and the host's limits."""

    devices: tuple[Device, ...]
    num_nodes: int
    cpu_cores: int
    host_memory_gib: float
    shm_gib: float
    facts: dict[str, Fact] = field(default_factory=dict)
    links: tuple[Link, ...] = ()
    islands: tuple[tuple[int, ...], ...] = ()
    """Places of devices joined by NVLink, xGMI or HCCS; empty when unknown. Tensor parallelism stays inside one."""
    nics: tuple[Nic, ...] = ()
    corrections: Corrections = Corrections()

    @property
    def kind(self) -> DeviceKind:
        """Return the kind of every device of the node: cuda, rocm, ascend or cpu."""
        return self.devices[0].kind


@dataclass(frozen=True)
class Experts:
    """The mixture-of-experts layers of a decoder."""

    num_experts: int
    experts_per_token: int
    expert_size: int
    """MLP width of one expert."""
    shared_size: int
    """MLP width of all shared experts together; 0 where there are none."""
    num_layers: int
    """Layers that have experts; the others have a dense MLP."""
    router_bias: bool = False
    """The router keeps a correction per expert (DeepSeek-V3, GLM-4.5)."""
    shared_gate: bool = False
    """The shared experts are weighed by a gate of their own (Qwen2-MoE)."""
    expert_bias: bool = False
    """Each expert's projections have biases (GPT-OSS)."""


@dataclass(frozen=True)
class LatentAttention:
    """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434): ranks and head sizes."""

    kv_rank: int
    nope_dim: int
    rope_dim: int
    value_dim: int
    query_rank: int | None = None


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a decoder; `num_params` counts tied embeddings once. With latent attention every head has its own
    key and value, and `head_dim` is that of a query: its part without and with position."""

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
    max_position: int | None = None
    """Longest sequence the model accepts, in tokens; None where its config does not say."""
    active_params: int = 0
    """Parameters one token passes through; `num_params` for a dense model."""
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    sinks: bool = False
    """Every head has a learned logit that takes attention away (GPT-OSS)."""
    norms_per_layer: int = 2
    """Of the hidden size; Gemma has 4."""
    gated_mlp: bool = True
    experts: Experts | None = None
    latent: LatentAttention | None = None
    sliding_window: int | None = None
    """Tokens that windowed layers look back."""
    num_windowed_layers: int = 0
    exact: bool = True
    """False where the number of parameters was read from the weights' index and the shapes are approximate."""


@dataclass(frozen=True)
class Pins:
    """What the user fixed; None leaves a number to the planner. A pin is kept or refused, never changed."""

    compute_dtype: Dtype | None = None
    rollout_dtype: Dtype | None = None
    trainer_devices: int | None = None
    rollout_devices: int | None = None
    threads_per_worker: int | None = None
    max_tokens_per_micro_batch: int | None = None
    max_concurrent: int | None = None
    """Sequences one rollout engine decodes at one time."""
    gpu_memory_share: float | None = None
    object_store_gib: float | None = None
    recompute: Recompute | None = None
    offload_params: bool | None = None
    offload_optimizer: bool | None = None
    reshard_after_forward: bool | None = None
    host_optimizer_share: float | None = None
    rollout_tensor_parallel: int | None = None
    tensor_parallel: int | None = None
    pipeline_parallel: int | None = None
    context_parallel: int | None = None
    expert_parallel: int | None = None
    sequence_parallel: bool | None = None


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
    uneven_stages: bool = False
    """Let the last pipeline stage have fewer layers where the layers do not divide."""

    @property
    def world_size(self) -> int:
        """Return the number of devices."""
        return self.dp_replicate * self.dp_shard * self.tp * self.pp * self.cp


@dataclass(frozen=True)
class Savings:
    """What a training engine does to need less device memory, at the price of time."""

    recompute: Recompute = "none"
    """Activations computed anew in the backward pass."""
    offload_params: bool = False
    """Parameters lie in host memory while the engine is not in use."""
    offload_optimizer: bool = False
    """Optimizer state lies in host memory: FSDP2 between optimizer steps, Megatron while the engine is not in use."""
    reshard_after_forward: bool = True
    """FSDP2: gathered parameters are freed after each layer's forward pass."""
    host_optimizer_share: float = 0.0
    """Megatron: share of the moments that stay in host memory, where their step is taken."""


@dataclass(frozen=True)
class Workload:
    """What is asked of the hardware: the model, the algorithm's roles, batch sizes and lengths, and the pins."""

    shape: ModelShape
    roles: tuple[str, ...]
    """Models in training or in use beside the rollout engine: actor, critic, reference, teacher,
    reward_model (a language model that is trained)."""
    group_size: int
    prompts_per_step: int
    mini_batches: int
    """Optimizer steps per pass over a step's batch."""
    max_prompt_tokens: int
    max_response_tokens: int
    rollout: Literal["hf", "vllm"] = "hf"
    placement: Placement = "colocated"
    engine: EngineName = "fsdp2"
    bucket_mib: float = 256.0
    kv_cache_gib: float = 1.0
    """KV cache of vLLM on CPU."""
    logits_chunk_tokens: int = 1024
    lora_rank: int = 0
    """0 trains every parameter."""
    has_reference: bool | None = None
    """Log-probabilities of a reference are asked for, also where the actor without its adapters gives them; None
    follows `roles`."""
    epochs: int = 1
    """Passes of the update over a step's batch."""
    rollout_needed: bool = True
    """False for supervised training, which samples nothing."""
    mean_response_tokens: int | None = None
    """Expected length of a response; unset assumes a share of the longest."""
    teacher: ModelShape | None = None
    """Shape of the teacher; None where there is none."""
    has_old_logprobs: bool | None = None
    """The policy's own log-probabilities are computed before the update; None follows the number of updates."""
    reads_ahead: bool = False
    """The update reads each mini-batch once before, without gradients."""
    greedy_responses: int = 0
    """Further responses to each prompt, sampled by themselves to compare with."""
    max_rounds: int = 1
    """The most times a step may generate."""
    full_kl: bool = False
    """The KL loss compares whole distributions: the reference's travel with the batch."""
    copied_roles: tuple[str, ...] = ()
    """Roles of whose saved state the host keeps a copy: checkpoints are written while training goes on."""
    pins: Pins = Pins()

    def shape_of(self, role: str) -> ModelShape:
        """Return the shape of a role's model: the run's own, or the teacher's."""
        return self.teacher if role == "teacher" and self.teacher is not None else self.shape

    def rank_of(self, role: str) -> int:
        """Return the rank of a role's adapters; 0 where it has none, as a teacher never has."""
        return 0 if role == "teacher" else self.lora_rank

    @property
    def longest_tokens(self) -> int:
        """Return the length of the longest possible sequence, prompt and response."""
        return self.max_prompt_tokens + self.max_response_tokens

    @property
    def step_sequences(self) -> int:
        """Return the number of sequences of one step."""
        return self.prompts_per_step * self.group_size

    @property
    def mini_batch_sequences(self) -> int:
        """Return the number of sequences of one optimizer step."""
        return max(1, self.step_sequences // self.mini_batches)

    @property
    def reference_needed(self) -> bool:
        """Return whether a reference's log-probabilities are asked for."""
        return "reference" in self.roles if self.has_reference is None else self.has_reference

    @property
    def distribution_bytes(self) -> int:
        """Return the bytes of one step's distributions: a float32 a response token and token of the vocabulary."""
        return 4 * self.step_sequences * self.max_response_tokens * self.shape.vocab_size if self.full_kl else 0

    @property
    def old_logprobs_needed(self) -> bool:
        """Return whether the policy's own log-probabilities are computed before the update."""
        if self.has_old_logprobs is not None:
            return self.has_old_logprobs
        return self.rollout_needed and self.mini_batches * self.epochs > 1


@dataclass(frozen=True)
class Layout:
    """Everything the memory model must know beside the workload: who runs where, how precisely, how much at once."""

    device: DeviceKind
    memory_gib: float
    """Of the smallest device; on CPU the host's, which all workers share."""
    trainer_devices: int
    rollout_devices: int
    compute_dtype: Dtype
    rollout_dtype: Dtype
    max_tokens_per_micro_batch: int
    max_concurrent: int
    gpu_memory_share: float
    mesh: Mesh
    """Of the trainer ranks."""
    savings: Savings = Savings()
    rollout_tensor_parallel: int = 1
    """Devices of one rollout engine, or of one of its pipeline stages."""
    rollout_pipeline_parallel: int = 1
    """Islands over which one rollout engine splits its layers."""
    catalogue: str | None = None
    """Key of the device in `devices.toml`."""
    overhead_factor: float | None = None
    """Of `Corrections`."""


@dataclass(frozen=True)
class MemoryPart:
    """One part of one phase's memory on the fullest device, in GiB."""

    phase: str
    part: str
    gib: float
    origin: Origin


@dataclass(frozen=True)
class PhaseBand:
    """What a phase takes on the fullest device with the range it is expected in, in GiB."""

    phase: str
    gib: float
    low_gib: float
    high_gib: float


@dataclass(frozen=True)
class PhaseTime:
    """How long a phase of one step takes, in seconds: by roofline, and the range in which it is expected."""

    phase: str
    seconds: float
    low_s: float
    high_s: float
    why: str
    roofline_s: float
    """The least that the machine could do."""
    origin: Origin = "assumed"
    per_step: bool = True
    """False for what happens at other times (checkpoints)."""


@dataclass(frozen=True)
class PassFlops:
    """Operations of a forward pass of one role: `per_token` for each token, `per_square` for each squared length."""

    role: str
    per_token: float
    per_square: float

    def of(self, tokens: float, squares: float) -> float:
        """Return the operations for tokens, and the sum of the squared lengths of their sequences."""
        return self.per_token * tokens + self.per_square * squares


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

    device: DeviceKind
    num_nodes: int
    trainer_devices: int
    """Trainer ranks."""
    rollout_devices: int
    """Devices that generate, over all rollout engines."""
    threads_per_worker: int
    compute_dtype: Dtype
    rollout_dtype: Dtype
    max_tokens_per_micro_batch: int
    rollout_max_concurrent: int
    rollout_gpu_memory_share: float
    object_store_gib: float
    placement: Placement = "colocated"
    engine: EngineName = "fsdp2"
    mesh: Mesh = Mesh()
    """Of the trainer ranks."""
    savings: Savings = Savings()
    rollout_tensor_parallel: int = 1
    """Devices of one rollout engine, or of one of its pipeline stages."""
    rollout_pipeline_parallel: int = 1
    """Islands over which one rollout engine splits its layers; only planned for beside Megatron."""
    device_memory_gib: float = 0.0
    """Memory of the smallest device; on CPU the host's, which all workers share."""
    memory: tuple[MemoryPart, ...] = ()
    bands: tuple[PhaseBand, ...] = ()
    """Each phase's total with its range."""
    host_memory: tuple[MemoryPart, ...] = ()
    """What the run takes of one node's memory; on CPU that is `memory`."""
    times: tuple[PhaseTime, ...] = ()
    """Empty where the device's speed is not known."""
    pass_flops: tuple[PassFlops, ...] = ()
    """One a role."""
    peak_tflops: float | None = None
    """Of one device in the compute precision, by its sheet; None where nobody says."""
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
        fields["bands"] = tuple(PhaseBand(**band) for band in data["bands"])
        fields["host_memory"] = tuple(MemoryPart(**part) for part in data["host_memory"])
        fields["times"] = tuple(PhaseTime(**time) for time in data["times"])
        fields["pass_flops"] = tuple(PassFlops(**one) for one in data["pass_flops"])
        fields["choices"] = tuple(Choice(**choice) for choice in data["choices"])
        fields["notes"] = tuple(data["notes"])
        fields["mesh"] = Mesh(**data["mesh"])
        fields["savings"] = Savings(**data["savings"])
        return Plan(**fields)


class DoesNotFit(Exception):
    """The workload cannot run on this hardware; `remedies` are the nearest settings that would.

    Where device memory is what lacks, `phase` needs `need_gib`, which is `short_gib` more than may be planned for.
    """

    def __init__(
        self,
        what: str,
        remedies: tuple[str, ...],
        *,
        short_gib: float | None = None,
        phase: str | None = None,
        need_gib: float | None = None,
    ) -> None:
        super().__init__(what)
        self.what = what
        self.remedies = remedies
        self.short_gib = short_gib
        self.phase = phase
        self.need_gib = need_gib
