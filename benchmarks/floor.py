"""The least a step can take: its floating-point operations over what the cores reach in a plain matrix product."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from workloads import GROUP_SIZE, MODELS, NUM_PROMPTS, PROMPTS

from rlctl_train.config.vocab import VOCAB

TEMPLATE_TOKENS = 3
"""Markers the chat template adds to a prompt: user, end, assistant."""


@dataclass(frozen=True)
class Floor:
    """Seconds a step would take at the rate of a plain matrix product, by phase."""

    generation_s: float
    update_s: float


def matmul_flops_per_s(threads: int, size: int = 1024, repeats: int = 8) -> float:
    """Return the best rate of a float32 product of two square matrices."""
    torch.set_num_threads(threads)
    a, b = torch.randn(size, size), torch.randn(size, size)
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        torch.mm(a, b)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def floor(model: str, response_tokens: float, rate: float) -> Floor:
    """Return the floor of one step with `response_tokens` sampled tokens over all sequences.

    Matrix products only: 2 operations per parameter and token forward, 4 backward. Prompts are prefilled once per
    group when generating and read by every sequence when training; the output projection is counted where a token is
    predicted; attention scores count 4 x width per pair of tokens seen, with sequences of the mean length.
    """
    hidden, layers, heads, kv_heads, inner = MODELS[model]
    head = hidden // heads
    body = layers * (hidden * head * (heads + 2 * kv_heads) + heads * head * hidden + 3 * hidden * inner)
    output = hidden * len(VOCAB)
    prompt = sum(len(text) for text in PROMPTS) / NUM_PROMPTS + TEMPLATE_TOKENS
    sequences = NUM_PROMPTS * GROUP_SIZE
    response = response_tokens / sequences
    pairs_trained = sequences * (prompt + response) ** 2 / 2
    pairs_generated = NUM_PROMPTS * prompt**2 / 2 + sequences * response * (prompt + response / 2)
    attention = 4 * layers * heads * head
    generated = 2 * body * (NUM_PROMPTS * prompt + response_tokens) + 2 * output * response_tokens
    trained = 2 * body * (sequences * prompt + response_tokens) + 2 * output * response_tokens
    return Floor(
        generation_s=(generated + attention * pairs_generated) / rate,
        update_s=3 * (trained + attention * pairs_trained) / rate,
    )
