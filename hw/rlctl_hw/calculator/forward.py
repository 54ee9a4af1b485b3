"""A forward pass without gradients: log-probabilities under the actor, the reference, a critic or a reward model."""

from __future__ import annotations

from rlctl_hw.calculator import activations, gathered, overheads
from rlctl_hw.calculator.logits import logits
from rlctl_hw.calculator.stages import Stage
from rlctl_hw.calculator.states import states
from rlctl_hw.calculator.terms import Moment, Term
from rlctl_hw.setup import Setup


def moments(setup: Setup, stage: Stage) -> tuple[Moment, ...]:
    """Return two moments: inside a layer, and at the head."""
    own = states(setup, stage)
    always = (own.weights, own.gradients, own.optimizer, overheads.workspace(setup), _buffers(setup, stage))
    tokens = activations.tokens(setup)
    layer = max(activations.forward_only(setup, moe=moe) for moe in stage.kinds) + activations.gathered_inputs(setup)
    head = Term("activations", activations.last_norm(setup) * tokens, "last norm")
    return (
        Moment("layer", (*always, Term("activations", layer * tokens, "one layer at work"))),
        Moment("head", (*always, head, logits(setup, stage, backward=False))),
    )


def _buffers(setup: Setup, stage: Stage) -> Term:
    if setup.engine == "megatron":
        return Term("buffers", 0.0, "weights are whole")
    params = gathered.parameters(setup, stage)
    return Term("buffers", min(params.num_bytes, gathered.limit(setup, stage)), params.why)
