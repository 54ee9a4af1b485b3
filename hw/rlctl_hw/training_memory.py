"""Bytes of the trainer's roles on one rank, by phase.

Letters: P parameters of a role, N trainer ranks, b bytes of the compute precision, T tokens of a micro-batch,
V vocabulary, h hidden size, f MLP size, q and kv widths of queries and of keys, L layers.
"""

from __future__ import annotations

from rlctl_hw.calculated import pass_needs, process_needs, rest_needs
from rlctl_hw.needs import (
    CPU_PROCESS_GIB,
    DTYPE_BYTES,
    FORWARD_ONLY,
    GIB,
    MASTER_BYTES,
    MIB,
    MOMENT_BYTES,
    Need,
    Phase,
)
from rlctl_hw.params import critic_params, lora_params
from rlctl_hw.types import DeviceKind, Dtype, Layout, ModelShape, Workload

SLOTS_PER_TOKEN, SLOTS_PER_TOKEN_PADDED = 2, 4
"""Attention places per token: responses share a prompt and attention does not; off CUDA and in float32 it also pads."""
PASSES = ("logprobs", "values", "actor_update", "critic_update")
UPDATES = ("actor_update", "critic_update", "optimizer_step")
CRITIC_AT_WORK = ("values", "critic_update")
COPIES_OF_OWN = 3
COMPARED_BYTES = 12
"""Per logit of a chunk, in fp32: probabilities, the reference's log-probabilities, the gradient of their KL."""
AT_REST = ("load", "generation")


def role_params(shape: ModelShape, role: str) -> int:
    """Return P; the critic has a value head [h, 1] in place of the output projection."""
    return critic_params(shape) if role == "critic" else shape.num_params


def trained_params(workload: Workload, role: str) -> int:
    """Return the parameters that the optimizer of a role updates."""
    if role in FORWARD_ONLY:
        return 0
    if workload.lora_rank:
        return lora_params(workload.shape, workload.lora_rank)
    return role_params(workload.shape, role)


def copied_bytes(role: str, workload: Workload, layout: Layout) -> float:
    """Return the bytes of the copy from which one rank writes checkpoints of a role: fp32 weights and two moments.

    A reference has no moments; it is copied where it changes.
    """
    if role not in workload.copied_roles:
        return 0.0
    saved = role_params(workload.shape_of(role), role) * MASTER_BYTES
    if role not in FORWARD_ONLY:
        saved = trained_params(workload, role) * (MASTER_BYTES + MOMENT_BYTES)
    return saved / layout.trainer_devices


def trainer_needs(phase: Phase, workload: Workload, layout: Layout) -> list[Need]:
    """Return what all trainer roles of one rank hold during a phase."""
    busy = busy_role(phase, workload)
    if layout.device != "cpu":
        return [need for role in workload.roles for need in role_needs(role, phase, role == busy, workload, layout)]
    needs = [Need("overhead", len(workload.roles) * CPU_PROCESS_GIB * GIB, "assumed")]
    for role in workload.roles:
        needs += _states(role, phase, role == busy, workload, layout)
    if busy is not None:
        needs += _working_set(busy, phase, workload, layout)
    return needs


def busy_role(phase: Phase, workload: Workload) -> str | None:
    """Return the trainer role that works in a phase; where several do, the one that takes most."""
    if phase in AT_REST:
        return None
    if phase in CRITIC_AT_WORK:
        return "critic" if "critic" in workload.roles else None
    teacher = workload.teacher
    if phase == "logprobs" and teacher is not None and teacher.num_params > workload.shape.num_params:
        return "teacher"
    return "actor"


def forward_bytes_per_token(shape: ModelShape, dtype: Dtype) -> float:
    """Return what one layer holds of a token at one time without gradients."""
    query, key_value = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    return _working_bytes(shape, dtype) + DTYPE_BYTES[dtype] * (shape.hidden_size + 2 * query + 2 * key_value)


