"""Whether a merged model says what the trainer's did: log-probabilities of recorded sequences, computed again.

`probe.json` holds token sequences with the log-probability that the trainer gave each response token: log-softmax of
logits / temperature, in float32. B: sequences; T: tokens of a response.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM

from rlctl_train.checkpoint.probe import PROBE
from rlctl_train.config.errors import FAILED, UserError

MEAN_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4, torch.float16: 0.02, torch.bfloat16: 0.05}
"""Largest mean absolute difference, in nats a token, that rounding explains."""


@dataclass(frozen=True)
class Recorded:
    """One recorded sequence."""

    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    logp: tuple[float, ...]
    """Of each response token, [T]."""


@dataclass(frozen=True)
class Agreement:
    """How far the model's log-probabilities are from the recorded ones, over all response tokens."""

    probe: Path
    num_sequences: int
    num_tokens: int
    mean_abs: float
    max_abs: float
    dtype: torch.dtype
    tolerance: float
    """Of the mean."""

    @property
    def within(self) -> bool:
        """Say whether the mean is within the tolerance."""
        return self.mean_abs <= self.tolerance


def find_probe(folders: Iterable[Path]) -> Path:
    """Return the first recording in the folders."""
    looked = list(folders)
    for folder in looked:
        if (folder / PROBE).is_file():
            return folder / PROBE
    places = ", ".join(str(folder) for folder in looked)
    raise UserError(f"there is no {PROBE} in {places}", "name the recording with --probe FILE")


def agreement(folder: Path, probe: Path, *, trust_remote_code: bool = False) -> Agreement:
    """Load a Hugging Face folder on the CPU in its own dtype and hold it against the recording."""
    temperature, sequences = _read(probe)
    transformers.utils.logging.disable_progress_bar()
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", trust_remote_code=trust_remote_code)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(
            f"transformers does not load {folder}: {error}", "merge the checkpoint anew", exit_code=FAILED
        ) from error
    model.eval()
    apart = torch.cat([_apart(model, sequence, temperature) for sequence in sequences])
    tolerance = MEAN_TOLERANCE.get(model.dtype, MEAN_TOLERANCE[torch.bfloat16])
    return Agreement(probe, len(sequences), len(apart), float(apart.mean()), float(apart.max()), model.dtype, tolerance)


@torch.no_grad()
def _apart(model: Any, sequence: Recorded, temperature: float) -> torch.Tensor:
    """Return the absolute differences of one sequence, [T]; infinite where the model's is not a number."""
    ids = torch.tensor([[*sequence.prompt_ids, *sequence.response_ids]])
    logits = model(ids, use_cache=False).logits[0, len(sequence.prompt_ids) - 1 : -1].float()
    logp = torch.log_softmax(logits / temperature, dim=-1)
    told = logp.gather(1, torch.tensor(sequence.response_ids).unsqueeze(1)).squeeze(1)
    return (told - torch.tensor(sequence.logp)).abs().nan_to_num(torch.inf)


def _read(probe: Path) -> tuple[float, Sequence[Recorded]]:
    try:
        content = json.loads(probe.read_text(encoding="utf-8"))
        temperature = float(content["temperature"])
        sequences = [
            Recorded(tuple(one["prompt_ids"]), tuple(one["response_ids"]), tuple(map(float, one["logp"])))
            for one in content["sequences"]
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{probe} is no recording: {type(error).__name__}: {error}", "name another with --probe"
        ) from error
    if not sequences or any(
        not one.prompt_ids or not one.response_ids or len(one.response_ids) != len(one.logp) for one in sequences
    ):
        what = f"{probe} has a sequence without prompt or response, or without one log-probability a token"
        raise UserError(what, "name another with --probe")
    return temperature, sequences
