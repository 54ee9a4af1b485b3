"""The workloads both systems run, and the line protocol between the race and its runners.

A runner is a process that gets set up once, then reads `N` from standard input, takes N training steps, and prints one
JSON line with seconds and tokens. The race starts both runners and gives them turns.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass

NUM_PROMPTS = 8
GROUP_SIZE = 8
PROMPTS = [f"{3 * i + 11}+{7 * i + 20}=" for i in range(NUM_PROMPTS)]
MODELS = {
    # name: hidden_size, num_layers, num_heads, num_kv_heads, intermediate_size
    "1m": (128, 4, 4, 2, 512),
    "5m": (256, 5, 8, 4, 1024),
}


@dataclass(frozen=True)
class Workload:
    """Response lengths: `fixed` ignores the end token; otherwise a response ends when the model ends it."""

    name: str
    max_tokens: int
    fixed: bool


WORKLOADS = {
    "fixed": Workload("fixed", 32, fixed=True),
    # Random weights end a response with a chance of about 1/103 a token (the size of the vocabulary), so that
    # lengths spread from 1 to the limit with a mean of about a third of it.
    "spread": Workload("spread", 288, fixed=False),
}


@dataclass
class Turn:
    """What one turn took: all of it, the part spent generating, the part in forward and backward, and tokens."""

    steps: int
    seconds: float = 0.0
    generation_s: float = 0.0
    update_s: float = 0.0
    response_tokens: int = 0


def turns() -> Iterator[int]:
    """Yield the number of steps of each turn as the race asks for it."""
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        yield int(line)


def report(turn: Turn) -> None:
    """Tell the race what a turn took."""
    print(json.dumps(asdict(turn)), flush=True)
