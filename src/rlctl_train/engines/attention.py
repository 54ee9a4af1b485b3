"""Causal attention over a packed pass, registered with transformers under the name `rlctl_packed`.

The model calls it with queries, keys and values of N tokens; `slots` says which sequences they form. Sequences are
padded on the right, where causality alone keeps real tokens from seeing padding, so no mask is ever built. On
devices that have it, attention over sequences of different lengths takes the place of padding. Dropout is never
applied: the policy that is differentiated is the policy that was sampled.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from rlctl_train.config.errors import UserError
from rlctl_train.engines.packing import Slots

NAME = "rlctl_packed"


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    *,
    slots: Slots,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attend from query [1, H, N, D] to key and value [1, K, N, D] within sequences; return [1, N, H, D].

    H query heads share K key/value heads. transformers makes no mask for an attention name without a registered
    mask function, hence `attention_mask` is None.
    """
    if softcap is not None or s_aux is not None:
        raise UserError(
            f"{type(module).__name__} uses attention soft-capping or sinks, which the fsdp2 engine does not have",
            "choose a model without them",
        )
    rows = [tensor.squeeze(0).transpose(0, 1) for tensor in (query, key, value)]
    return attend(rows[0], rows[1], rows[2], slots, scaling, sliding_window).unsqueeze(0), None


def attend(query: Tensor, key: Tensor, value: Tensor, slots: Slots, scale: float | None, window: int | None) -> Tensor:
    """Attend from query [N, H, D] to key and value [N, K, D] within sequences, causally; return [N, H, D].

    With a `window`, a token sees itself and the `window` - 1 tokens before it.
    """
    if slots.spread is not None:
        query, key, value = (tensor.index_select(0, slots.spread) for tensor in (query, key, value))
    by_layout = _attend_padded if slots.bounds is None else _attend_dense
    out = by_layout(query, key, value, slots, scale, window)
    return out if slots.collect is None else out.index_select(0, slots.collect)


def _attend_padded(
    query: Tensor, key: Tensor, value: Tensor, slots: Slots, scale: float | None, window: int | None
) -> Tensor:
    """Attend over slots [S x L, H, D], padded on the right."""
    grid = [t.view(slots.num_sequences, slots.longest, *t.shape[1:]).transpose(1, 2) for t in (query, key, value)]
    windowed = window is not None and window < slots.longest
    out = scaled_dot_product_attention(
        *grid,
        attn_mask=_band(slots.longest, window, query.device) if windowed else None,
        is_causal=not windowed,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return out.transpose(1, 2).reshape(query.shape)


def _attend_dense(
    query: Tensor, key: Tensor, value: Tensor, slots: Slots, scale: float | None, window: int | None
) -> Tensor:
    """Attend over slots [M, H, D] without padding."""
    from torch.nn.attention.varlen import varlen_attn  # needs a CUDA build

    assert slots.bounds is not None
    reach = -1 if window is None else window - 1
    out = varlen_attn(
        query, key, value, slots.bounds, slots.bounds, slots.longest, slots.longest,
        scale=scale, window_size=(reach, 0), enable_gqa=query.shape[1] != key.shape[1],
    )  # fmt: skip
    assert isinstance(out, Tensor)
    return out


def _band(length: int, window: int | None, device: torch.device) -> Tensor:
    """Return [L, L], true where a query may look: at itself and the `window` - 1 tokens before it."""
    assert window is not None
    place = torch.arange(length, device=device)
    distance = place[:, None] - place
    return (distance >= 0) & (distance < window)


AttentionInterface.register(NAME, packed_attention)
