"""A decoder over any Hugging Face causal model: its own forward pass and cache, prompts padded on the left.

The general way; `fused.py` is the fast one for the architectures it knows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache


class CachedDecoder:
    """Keeps the model's cache and the attention mask [n, T] of the active rows."""

    can_join = False

    def __init__(self, model: Any) -> None:
        self._model = model
        self._cache = DynamicCache(config=model.config)
        self._mask = torch.empty(0, 0, dtype=torch.long, device=model.device)

    def start(self, max_positions: int) -> None:
        """See `Decoder.start`."""
        del max_positions  # the cache grows with its rows
        self._cache = DynamicCache(config=self._model.config)

    def add(self, prompts: Sequence[Sequence[int]], copies: Sequence[int]) -> Tensor:
        """Start a new batch (no row may be active); see `Decoder.add`."""
        width = max(len(prompt) for prompt in prompts)
        ids = torch.zeros(len(prompts), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for i, prompt in enumerate(prompts):
            ids[i, width - len(prompt) :] = torch.tensor(prompt)
            mask[i, width - len(prompt) :] = 1
        self._cache = DynamicCache(config=self._model.config)
        self._mask = mask.to(self._model.device)
        logits = self._forward(ids.to(self._model.device), first=True)
        index = torch.tensor(copies, device=self._model.device)
        self._keep(index)
        return logits[index]

    def step(self, tokens: Tensor) -> Tensor:
        """See `Decoder.step`."""
        self._mask = torch.nn.functional.pad(self._mask, (0, 1), value=1)
        return self._forward(tokens[:, None], first=False)

    def move(self, sources: Tensor, targets: Tensor, num_rows: int) -> None:
        """See `Decoder.move`."""
        index = torch.arange(num_rows, device=self._mask.device)
        index[targets] = sources
        self._keep(index)

    def _keep(self, index: Tensor) -> None:
        self._cache.batch_select_indices(index)
        self._mask = self._mask[index]

    def _forward(self, ids: Tensor, *, first: bool) -> Tensor:
        """Run ids [n, t] after the cached tokens; return the logits after the last, [n, V]."""
        positions = (self._mask.cumsum(-1) - 1).clamp_(min=0)[:, -ids.shape[1] :]
        inputs = self._model.prepare_inputs_for_generation(
            ids,
            past_key_values=self._cache,
            attention_mask=self._mask,
            position_ids=positions,
            is_first_iteration=first,
            use_cache=True,
            logits_to_keep=1,
        )
        return self._model(**inputs, return_dict=True).logits[:, -1]