def bucket_bytes(workload: Workload, width: int) -> float:
    """Return the size of a bucket of weights of `width` bytes each; a larger tensor is a bucket of its own."""
    bucket = min(workload.bucket_mib * MIB, workload.shape.num_params * MASTER_BYTES)
    return max(bucket, largest_tensor(workload.shape) * width)


def largest_tensor(shape: ModelShape) -> int:
    """Return the numbers in the largest tensor of the model."""
    return shape.hidden_size * max(shape.vocab_size, shape.intermediate_size, shape.num_heads * shape.head_dim)


def largest_tensor_bytes(workload: Workload, compute_dtype: Dtype) -> float:
    """Return the bytes of the largest weight as the trainer holds it.

    Under LoRA the tables are frozen, and a linear layer is merged with its adapter in float32.
    """
    shape = workload.shape
    width = DTYPE_BYTES[compute_dtype] if workload.lora_rank else MASTER_BYTES
    return max(shape.hidden_size * shape.vocab_size * width, _layer_tensor_bytes(shape))


def _layer_tensor_bytes(shape: ModelShape) -> float:
    """Return the bytes of the largest weight inside a layer, in float32."""
    return shape.hidden_size * max(shape.intermediate_size, shape.num_heads * shape.head_dim) * MASTER_BYTES


def own_tokens(backward: bool, workload: Workload, layout: Layout) -> int:
    """Return the tokens of one pass: the budget, or all that a rank has to do where that is less."""
    return min(layout.max_tokens_per_micro_batch, rank_tokens(backward, workload, layout))


