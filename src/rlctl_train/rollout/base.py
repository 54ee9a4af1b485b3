"""The rollout contract: what goes into an engine and what comes out, the same for every engine."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from torch import Tensor

from rlctl_train.config.errors import PREFLIGHT, UserError

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
    seconds: float | None = field(default=None, compare=False)
    """From the begin of the call to the last token; None where the engine does not tell."""


@dataclass(frozen=True)
class Peers:
    """The place of this process among those that are one engine together, and where they meet."""

    rank: int
    num_ranks: int
    host: str
    port: int
    """Of the store that rank 0 holds open."""


class RolloutError(Exception):
    """A rollout engine cannot do what it was asked; the message says why."""


def response_budgets(prompts: Sequence[Sequence[int]], max_tokens: int, max_model_len: int) -> list[int]:
    """Return how many tokens each response may have: `max_tokens`, or less where the model's length ends before."""
    for i, prompt in enumerate(prompts):
        if not 0 < len(prompt) < max_model_len:
            raise RolloutError(
                f"prompt {i} has {len(prompt)} tokens; a prompt and one token of response must fit in {max_model_len}"
            )
    return [min(max_tokens, max_model_len - len(prompt)) for prompt in prompts]


def model_error(model_path: str, error: Exception) -> UserError:
    """Return the error of a model folder or hub id that does not load."""
    return UserError(
        f"cannot load the model {model_path!r}: {str(error).splitlines()[0]}",
        "give `model.path` a folder with config.json and safetensors, or a hub id that can be reached",
        exit_code=PREFLIGHT,
    )


def stop_ids(*given: int | list[int] | None) -> list[int]:
    """Return the end-of-sequence ids of the first source that names any."""
    for ids in given:
        if ids is not None:
            return [ids] if isinstance(ids, int) else list(ids)
    return []


def check_finite(samples: Sequence[Sample], version: int) -> None:
    """Raise RolloutError when a log-probability is not finite: weights or activations hold NaN or infinity."""
    bad = [i for i, sample in enumerate(samples) if not all(map(math.isfinite, sample.logp))]
    if bad:
        raise RolloutError(
            f"{len(bad)} of {len(samples)} responses have a log-probability that is not finite (first: row {bad[0]}): "
            f"weights of version {version} are broken"
        )


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

    def held_bytes(self) -> dict[str, int]:
        """Return the bytes of each part that it has on its device now, as far as it can tell."""
        ...

    def sleep(self) -> None:
        """Free device memory until `wake`."""
        ...

    def wake(self) -> None:
        """Take back what `sleep` freed."""
        ...
