"""Log-probabilities and entropies of predicted tokens, without ever holding the logits of all of them.

Letters: R predicted tokens, H hidden size, V vocabulary, K candidates for each token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Top:
    """Which tokens count as the likeliest: at most `k`, among those numbered below `num_ids`."""

    k: int
    num_ids: int


def token_logprobs(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, temperature: float, chunk_tokens: int
) -> tuple[Tensor, Tensor]:
    """Return log-probability of each target and entropy of each distribution, [R] each, in nats, float32 or wider.

    The distribution is the softmax of (hidden [R, H] @ weight [V, H]^T + bias [V]) / temperature. Logits of at most
    `chunk_tokens` tokens exist at one time; the backward pass makes them again, except those of the last chunk,
    which are kept. Both results are differentiable in hidden, weight and bias. With several targets each, [R, K],
    log-probabilities are [R, K].
    """
    logp, entropy, *_ = _TokenLogprobs.apply(hidden, weight, bias, targets, temperature, chunk_tokens, False, None)
    return logp, entropy


def token_logprobs_and_squares(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, temperature: float, chunk_tokens: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what `token_logprobs` does and the sum of each distribution's squared probabilities [R], which has no
    gradient."""
    return _TokenLogprobs.apply(hidden, weight, bias, targets, temperature, chunk_tokens, True, None)[:3]


