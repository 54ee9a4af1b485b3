"""A fast decoder for the Llama family: fused projections, one cache buffer, no padding on the left.

Works on the weights of a loaded Hugging Face model. `FusedWeights` re-homes the projections of a layer in one
transposed tensor, of which the model's own parameters become views: an update by name reaches both.

n active rows, m new rows, P padded prompt length, T cached positions, H query heads, K key/value heads,
D features per head, G = H / K, C features of the residual stream, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_MODEL_TYPES = frozenset({"llama", "mistral", "qwen2", "qwen3"})
"""Pre-norm decoders with rotary positions, grouped queries and a gated SiLU MLP, in transformers' module names."""
_STATIC_ROPE = frozenset({"default", "linear", "llama3"})
"""Rotary variants whose angles do not depend on the length of the sequence."""
_GROWTH_TOKENS = 64
"""The cache grows by at least so many positions at a time."""
_PREFILL_TOKENS = 8192
"""Most prompt tokens (with padding) computed in one pass, to bound activations."""
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.25}
"""Largest difference of log-probabilities against the model's own forward pass at start, in nats."""


@dataclass(frozen=True)
class _Layer:
    """Weights of one decoder layer, transposed: inputs times weight."""

    norm_1: Any
    qkv: Tensor
    qkv_bias: Tensor | None
    q_norm: Any
    k_norm: Any
    out: Tensor
    norm_2: Any
    gate_up: Tensor
    down: Tensor


