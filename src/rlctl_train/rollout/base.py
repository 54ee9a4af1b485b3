"""The rollout contract: what goes into an engine and what comes out, the same for every engine."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Sampling:
    """How to sample. `temperature` 0 is greedy; log-probabilities are then those at temperature 1."""

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    ignore_eos: bool = False
    seed: int = 0
    """The same seed and row number give the same random numbers, whatever the batch around the row is."""


@dataclass(frozen=True)
class Sample:
    """One sampled response.

    `logp` is the log-softmax of the logits divided by the sampling temperature, before top-k and top-p,
    at each sampled token; the end-of-sequence token, when sampled, is the last of `token_ids`.
    """

    token_ids: list[int]
    logp: list[float]
    finish_reason: FinishReason


class Rollout(Protocol):
    """A rollout engine: generates, takes new weights, sleeps and wakes."""

    version: int
    """Version of the weights that generate; -1 before the first update."""

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling, rows: Sequence[int]) -> list[Sample]:
        """Sample one response per prompt, in order; `rows` number the responses for seeding."""
        ...

    def start_update(self) -> None:
        """Prepare to receive weights."""
        ...

    def update_weights(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Take one bucket of named tensors (Hugging Face names, unsharded)."""
        ...

    def finish_update(self, version: int) -> str:
        """Make the new weights current, drop caches, and return the checksum of what the engine now holds."""
        ...

    def sleep(self) -> None:
        """Free device memory until `wake`."""
        ...

    def wake(self) -> None:
        """Take back what `sleep` freed."""
        ...
