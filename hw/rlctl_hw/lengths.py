"""How long prompts and responses are: nobody knows before the run, so a distribution is assumed and said.

Responses are taken as exponentially distributed around their mean and cut at the longest: most are short, and the
longest of many is several times the mean. That longest one rules generation.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import exp, log

from rlctl_hw.types import Workload

PROMPT_SHARE = 0.5
RESPONSE_SHARE = 0.4
"""Of the longest allowed; published runs show 0.27 (GSM8K at 1024 tokens) to 0.52 (long reasoning at 27 thousand)."""
EULER = 0.5772


@dataclass(frozen=True)
class Lengths:
    """Tokens per sequence of a step with `num` sequences."""

    num: int
    prompt: float
    mean: float
    """Of responses."""
    longest: float
    """Expected length of the longest response."""
    square: float
    """Mean of the squared length of prompt and response."""
    capped_share: float
    """Share of responses that reach the longest allowed length."""


def lengths(workload: Workload) -> Lengths:
    """Return the assumed lengths of a step, around `mean_response_tokens` where that is given."""
    cap, prompt = workload.max_response_tokens, PROMPT_SHARE * workload.max_prompt_tokens
    mean = float(min(cap, workload.mean_response_tokens or RESPONSE_SHARE * cap))
    num = max(1, workload.step_sequences)
    longest = min(float(cap), mean * (log(num) + EULER)) if num > 1 else mean
    spread = min(mean**2, (cap - mean) * mean)
    return Lengths(
        num=num,
        prompt=prompt,
        mean=mean,
        longest=max(mean, longest),
        square=(prompt + mean) ** 2 + spread,
        capped_share=exp(-cap / mean),
    )
