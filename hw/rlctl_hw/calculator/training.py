"""The moments of an optimizer step at which memory may peak: loss, backward of a layer, end of backward, update."""

from __future__ import annotations

from rlctl_hw.calculator import activations, gathered, overheads
from rlctl_hw.calculator.logits import logits
from rlctl_hw.calculator.sizes import BYTES
from rlctl_hw.calculator.stages import Stage
from rlctl_hw.calculator.states import adapters, held_params, spread, states
from rlctl_hw.calculator.terms import Moment, Term
from rlctl_hw.setup import Setup


def moments(setup: Setup, stage: Stage) -> tuple[Moment, ...]:
    """Return the moments of one stage's rank."""
    return _fsdp(setup, stage) if setup.engine == "fsdp2" else _megatron(setup, stage)


def _fsdp(setup: Setup, stage: Stage) -> tuple[Moment, ...]:
    own = states(setup, stage)
    always = (own.weights, own.optimizer, overheads.workspace(setup), _pipeline_buffers(setup, stage))
    # Gradients of an earlier micro-batch are there from the start; those of this one grow as activations go.
    earlier = (own.gradients,) if setup.num_micro_batches > 1 else ()
    whole = gathered.accumulated_gradients(setup, stage)
    layer_gradients = gathered.reduced_gradients(setup, gathered.largest_layer(setup, stage))
    in_backward = whole + layer_gradients + gathered.root_gradients(setup, stage)
    root = gathered.root_params(setup, stage)
    return (
        Moment("loss", (*always, *earlier, *_kept(setup, stage), logits(setup, stage), _buffers(setup, stage, whole))),
        Moment(
            "backward",
            (*always, *earlier, *_in_backward(setup, stage), _buffers(setup, stage, in_backward)),
        ),
        Moment(
            "end of backward",
            (*always, own.gradients, _layer_alone(setup, stage),
             _buffers(setup, stage, whole + gathered.reduced_gradients(setup, root))),
        ),
        Moment("update", (own.weights, own.gradients, own.optimizer, _update_copy(setup, stage))),
    )  # fmt: skip


def _megatron(setup: Setup, stage: Stage) -> tuple[Moment, ...]:
    own = states(setup, stage)
    always = (own.weights, own.gradients, own.optimizer, overheads.workspace(setup))
    return (
        Moment("loss", (*always, *_kept(setup, stage), logits(setup, stage))),
        Moment("backward", (*always, *_in_backward(setup, stage))),
        Moment("end of backward", (*always, _layer_alone(setup, stage), _table_gradient(setup, stage))),
    )


def _kept(setup: Setup, stage: Stage) -> tuple[Term, ...]:
    """Return what all micro-batches in flight keep, with the last norm's tensors."""
    if setup.activation_offload and setup.recompute == "full":
        layers, words = 0.0, "layer inputs wait on the host"
    else:
        layers = _layers_bytes(setup, stage) * stage.in_flight
        words = f"{stage.num_layers} layers x {stage.in_flight:g} micro-batches, recompute {setup.recompute}"
    end = _last_norm(setup) if stage.last else 0.0
    return (Term("activations", layers + end, words),)


def _in_backward(setup: Setup, stage: Stage) -> tuple[Term, ...]:
    """Return what is kept, with the layer at work recomputed and its gradients in flight."""
    (kept,) = _kept(setup, stage)
    end = _last_norm(setup) if stage.last else 0.0
    work = _working_layer(setup, stage)
    words = f"{kept.why}, and one layer at work"
    return (Term("activations", kept.num_bytes - end + work, words),)


def _layer_alone(setup: Setup, stage: Stage) -> Term:
    others = max(0.0, stage.in_flight - 1) * _layers_bytes(setup, stage)
    if setup.activation_offload and setup.recompute == "full":
        others = 0.0
    work = max(_layer_at_work(setup, moe) for moe in stage.kinds) * activations.tokens(setup)
    return Term("activations", others + work, "the first layer at work, and other micro-batches in flight")


def _working_layer(setup: Setup, stage: Stage) -> float:
    """Return what a layer at work has beyond what it kept."""
    needs = (_layer_at_work(setup, moe) - activations.kept(setup, moe=moe) for moe in stage.kinds)
    return max(needs) * activations.tokens(setup)


def _layer_at_work(setup: Setup, moe: bool) -> float:
    """Return the bytes per token of a layer in its backward pass: all it keeps, gradients, whole inputs."""
    in_flight = activations.backward_extra(setup, moe=moe) + activations.gathered_inputs(setup)
    return activations.full_layer(setup, moe=moe) + in_flight


def _layers_bytes(setup: Setup, stage: Stage) -> float:
    counts = {False: stage.num_dense, True: stage.num_moe}
    per_token = sum(counts[moe] * activations.kept(setup, moe=moe) for moe in stage.kinds)
    return per_token * activations.tokens(setup)


def _last_norm(setup: Setup) -> float:
    return activations.last_norm(setup) * activations.tokens(setup)


def _buffers(setup: Setup, stage: Stage, gradients: float) -> Term:
    params = gathered.parameters(setup, stage)
    most = gathered.limit(setup, stage)
    return Term("buffers", min(params.num_bytes + gradients, most), f"{params.why}; whole gradients on their way")


def _pipeline_buffers(setup: Setup, stage: Stage) -> Term:
    """torch.distributed.pipelining makes a buffer for every micro-batch that a chunk receives, of activations and of
    gradients, and keeps the results of those in flight."""
    if setup.mesh.pp == 1:
        return Term("buffers", 0.0, "no pipeline")
    received = setup.num_micro_batches * ((not stage.first) + (not stage.last)) * setup.mesh.virtual_stages
    one = activations.layer_input(setup) * activations.tokens(setup)
    return Term("buffers", one * (received + stage.in_flight), "what a pipeline stage receives and sends")


def _update_copy(setup: Setup, stage: Stage) -> Term:
    """torch's AdamW works on lists of tensors and makes a copy of one moment while it does."""
    if setup.optimizer != "adamw" or setup.optim_offload:
        return Term("buffers", 0.0, "no copy")
    trained = adapters(setup, stage) if setup.lora_rank else held_params(setup, stage)
    return Term("buffers", BYTES[setup.optim_dtype] * spread(setup, trained), "one moment copied by the optimizer")


def _table_gradient(setup: Setup, stage: Stage) -> Term:
    """The embedding's gradient is dense and comes in the compute type before it is added to the buffer."""
    if not stage.first or setup.lora_rank:
        return Term("buffers", 0.0, "no embedding on this stage")
    return Term("buffers", BYTES[setup.compute_dtype] * gathered.table_params(setup), "the embedding's dense gradient")
