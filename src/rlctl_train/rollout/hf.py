"""Rollout with transformers, on any device: loads the model, decodes, takes weights in place, sleeps and wakes."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from rlctl_train.config.rollout import HfRollout
from rlctl_train.rollout.base import Sample, Sampling, check_finite, model_error, response_budgets, stop_ids
from rlctl_train.rollout.cached import CachedDecoder
from rlctl_train.rollout.decode import Decoder, Decoding, Request
from rlctl_train.rollout.fused import FusedDecoder, FusedWeights, agrees, supports
from rlctl_train.rollout.weights import WeightStore

_log = logging.getLogger(__name__)


class HfRolloutEngine:
    """One model on one device. Llama-family models decode in `fused.py`, all others through their own forward pass."""

    def __init__(
        self,
        model_path: str,
        config: HfRollout,
        *,
        dtype: str,
        device: str,
        max_model_len: int,
        max_concurrent: int | None = None,
        gpu_memory_share: float | None = None,
        trust_remote_code: bool = False,
        peers: None = None,
    ) -> None:
        assert peers is None, "one process holds the whole model"
        del gpu_memory_share  # nothing is reserved ahead: memory follows the rows being decoded
        self.version = -1
        self._max_model_len = max_model_len
        self._max_concurrent = config.max_concurrent or max_concurrent
        self._device = torch.device(device)
        self._model = _load(model_path, getattr(torch, dtype), trust_remote_code).to(self._device)
        generation = self._model.generation_config
        stops = stop_ids(generation and generation.eos_token_id, self._model.config.eos_token_id)
        self._stop_ids = torch.tensor(stops, dtype=torch.long, device=self._device)
        self._weights = WeightStore(self._model, getattr(torch, dtype))
        self._fused = self._fuse()
        self._decoder: Decoder | None = None

    @torch.inference_mode()
    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling, rows: Sequence[int]) -> list[Sample]:
        """Sample one response per prompt, in order; see `Rollout.generate`."""
        if not prompts:
            return []
        budgets = response_budgets(prompts, sampling.max_tokens, self._max_model_len)
        requests = [Request(tuple(p), b, r) for p, b, r in zip(prompts, budgets, rows, strict=True)]
        decoder, self._decoder = self._decoder or self._new_decoder(), None
        decoding = Decoding(
            decoder,
            requests,
            sampling,
            num_places=min(self._max_concurrent or len(requests), len(requests)),
            stop_ids=self._stop_ids[:0] if sampling.ignore_eos else self._stop_ids,
        )
        samples = decoding.run()
        check_finite(samples, self.version)
        self._decoder = decoder  # kept for its buffers, after a clean run only: they may hold NaN
        return samples

    def start_update(self) -> None:
        """Prepare to receive weights."""
        self._weights.start()

    def update_weights(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Write one bucket of named tensors in place."""
        self._weights.take(tensors)

    def finish_update(self, version: int) -> str:
        """Make the weights current; return the checksum of the model's own parameters."""
        held = self._weights.finish()
        self.version = version
        return held

    def held_bytes(self) -> dict[str, int]:
        """Return the bytes of the weights, where they are on the device."""
        there = [p for p in self._model.parameters() if p.device.type == self._device.type]
        return {"weights": sum(parameter.nbytes for parameter in there)}

    def sleep(self) -> None:
        """Move the weights to host memory."""
        if self._device.type != "cpu":
            self._fused = self._decoder = None
            self._move_to(torch.device("cpu"))
            torch.accelerator.empty_cache()

    def wake(self) -> None:
        """Move the weights back."""
        if self._device.type != "cpu" and self._model.device.type == "cpu":
            self._move_to(self._device)
            self._fused = self._fuse()

    def _move_to(self, device: torch.device) -> None:
        self._model.to(device)
        self._weights = WeightStore(self._model, self._model.dtype)

    def _new_decoder(self) -> Decoder:
        return CachedDecoder(self._model) if self._fused is None else FusedDecoder(self._fused)

    def _fuse(self) -> FusedWeights | None:
        """Prepare the fast decoder where it knows the architecture and agrees with the model's own forward pass."""
        if not supports(self._model):
            return None
        weights = FusedWeights(self._model, self._max_model_len)
        if agrees(self._model, weights):
            return weights
        _log.warning(
            "the fast decoder disagrees with the forward pass of %s: generating the slow way",
            type(self._model).__name__,
        )
        return None


def _load(model_path: str, dtype: torch.dtype, trust_remote_code: bool) -> Any:
    try:
        model = AutoModelForCausalLM.from_pretrained(model_path, dtype=dtype, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise model_error(model_path, error) from error
    return model.eval().requires_grad_(False)