class FusedWeights:
    """The weights of a Llama-family model, fused, and its constants. Make a new one after the model changed device."""

    def __init__(self, model: Any, max_positions: int) -> None:
        config = model.config
        self.embedding: Tensor = model.get_input_embeddings().weight
        self.head: Tensor = model.get_output_embeddings().weight
        self.norm = model.model.norm
        self.layers = [_fuse(layer) for layer in model.model.layers]
        self.num_heads: int = config.num_attention_heads
        self.num_kv_heads: int = config.num_key_value_heads
        self.head_dim: int = model.model.layers[0].self_attn.head_dim
        positions = torch.arange(max_positions, device=self.embedding.device)[None]
        cos, sin = model.model.rotary_emb(self.embedding, positions)
        sin = torch.cat([-sin[..., : self.head_dim // 2], sin[..., self.head_dim // 2 :]], -1)
        self.rope = (cos[0], sin[0])
        """Cosine and signed sine, each [max_positions, D]: x is rotated to x * cos + swap_halves(x) * sin."""


def supports(model: Any) -> bool:
    """Tell whether the architecture is one this decoder knows."""
    config = model.config
    return (
        config.model_type in _MODEL_TYPES
        and config.rope_parameters["rope_type"] in _STATIC_ROPE
        and getattr(config, "quantization_config", None) is None
        and "partial_rotary_factor" not in config.rope_parameters
        and config.hidden_act == "silu"
        and not getattr(config, "mlp_bias", False)
        and model.model.layers[0].self_attn.o_proj.bias is None
        and all(kind == "full_attention" for kind in getattr(config, "layer_types", None) or ["full_attention"])
        and getattr(config, "sliding_window", None) is None
    )


@torch.inference_mode()
def agrees(model: Any, weights: FusedWeights) -> bool:
    """Compare this decoder with the model's own forward pass on two short prompts, one step beyond the prompt."""
    vocabulary = weights.embedding.shape[0]
    prompts = [[(7 * i + 3) % vocabulary for i in range(length)] for length in (5, 3)]
    decoder = FusedDecoder(weights)
    decoder.start(6)
    decoder.add(prompts, [0, 1])
    token = torch.tensor([1 % vocabulary] * 2, device=weights.embedding.device)
    ours = decoder.step(token).float().log_softmax(-1)
    for row, prompt in enumerate(prompts):
        ids = torch.tensor([[*prompt, int(token[row])]], device=token.device)
        theirs = model(ids, use_cache=False).logits[0, -1].float().log_softmax(-1)
        if not (ours[row] - theirs).abs().max() <= _TOLERANCE[weights.embedding.dtype]:
            return False
    return True


class FusedDecoder:
    """The active rows of one generate call: their lengths [n] and cached keys and values."""

    can_join = True

    def __init__(self, weights: FusedWeights) -> None:
        self._w = weights
        device = weights.embedding.device
        self._lengths = torch.empty(0, dtype=torch.long, device=device)
        self._longest = 0
        self._max_positions = 0
        self._cache = torch.empty(len(weights.layers), 2, 0, weights.num_kv_heads, 0, weights.head_dim, device=device)
        """Keys and values, [layers, 2, places, K, capacity, D]."""
        self._bias = torch.empty(0, 0)
        """0 at cached positions and -inf beyond, [places, capacity]."""

    def start(self, max_positions: int) -> None:
        """See `Decoder.start`; the cache buffer of an earlier call is used again."""
        self._max_positions = max_positions
        self._lengths = self._lengths[:0].clone()
        self._longest = 0

    def add(self, prompts: Sequence[Sequence[int]], copies: Sequence[int]) -> Tensor:
        """See `Decoder.add`."""
        first = len(self._lengths)
        device = self._lengths.device
        lengths = torch.tensor([len(prompts[c]) for c in copies], device=device)
        self._lengths = torch.cat([self._lengths, lengths])
        self._longest = max(self._longest, int(lengths.max()))
        self._reserve(len(self._lengths), self._longest + 1)
        index = torch.tensor(copies, device=device)
        logits = []
        for start, stop in _passes(prompts):
            rows = ((index >= start) & (index < stop)).nonzero()[:, 0]
            logits.append(self._prefill(prompts[start:stop], first + rows, index[rows] - start))
        columns = torch.arange(self._bias.shape[1], device=device)
        self._bias[first : len(self._lengths)] = torch.where(columns < lengths[:, None], 0.0, -torch.inf)
        return torch.cat(logits)[index]

    def step(self, tokens: Tensor) -> Tensor:
        """See `Decoder.step`."""
        w, n, kv_heads = self._w, len(tokens), self._w.num_kv_heads
        self._longest += 1
        self._reserve(n, self._longest)
        capacity, width = self._bias.shape[1], self._longest
        rows = torch.arange(n, device=tokens.device)
        self._bias[rows, self._lengths] = 0.0
        cos, sin = (table[self._lengths][:, None] for table in w.rope)
        heads = torch.arange(kv_heads, device=tokens.device)
        slots = (rows[:, None] * kv_heads + heads) * capacity + self._lengths[:, None]
        slots = torch.cat([slots, slots + self._cache[0, 0].numel() // w.head_dim], 1)
        bias = self._bias[:n, None, :width].expand(n, w.num_heads, width).reshape(n * kv_heads, -1, width)
        hidden = w.embedding[tokens]
        for layer, cache in zip(w.layers, self._cache, strict=True):
            query, new = _project(layer, w, _norm(hidden, layer.norm_1), cos, sin)
            cache.view(-1, w.head_dim)[slots] = new
            keys, values = cache.flatten(1, 2)[:, : n * kv_heads, :width]
            query = query.reshape(n * kv_heads, -1, w.head_dim)
            scores = torch.baddbmm(bias, query, keys.transpose(1, 2), alpha=w.head_dim**-0.5)
            mixed = torch.bmm(scores.softmax(-1), values)
            _finish_layer(layer, hidden, mixed.view(n, -1))
        self._lengths = self._lengths + 1
        return F.linear(_norm(hidden, w.norm), w.head)

    def move(self, sources: Tensor, targets: Tensor, num_rows: int) -> None:
        """See `Decoder.move`."""
        if len(sources):
            self._cache[:, :, targets, :, : self._longest] = self._cache[:, :, sources, :, : self._longest]
            self._bias[targets] = self._bias[sources]
            self._lengths[targets] = self._lengths[sources]
        self._lengths = self._lengths[:num_rows].clone()
        self._longest = int(self._lengths.max()) if num_rows else 0

    def _prefill(self, prompts: Sequence[Sequence[int]], rows: Tensor, copies: Tensor) -> Tensor:
        """Compute prompts and cache them at `rows` (row i takes prompt `copies[i]`); return logits [prompts, V].

        Prompts are padded on the right, which needs no mask: with causal attention no real token sees the padding,
        and a row's bias hides its cached keys.
        """
        w, device = self._w, rows.device
        last = torch.tensor([len(prompt) - 1 for prompt in prompts], device=device)
        width = int(last.max()) + 1
        ids = torch.zeros(len(prompts), width, dtype=torch.long)
        for i, prompt in enumerate(prompts):
            ids[i, : len(prompt)] = torch.tensor(prompt)
        hidden = w.embedding[ids.to(device).flatten()]
        cos, sin = (table[:width].repeat(len(prompts), 1)[:, None] for table in w.rope)
        for layer, cache in zip(w.layers, self._cache, strict=True):
            query, new = _project(layer, w, _norm(hidden, layer.norm_1), cos, sin)
            query, new = (x.view(len(prompts), width, -1, w.head_dim).transpose(1, 2) for x in (query, new))
            keys, values = new.chunk(2, dim=1)
            cache[0, rows, :, :width] = keys[copies]
            cache[1, rows, :, :width] = values[copies]
            mixed = F.scaled_dot_product_attention(query, keys, values, is_causal=True, enable_gqa=True)
            _finish_layer(layer, hidden, mixed.transpose(1, 2).reshape(len(hidden), -1))
        ends = torch.arange(len(prompts), device=device) * width + last
        return F.linear(_norm(hidden[ends], w.norm), w.head)

    def _reserve(self, num_rows: int, num_positions: int) -> None:
        """Make room for rows and positions; positions grow geometrically, so copying stays cheap."""
        old = self._cache
        places, capacity = old.shape[2], old.shape[4]
        if num_rows <= places and num_positions <= capacity:
            return
        if num_positions > capacity:
            grown = num_positions + max(_GROWTH_TOKENS, num_positions // 2)
            capacity = min(grown, self._max_positions)
        shape = (*old.shape[:2], max(num_rows, places), old.shape[3], capacity, old.shape[5])
        # Zeros, because a masked key still meets a probability of zero: garbage could be NaN.
        self._cache = torch.zeros(shape, dtype=self._w.embedding.dtype, device=self._lengths.device)
        self._cache[:, :, :places, :, : old.shape[4]] = old
        bias = torch.full((shape[2], capacity), -torch.inf, dtype=self._cache.dtype, device=self._cache.device)
        bias[: self._bias.shape[0], : self._bias.shape[1]] = self._bias
        self._bias = bias


def _project(layer: _Layer, w: FusedWeights, hidden: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Return rotated queries [N, H, D], and rotated keys with values [N, 2K, D], for hidden [N, C]."""
    qkv = hidden @ layer.qkv if layer.qkv_bias is None else torch.addmm(layer.qkv_bias, hidden, layer.qkv)
    qkv = qkv.view(len(hidden), -1, w.head_dim)
    rotated = qkv[:, : w.num_heads + w.num_kv_heads]
    if layer.q_norm is not None and layer.k_norm is not None:
        rotated[:, : w.num_heads] = _norm(rotated[:, : w.num_heads], layer.q_norm)
        rotated[:, w.num_heads :] = _norm(rotated[:, w.num_heads :], layer.k_norm)
    swapped = rotated.roll(w.head_dim // 2, -1).mul_(sin)
    rotated.mul_(cos).add_(swapped)
    return qkv[:, : w.num_heads], qkv[:, w.num_heads :]


def _finish_layer(layer: _Layer, hidden: Tensor, mixed: Tensor) -> None:
    """Add attention output [N, H * D] and MLP to hidden [N, C], in place."""
    hidden.addmm_(mixed, layer.out)
    gate, up = (_norm(hidden, layer.norm_2) @ layer.gate_up).chunk(2, dim=-1)
    hidden.addmm_(F.silu(gate, inplace=True).mul_(up), layer.down)


def _norm(x: Tensor, norm: Any) -> Tensor:
    return F.rms_norm(x, norm.weight.shape, norm.weight, norm.variance_epsilon)


def _passes(prompts: Sequence[Sequence[int]]) -> list[tuple[int, int]]:
    """Cut prompts into runs of at most `_PREFILL_TOKENS` tokens, padding included; return (start, stop) of each."""
    runs: list[tuple[int, int]] = []
    start = longest = 0
    for i, prompt in enumerate(prompts):
        longest = max(longest, len(prompt))
        if i > start and longest * (i + 1 - start) > _PREFILL_TOKENS:
            runs.append((start, i))
            start, longest = i, len(prompt)
    return [*runs, (start, len(prompts))]


def _fuse(layer: Any) -> _Layer:
    attention, mlp = layer.self_attn, layer.mlp
    projections = [attention.q_proj, attention.k_proj, attention.v_proj]
    biased = attention.q_proj.bias is not None
    return _Layer(
        norm_1=layer.input_layernorm,
        qkv=_rehome([p.weight for p in projections]),
        qkv_bias=_rehome([p.bias for p in projections]) if biased else None,
        q_norm=getattr(attention, "q_norm", None),
        k_norm=getattr(attention, "k_norm", None),
        out=_rehome([attention.o_proj.weight]),
        norm_2=layer.post_attention_layernorm,
        gate_up=_rehome([mlp.gate_proj.weight, mlp.up_proj.weight]),
        down=_rehome([mlp.down_proj.weight]),
    )


def _rehome(parameters: Sequence[nn.Parameter]) -> Tensor:
    """Join parameters along their first dim in one transposed tensor, and make each a view of its part."""
    joined = torch.cat([p.data for p in parameters]).t().contiguous()
    for parameter, part in zip(parameters, joined.t().split([len(p) for p in parameters]), strict=True):
        parameter.data = part
    return joined