def token_logprobs_and_kl(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: float,
    chunk_tokens: int,
    ref_logp: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what `token_logprobs` does and KL(pi || pi_ref) of each distribution pi, [R] in nats.

    It is sum_v pi(v) (log pi(v) - log pi_ref(v)) over the whole vocabulary, log pi_ref being `ref_logp` [R, V], which
    may lie on the host and has no gradient. All three are differentiable.
    """
    logp, entropy, _, kl = _TokenLogprobs.apply(
        hidden, weight, bias, targets, temperature, chunk_tokens, False, ref_logp
    )
    return logp, entropy, kl


@torch.no_grad()
def full_logprobs(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, temperature: float, chunk_tokens: int
) -> tuple[Tensor, Tensor]:
    """Return log-probability of each target, [R], and of every token of the vocabulary, [R, V], both on the host."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    whole = torch.empty(len(hidden), len(weight), dtype=dtype)
    for part in _chunks(len(hidden), chunk_tokens):
        whole[part] = _log_softmax(hidden[part], weight, bias, temperature)
    return whole.gather(1, _columns(targets).to(whole.device)).view(targets.shape), whole


@torch.no_grad()
def top_logprobs(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: float, chunk_tokens: int, top: Top
) -> tuple[Tensor, Tensor]:
    """Return the likeliest tokens and their log-probabilities, [R, K] each, likeliest first; distributions as above."""
    num = min(top.k, top.num_ids, len(weight))
    ids = torch.empty(len(hidden), num, dtype=torch.int64, device=hidden.device)
    logp = torch.empty(ids.shape, dtype=torch.promote_types(hidden.dtype, torch.float32), device=hidden.device)
    for part in _chunks(len(hidden), chunk_tokens):
        log_probs = _log_softmax(hidden[part], weight, bias, temperature)
        logp[part], ids[part] = log_probs[:, : top.num_ids].topk(num, dim=-1)
    return ids, logp


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_tokens: int,
        wants_squares: bool,
        ref_logp: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        logp = torch.empty(targets.shape, dtype=dtype, device=hidden.device)
        entropy = torch.empty(len(hidden), dtype=dtype, device=hidden.device)
        squares = torch.empty_like(entropy) if wants_squares else None
        kl = None if ref_logp is None else torch.empty_like(entropy)
        log_probs = hidden.new_empty(0, len(weight), dtype=dtype)
        for part in _chunks(len(hidden), chunk_tokens):
            del log_probs
            log_probs = _log_softmax(hidden[part], weight, bias, temperature)
            logp[part] = log_probs.gather(1, _columns(targets[part])).view_as(targets[part])
            probs = log_probs.exp()
            entropy[part] = -torch.linalg.vecdot(probs, log_probs)
            if squares is not None:
                squares[part] = torch.linalg.vecdot(probs, probs)
            if kl is not None and ref_logp is not None:
                kl[part] = torch.linalg.vecdot(probs, log_probs - ref_logp[part].to(log_probs))
            del probs
        ctx.save_for_backward(hidden, weight, bias, targets, entropy, log_probs, kl, ref_logp)
        ctx.temperature, ctx.chunk_tokens = temperature, chunk_tokens
        ctx.set_materialize_grads(False)
        if squares is not None:
            ctx.mark_non_differentiable(squares)
        return logp, entropy, squares, kl

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, entropy, kept, kl, ref_logp = ctx.saved_tensors
        grad_logp, grad_entropy, _, grad_kl = grads
        grad_hidden = torch.empty_like(hidden)
        _, wants_weight, wants_bias, *_ = ctx.needs_input_grad
        grad_weight = torch.zeros_like(weight, dtype=kept.dtype) if wants_weight else None
        grad_bias = torch.zeros_like(bias, dtype=kept.dtype) if wants_bias else None
        parts = _chunks(len(hidden), ctx.chunk_tokens)
        for part in reversed(parts):
            log_probs = kept if part is parts[-1] else _log_softmax(hidden[part], weight, bias, ctx.temperature)
            grad_logits = _grad_logits(
                log_probs,
                _columns(targets[part]),
                entropy[part],
                None if grad_logp is None else _columns(grad_logp[part] / ctx.temperature),
                None if grad_entropy is None else grad_entropy[part] / ctx.temperature,
            )
            if grad_kl is not None:
                slope = grad_kl[part] / ctx.temperature
                grad_logits += _grad_kl(log_probs, ref_logp[part].to(log_probs), kl[part], slope)
            grad_logits = grad_logits.to(weight.dtype)
            torch.mm(grad_logits, weight, out=grad_hidden[part])
            if grad_weight is not None:
                _add_product(grad_weight, grad_logits.t(), hidden[part])
            if grad_bias is not None:
                grad_bias += grad_logits.sum(0)
        return (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None else grad_bias.to(weight.dtype),
            None, None, None, None, None,
        )  # fmt: skip


def _columns(values: Tensor) -> Tensor:
    """Return [r] as [r, 1] and [r, K] as it is."""
    return values[:, None] if values.ndim == 1 else values


def _chunks(num_tokens: int, chunk_tokens: int) -> list[slice]:
    return [slice(i, min(i + chunk_tokens, num_tokens)) for i in range(0, num_tokens, chunk_tokens)]


def _log_softmax(hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: float) -> Tensor:
    logits = torch.nn.functional.linear(hidden, weight, bias)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if temperature != 1.0:
        logits /= temperature
    return logits.log_softmax(-1)


def _grad_logits(
    log_probs: Tensor, targets: Tensor, entropy: Tensor, grad_logp: Tensor | None, grad_entropy: Tensor | None
) -> Tensor:
    """Return the gradient in the logits before the temperature's division, [r, V]; targets and grad_logp are [r, K].

    d logp / d z_j = [j = target] - p_j and d entropy / d z_j = -p_j (log p_j + entropy).
    """
    probs = log_probs.exp()
    factor = torch.zeros_like(entropy) if grad_logp is None else -grad_logp.sum(1)
    if grad_entropy is None:
        grad = probs.mul_(factor[:, None])
    else:
        slope = grad_entropy[:, None]
        grad = probs.mul_((factor - grad_entropy * entropy)[:, None] - slope * log_probs)
    if grad_logp is not None:
        grad.scatter_add_(1, targets, grad_logp)
    return grad


def _grad_kl(log_probs: Tensor, ref_logp: Tensor, kl: Tensor, grad_kl: Tensor) -> Tensor:
    """Return the KL's part of that gradient, [r, V]: d KL / d z_j = p_j (log p_j - log q_j - KL)."""
    return (log_probs - ref_logp).sub_(kl[:, None]).mul_(log_probs.exp()).mul_(grad_kl[:, None])


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add a matrix product to a total that may be of higher precision."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right
