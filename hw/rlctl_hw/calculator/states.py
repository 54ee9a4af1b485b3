"""Weights, gradients and optimizer states of one rank, on the device and on the host. [arXiv:1910.02054]"""

from __future__ import annotations

from dataclasses import dataclass

from rlctl_hw import params
from rlctl_hw.calculator.sizes import BYTES, layer_params, table_params
from rlctl_hw.calculator.stages import Stage
from rlctl_hw.calculator.terms import Term
from rlctl_hw.setup import Setup

EIGHT_BIT_BLOCK = 256
"""Values that share one fp32 scale in bitsandbytes' 8-bit optimizers."""
ADAM_MOMENTS = 2


@dataclass(frozen=True)
class Held:
    """Parameters a rank computes with, after tensor and expert parallelism."""

    dense: float
    routed: float = 0.0
    """Of the rank's own experts."""

    @property
    def total(self) -> float:
        """Return all of them."""
        return self.dense + self.routed


@dataclass(frozen=True)
class States:
    """What a rank keeps from step to step."""

    weights: Term
    gradients: Term
    optimizer: Term
    host_bytes: float


def states(setup: Setup, stage: Stage) -> States:
    """Return weights, gradients and optimizer states of one rank of a stage."""
    held = held_params(setup, stage)
    trained = adapters(setup, stage) if setup.lora_rank else held
    if setup.task in ("logprob", "rollout"):
        trained = Held(0.0)
    return _fsdp(setup, held, trained) if setup.engine == "fsdp2" else _megatron(setup, held, trained)


def held_params(setup: Setup, stage: Stage) -> Held:
    """Return the parameters of a stage on one rank, before they are sharded over data-parallel ranks."""
    dense = tables(setup, stage) * table_params(setup) + stage.last * setup.shape.hidden_size
    if stage.num_dense:
        dense += stage.num_dense * layer_params(setup, moe=False).dense
    if not stage.num_moe:
        return Held(dense)
    layer = layer_params(setup, moe=True)
    return Held(dense + stage.num_moe * layer.dense, stage.num_moe * layer.routed / setup.mesh.ep)


def tables(setup: Setup, stage: Stage) -> int:
    """Return how many V*h tables a stage has; a tied one is copied to the last stage of a pipeline."""
    with_head = stage.last and not setup.critic
    if stage.first and with_head and setup.shape.tied:
        return 1
    return stage.first + with_head


def adapters(setup: Setup, stage: Stage) -> Held:
    """Return the LoRA pairs of a stage on one rank."""
    shape, rank = setup.shape, setup.lora_rank
    targets = params.ALL_LINEAR if setup.lora_targets == "linear" else ("q_proj", "v_proj")
    share = stage.num_layers / shape.num_layers / setup.mesh.tp
    dense = params.lora_params(shape, rank, targets, experts=False) * share
    routed = params.lora_params(shape, rank, targets) * share - dense
    return Held(dense, routed / setup.mesh.ep)


def moment_bytes(setup: Setup) -> float:
    """Return bytes of moments per trained parameter; sgd is without momentum."""
    width = {"adamw": BYTES[setup.optim_dtype], "adamw8bit": 1 + BYTES["float32"] / EIGHT_BIT_BLOCK, "sgd": 0.0}
    return ADAM_MOMENTS * width[setup.optimizer]


def optimizer_bytes(setup: Setup) -> tuple[float, str]:
    """Return bytes per trained parameter: moments, and an fp32 master copy where the model has less."""
    moments = moment_bytes(setup)
    if not has_master(setup):
        return moments, f"{moments:g} B of moments"
    copied_gradients = BYTES["float32"] if setup.engine == "megatron" and BYTES[setup.grad_dtype] < 4 else 0.0
    words = f"{moments:g} B of moments, 4 B of master weights" + (", 4 B of fp32 gradients" if copied_gradients else "")
    return moments + BYTES["float32"] + copied_gradients, words


def has_master(setup: Setup) -> bool:
    """Return whether the optimizer keeps fp32 copies of lower parameters (DeepSpeed, Megatron); torch's does not."""
    return setup.optim_dtype == "float32" and BYTES[setup.param_dtype] < BYTES["float32"]


def shards(setup: Setup) -> tuple[int, float]:
    """Return over how many ranks the states of dense and of routed parameters are spread."""
    mesh = setup.mesh
    if setup.engine == "megatron" and not setup.distributed_optimizer:
        return 1, 1.0
    ranks = mesh.dp_shard * mesh.cp
    return ranks, max(1.0, ranks * mesh.tp / (mesh.ep * mesh.etp))


def spread(setup: Setup, held: Held) -> float:
    """Return the parameters of a rank's shard."""
    dense, routed = shards(setup)
    return held.dense / dense + held.routed / routed


def _fsdp(setup: Setup, held: Held, trained: Held) -> States:
    """Everything is spread over the ranks; with offloaded parameters, gradients go to the host too."""
    frozen = 0.0 if trained.total == held.total else spread(setup, held)
    learning, per_param, words = spread(setup, trained), *optimizer_bytes(setup)
    over = f"over {shards(setup)[0]} ranks"
    param, grad = BYTES[setup.param_dtype], BYTES[setup.grad_dtype]
    weights = BYTES[setup.base_dtype or setup.param_dtype] * frozen + param * learning
    here = 0.0 if setup.param_offload else 1.0
    away = _moments_away(setup, per_param * learning)
    return States(
        Term("weights", here * weights, f"{param:g} B a parameter {over}"),
        Term("gradients", here * grad * learning, f"{grad:g} B a trained parameter {over}"),
        Term("optimizer", per_param * learning - away, f"{words} {over}"),
        (1 - here) * (weights + grad * learning) + away,
    )


def _megatron(setup: Setup, held: Held, trained: Held) -> States:
    """Weights and gradient buffers are whole on every data-parallel rank; the optimizer may be spread."""
    base = BYTES[setup.base_dtype or setup.param_dtype]
    per_param, words = optimizer_bytes(setup)
    frozen = 0.0 if trained.total == held.total else held.total
    weights = base * frozen + BYTES[setup.param_dtype] * trained.total
    away = _moments_away(setup, moment_bytes(setup) * spread(setup, trained))
    return States(
        Term("weights", weights, f"{BYTES[setup.param_dtype]:g} B a parameter, whole on every data-parallel rank"),
        Term("gradients", BYTES[setup.grad_dtype] * trained.total, f"{BYTES[setup.grad_dtype]:g} B, one flat buffer"),
        Term("optimizer", per_param * spread(setup, trained) - away, f"{words} over {shards(setup)[0]} ranks"),
        away,
    )


def _moments_away(setup: Setup, optimizer: float) -> float:
    return optimizer * setup.optim_offload_share if setup.optim_offload else 0.0