def rank_tokens(backward: bool, workload: Workload, layout: Layout) -> int:
    """Return the most tokens that a data-parallel rank may have to pass over, between two optimizer steps if any."""
    sequences = workload.mini_batch_sequences if backward else workload.step_sequences
    return -(-sequences // layout.mesh.dp_shard) * workload.longest_tokens


def distributions(phase: Phase, workload: Workload, layout: Layout) -> float:
    """Return the bytes that one rank's process has of a step's distributions in host memory, if they are compared.

    It makes those of its own rows, once as a pass answers, once in their places and once for the batch; an update takes
    everyone's and makes its own rows of them, likewise.
    """
    whole = workload.distribution_bytes
    own = COPIES_OF_OWN * whole / layout.trainer_devices
    return {"logprobs": own, "actor_update": whole + own}.get(phase, 0.0)


def role_needs(role: str, phase: Phase, busy: bool, workload: Workload, layout: Layout) -> list[Need]:
    """Return what the process of one role holds on one accelerator."""
    kept = _kept(role, phase, busy, workload, layout)
    if not busy or phase not in PASSES:
        extra = [_exchange(role, phase, workload, layout)] if busy else []
        return [*process_needs(workload, layout), *kept, *extra]
    backward = phase in UPDATES
    tokens = own_tokens(backward, workload, layout)
    num_passes = -(-rank_tokens(backward, workload, layout) // tokens)
    working = pass_needs(
        role, backward=backward, tokens=tokens, num_passes=num_passes, workload=workload, layout=layout
    )
    # An update's pass counts its own states at the moment of its peak; a forward pass counts the weights alone.
    beside = [] if backward else [need for need in kept if need.part != "weights"]
    compared = Need("logits", _compared_bytes(role, backward, tokens, workload))
    return [*beside, *working, _shared_prompts(tokens, backward, workload, layout), compared]


def _kept(role: str, phase: Phase, busy: bool, workload: Workload, layout: Layout) -> list[Need]:
    """Return weights, gradients and moments that are on the device in a phase."""
    rest, savings = rest_needs(role, workload, layout), layout.savings
    megatron = workload.engine == "megatron"
    # Weights are sent from where they lie, one at a time.
    if savings.offload_params and (not busy or phase == "weight_sync"):
        rest.pop("weights", None)
        rest.pop("gradients", None)
    if not megatron and not (busy and phase in UPDATES):
        rest.pop("gradients", None)
    stepping = busy and (phase in UPDATES if megatron else phase == "optimizer_step")
    if phase == "load" or (savings.offload_optimizer and not stepping):
        rest.pop("optimizer", None)
    return list(rest.values())


def _exchange(role: str, phase: Phase, workload: Workload, layout: Layout) -> Need:
    """Return the buffers of a phase in which weights move or are stepped."""
    if phase == "checkpoint":
        return Need("buffers", largest_tensor_bytes(workload, layout.compute_dtype))
    if phase == "weight_sync":
        # The largest tensor and the bucket before it, and then its copy in another precision.
        largest = largest_tensor_bytes(workload, layout.compute_dtype)
        bucket = min(workload.bucket_mib * MIB, workload.shape.num_params * MASTER_BYTES)
        cast = largest / 2 if layout.rollout_dtype == "bfloat16" and not workload.lora_rank else 0.0
        return Need("buffers", largest + max(bucket, cast, _layer_tensor_bytes(workload.shape)))
    # AdamW over lists of tensors makes a temporary copy of the parameters' size where it has no fused kernel.
    unfused = trained_params(workload, role) / layout.trainer_devices if layout.device == "ascend" else 0.0
    return Need("buffers", unfused * MASTER_BYTES)


def _shared_prompts(tokens: int, backward: bool, workload: Workload, layout: Layout) -> Need:
    """Return the further places that attention keeps where responses share a prompt that the other layers see once."""
    slots = _slots(workload, layout.device, layout.compute_dtype) - 1 if workload.engine == "fsdp2" else 0
    shape = workload.shape
    width = 2 * (shape.num_heads + shape.num_kv_heads) * shape.head_dim * DTYPE_BYTES[layout.compute_dtype]
    layers = shape.num_layers if backward and layout.savings.recompute == "none" else 1
    return Need("activations", slots * width * layers * tokens)


def _states(role: str, phase: Phase, busy: bool, workload: Workload, layout: Layout) -> list[Need]:
    """Return weights, gradients and moments: 4 + 4 + 8 bytes a trained parameter, over N ranks, and what is copied.

    Under LoRA the other weights are frozen, in the compute precision. On CPU nothing can be moved elsewhere.
    """
    ranks = layout.trainer_devices
    trained = trained_params(workload, role) / ranks
    return [
        Need("weights", weight_bytes(role, workload, layout) / ranks),
        Need("gradients", trained * MASTER_BYTES if busy and phase in UPDATES else 0.0),
        Need("optimizer", trained * MOMENT_BYTES),
        Need("checkpoint_copy", copied_bytes(role, workload, layout)),
    ]


def weight_bytes(role: str, workload: Workload, layout: Layout) -> float:
    """Return the bytes of one copy of a role's weights; Megatron's masters count as optimizer state."""
    whole = role_params(workload.shape_of(role), role)
    if workload.engine == "megatron":
        return whole * DTYPE_BYTES[layout.compute_dtype]
    if not workload.rank_of(role):
        return whole * MASTER_BYTES
    return whole * DTYPE_BYTES[layout.compute_dtype] + trained_params(workload, role) * MASTER_BYTES


def _working_set(role: str, phase: Phase, workload: Workload, layout: Layout) -> list[Need]:
    if phase not in PASSES:
        return [_exchange(role, phase, workload, layout)]
    backward = phase in UPDATES
    tokens = own_tokens(backward, workload, layout)
    return [
        Need("buffers", _gathered(role, backward, workload, layout)),
        Need("activations", tokens * _activation_bytes_per_token(role, backward, workload, layout)),
        Need("logits", 0.0 if role == "critic" else _logits_bytes(tokens, backward, workload, layout.compute_dtype)),
        Need("logits", _compared_bytes(role, backward, tokens, workload)),
        Need("buffers", distributions(phase, workload, layout)),
    ]


def _gathered(role: str, backward: bool, workload: Workload, layout: Layout) -> float:
    """Return unsharded parameters and gradients: the layer at work, the next one, embedding and head.

    One rank that computes in float32 has nothing to gather or to cast. Frozen weights have no gradients.
    """
    shape, width = workload.shape_of(role), DTYPE_BYTES[layout.compute_dtype]
    params = role_params(shape, role)
    root = _root_params(shape, role)
    layer = (params - root) / shape.num_layers
    learning = layer + root if not workload.lora_rank else trained_params(workload, role) / shape.num_layers
    gradients = learning * (width + MASTER_BYTES) if backward else 0.0
    if layout.trainer_devices == 1 and width == MASTER_BYTES:
        return gradients
    gathered = 2 * layer + root if layout.savings.reshard_after_forward else params
    return gathered * width + gradients


def _root_params(shape: ModelShape, role: str) -> int:
    tables = 1 if shape.tied or role == "critic" else 2
    return tables * shape.vocab_size * shape.hidden_size + shape.hidden_size


def _activation_bytes_per_token(role: str, backward: bool, workload: Workload, layout: Layout) -> float:
    """Return what autograd keeps per token, counted over the tensors of transformers' decoder layer.

    Each norm keeps an fp32 copy of its input and two results (4h + 2bh); attention keeps queries, keys, values and
    a result per slot (b(2q + 2kv)) and the result per token (bq); the gated MLP keeps four tensors of its width
    (4bf). In bfloat16 a small Qwen2 layer measured 3032 bytes where this gives 3072.
    """
    shape, dtype = workload.shape_of(role), layout.compute_dtype
    width = DTYPE_BYTES[dtype]
    if not backward:
        return forward_bytes_per_token(shape, dtype)
    hidden, working = shape.hidden_size, _working_bytes(shape, dtype)
    query, key_value = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    attention = width * (_slots(workload, layout.device, dtype) * 2 * (query + key_value) + query)
    layer = 2 * (4 * hidden + 2 * width * hidden) + attention + 4 * width * _mlp_width(shape)
    last_norm = 4 * hidden + 2 * width * hidden
    if layout.savings.recompute == "full":
        return shape.num_layers * width * hidden + layer + last_norm + working
    return shape.num_layers * layer + last_norm + working


def _slots(workload: Workload, device: DeviceKind, dtype: Dtype) -> int:
    dense = device == "cuda" and dtype == "bfloat16"
    return min(workload.group_size, SLOTS_PER_TOKEN if dense else SLOTS_PER_TOKEN_PADDED)


def _working_bytes(shape: ModelShape, dtype: Dtype) -> float:
    hidden = shape.hidden_size
    return 4 * hidden + DTYPE_BYTES[dtype] * (3 * _mlp_width(shape) + 2 * hidden)


def _mlp_width(shape: ModelShape) -> int:
    """Return the MLP width that one token passes through in the widest layer."""
    experts = shape.experts
    if experts is None:
        return shape.intermediate_size
    routed = experts.experts_per_token * experts.expert_size + experts.shared_size
    return max(routed, shape.intermediate_size if experts.num_layers < shape.num_layers else 0)


def _logits_bytes(tokens: int, backward: bool, workload: Workload, dtype: Dtype) -> float:
    """Return one chunk's logits: as computed, in fp32, as log-softmax and, going backward, two gradients more."""
    per_logit = DTYPE_BYTES[dtype] + (5 if backward else 3) * 4
    return min(tokens, workload.logits_chunk_tokens) * workload.shape.vocab_size * per_logit


def _compared_bytes(role: str, backward: bool, tokens: int, workload: Workload) -> float:
    """Return what one chunk takes beside its logits where the policy's distributions are compared with others."""
    if not (workload.full_kl and backward and role == "actor"):
        return 0.0
    return min(tokens, workload.logits_chunk_tokens) * workload.shape.vocab_size * COMPARED_BYTES
