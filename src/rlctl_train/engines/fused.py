"""Leaner forward and backward passes for the parts of common decoders; the same mathematics as transformers' own.

Autograd writes a tensor for every elementary operation, which costs as much as the matrix products of a small model
and most of the activation memory of a large one. These functions keep what their backward pass needs and no more.
Letters: N tokens, H heads, D head size, F features of the residual stream, I features inside the MLP.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, silu

from rlctl_train.engines.attention import attend
from rlctl_train.engines.lora import LoraLinear
from rlctl_train.engines.packing import Slots


def fuse(lm: nn.Module) -> None:
    """Give known modules of a model their leaner forward pass; parameters and names stay as they are."""
    for module in lm.modules():
        forward = FUSED.get(f"{type(module).__module__}.{type(module).__name__}")
        if forward is not None and not (forward is _mlp and _is_unusual(module)):
            module.forward = MethodType(forward, module)


def _is_unusual(mlp: Any) -> bool:
    activation = type(mlp.act_fn).__name__
    return mlp.gate_proj.bias is not None or activation not in ("SiLU", "SiLUActivation")


def _norm(module: Any, hidden_states: Tensor) -> Tensor:
    return _RmsNorm.apply(hidden_states, module.weight, module.variance_epsilon)


def _mlp(module: Any, x: Tensor) -> Tensor:
    projections = (module.gate_proj, module.up_proj, module.down_proj)
    if any(isinstance(projection, LoraLinear) for projection in projections):
        gate, up, down = projections
        return down(_Gate.apply(gate(x), up(x)))
    return _GatedMlp.apply(x.flatten(0, -2), *(projection.weight for projection in projections)).view(x.shape)


def _attention(
    module: Any, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], *, slots: Slots, **_: Any
) -> tuple[Tensor, None]:
    """Attend over hidden states [1, N, F] with rotary angles [1, N, D]."""
    rows = hidden_states.squeeze(0)
    cos, sin = (angles.squeeze(0).unsqueeze(1) for angles in position_embeddings)
    query, key, value = (
        project(rows).view(len(rows), -1, module.head_dim) for project in (module.q_proj, module.k_proj, module.v_proj)
    )
    if "q_norm" in module._modules:
        query, key = module.q_norm(query), module.k_norm(key)
    query, key = _Rotate.apply(query, cos, sin), _Rotate.apply(key, cos, sin)
    out = attend(query, key, value, slots, module.scaling, vars(module).get("sliding_window"))
    return module.o_proj(out.flatten(1)).unsqueeze(0), None


FUSED: dict[str, Callable[..., Any]] = {
    f"transformers.models.{name.lower()}.modeling_{name.lower()}.{name}{part}": forward
    for name in ("Qwen2", "Qwen3", "Llama")
    for part, forward in (("RMSNorm", _norm), ("MLP", _mlp), ("Attention", _attention))
}


class _RmsNorm(torch.autograd.Function):
    """y = w * x / rms(x) over the last dim; statistics in float32 or wider."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        inverse = norm.square_().div_(x.shape[-1]).add_(epsilon).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        return (wide * inverse).to(x.dtype).mul_(weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, weight, inverse = ctx.saved_tensors
        grad, wide = grads[0].to(inverse.dtype), x.to(inverse.dtype)
        product = (grad * wide).flatten(0, -2)
        grad_weight = torch.mv(product.t(), inverse.flatten()).to(weight.dtype) if ctx.needs_input_grad[1] else None
        share = torch.mv(product, weight.to(inverse.dtype)).view_as(inverse).mul_(inverse.pow(3)).div_(-x.shape[-1])
        grad_x = (grad * inverse).mul_(weight).addcmul_(wide, share)
        return grad_x.to(x.dtype), grad_weight, None


class _Rotate(torch.autograd.Function):
    """Rotary embedding (Su et al. 2021, arXiv:2104.09864) of [N, H, D] in two halves, angles [N, 1, D]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin, 1.0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotate(grads[0], cos, sin, -1.0), None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, direction: float) -> Tensor:
    # The angles of both halves are the same.
    half = x.shape[-1] // 2
    sin = sin[..., :half]
    out = x * cos
    out[..., :half].addcmul_(x[..., half:], sin, value=-direction)
    out[..., half:].addcmul_(x[..., :half], sin, value=direction)
    return out


class _GatedMlp(torch.autograd.Function):
    """down(silu(gate(x)) * up(x)) for x [N, F]; keeps the two projections [N, I] and not their product."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        gated, raised = linear(x, gate), linear(x, up)
        ctx.save_for_backward(x, gate, up, down, gated, raised)
        return linear(silu(gated).mul_(raised), down)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, gate, up, down, gated, raised = ctx.saved_tensors
        (grad,) = grads
        active = silu(gated)
        _, *trained = ctx.needs_input_grad
        grad_down = grad.t() @ (active * raised) if trained[2] else None
        grad_hidden = grad @ down
        grad_raised = active.mul_(grad_hidden)
        grad_gated = torch.ops.aten.silu_backward(grad_hidden.mul_(raised), gated)
        grad_x = torch.addmm(grad_gated @ gate, grad_raised, up)
        grad_gate = grad_gated.t() @ x if trained[0] else None
        grad_up = grad_raised.t() @ x if trained[1] else None
        return grad_x, grad_gate, grad_up, grad_down


class _Gate(torch.autograd.Function):
    """silu(gated) * raised, [..., I] each; keeps the two and nothing between them."""

    @staticmethod
    def forward(ctx: Any, gated: Tensor, raised: Tensor) -> Tensor:
        ctx.save_for_backward(gated, raised)
        return silu(gated).mul_(raised)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        gated, raised = ctx.saved_tensors
        (grad,) = grads
        return torch.ops.aten.silu_backward(grad * raised, gated), silu(gated).mul_(grad)
