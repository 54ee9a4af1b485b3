"""The decoding loop: prompts in, samples out, over any decoder; finished rows leave, waiting ones come in.

n active rows, V vocabulary, S responses asked for. Active rows are always 0..n-1: when rows finish, the last
ones take their places, so every step works on a dense batch and a decoder moves few rows.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from rlctl_train.rollout.base import Sample, Sampling
from rlctl_train.rollout.sampling import pick, uniforms


class Decoder(Protocol):
    """A model with a cache of the active rows."""

    can_join: bool
    """Whether rows can be added while others are being decoded."""

    def start(self, max_positions: int) -> None:
        """Forget all rows; no row will grow beyond `max_positions` tokens."""
        ...

    def add(self, prompts: Sequence[Sequence[int]], copies: Sequence[int]) -> Tensor:
        """Append one row per entry of `copies`, the index of its prompt; return their next-token logits [m, V]."""
        ...

    def step(self, tokens: Tensor) -> Tensor:
        """Append one token to every active row ([n]); return next-token logits [n, V]."""
        ...

    def move(self, sources: Tensor, targets: Tensor, num_rows: int) -> None:
        """Overwrite rows `targets` by rows `sources`, then keep the first `num_rows`."""
        ...


@dataclass(frozen=True)
class Request:
    """What is asked of one row."""

    prompt: tuple[int, ...]
    max_tokens: int
    row: int


@dataclass
class _Active:
    """The active rows: request index, tokens still allowed, and tokens sampled so far, each [n]."""

    request: Tensor
    left: Tensor
    count: Tensor

    def select(self, index: Tensor) -> _Active:
        return _Active(self.request[index], self.left[index], self.count[index])


class Decoding:
    """One call of generate: all requests, a fixed number of places."""

    def __init__(
        self, decoder: Decoder, requests: Sequence[Request], sampling: Sampling, *, num_places: int, stop_ids: Tensor
    ) -> None:
        self._decoder = decoder
        self._requests = requests
        self._sampling = sampling
        self._num_places = num_places
        self._stop_ids = stop_ids
        self._device = stop_ids.device
        decoder.start(max(len(request.prompt) + request.max_tokens for request in requests))
        longest = max(request.max_tokens for request in requests)
        rows = [request.row for request in requests]
        self._uniforms = uniforms(sampling.seed, rows, longest).to(self._device)
        self._waiting = 0
        self._active = self._rows([])
        self._trace: list[tuple[Tensor, Tensor, Tensor]] = []
        self._begin = time.perf_counter()
        self._seconds = [0.0] * len(requests)

    def run(self) -> list[Sample]:
        """Decode until every request is answered; return samples in the order of the requests."""
        tokens = torch.empty(0, dtype=torch.long, device=self._device)
        while True:
            if self._should_admit():
                tokens = torch.cat([tokens, self._admit()])
                tokens = self._settle(tokens)
                continue
            if not len(tokens):
                return self._samples()
            tokens = self._settle(self._sample(self._decoder.step(tokens), self._active))

    def _should_admit(self) -> bool:
        """Tell whether waiting requests enter now: many at a time, because every entry costs a prefill."""
        free = self._num_places - len(self._active.request)
        if self._waiting == len(self._requests) or not free:
            return False
        return free == self._num_places or (self._decoder.can_join and free * 8 >= self._num_places)

    def _admit(self) -> Tensor:
        """Let waiting requests in; equal prompts are computed once. Return the first token of each, [m]."""
        free = self._num_places - len(self._active.request)
        chosen = range(self._waiting, min(self._waiting + free, len(self._requests)))
        self._waiting = chosen.stop
        unique: dict[tuple[int, ...], int] = {}
        copies = [unique.setdefault(self._requests[i].prompt, len(unique)) for i in chosen]
        logits = self._decoder.add(list(unique), copies)
        new = self._rows(chosen)
        tokens = self._sample(logits, new)
        old = self._active
        self._active = _Active(
            torch.cat([old.request, new.request]),
            torch.cat([old.left, new.left]),
            torch.cat([old.count, new.count]),
        )
        return tokens

    def _sample(self, logits: Tensor, active: _Active) -> Tensor:
        """Pick a token for every row of `active`, and note it."""
        uniform = self._uniforms[active.request, active.count]
        tokens, logp = pick(logits, uniform, self._sampling)
        self._trace.append((active.request, tokens, logp))
        active.count = active.count + 1
        active.left = active.left - 1
        return tokens

    def _settle(self, tokens: Tensor) -> Tensor:
        """Take finished rows out; return the tokens of those that go on."""
        done = self._active.left == 0
        if len(self._stop_ids):
            done |= (tokens[:, None] == self._stop_ids).any(1)
        if not done.any():
            return tokens
        passed_s = time.perf_counter() - self._begin
        for request in self._active.request[done].tolist():
            self._seconds[request] = passed_s
        num_rows = len(done) - int(done.sum())
        targets = done[:num_rows].nonzero()[:, 0]
        sources = (~done[num_rows:]).nonzero()[:, 0] + num_rows
        self._decoder.move(sources, targets, num_rows)
        index = torch.arange(num_rows, device=self._device)
        index[targets] = sources
        self._active = self._active.select(index)
        return tokens[index]

    def _rows(self, requests: Sequence[int]) -> _Active:
        left = [self._requests[i].max_tokens for i in requests]
        index = torch.tensor(list(requests), dtype=torch.long, device=self._device)
        return _Active(index, torch.tensor(left, dtype=torch.long, device=self._device), torch.zeros_like(index))

    def _samples(self) -> list[Sample]:
        """Gather the trace by request: within one request the trace is in the order of time."""
        request = torch.cat([step[0] for step in self._trace])
        order = request.argsort(stable=True)
        ids = torch.cat([step[1] for step in self._trace])[order].cpu()
        logp = torch.cat([step[2] for step in self._trace])[order].cpu()
        lengths = request.bincount(minlength=len(self._requests)).tolist()
        stops = set(self._stop_ids.tolist())
        return [
            Sample(tokens := i.tolist(), p.tolist(), "stop" if tokens[-1] in stops else "length", seconds)
            for i, p, seconds in zip(ids.split(lengths), logp.split(lengths), self._seconds, strict=True)
        ]
