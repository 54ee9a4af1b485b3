"""A few sequences with the trainer's own log-probabilities, kept beside weights: what a reader of them must reproduce.

`probe.json` is {"schema_version", "temperature", "sequences": [{"prompt_ids", "response_ids", "logp"}]}; `logp` are in
nats, one a response token, computed with the weights that lie beside it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from rlctl_train.batch import Batch, length_mask

PROBE = "probe.json"
NUM_SEQUENCES = 4
TEMPERATURE = 1.0
COLUMNS = ("prompt_ids", "prompt_len", "response_ids", "response_len")

Probe = dict[str, Any]


def probe_rows(batch: Batch) -> Batch:
    """Return the first rows of a batch, to be asked about later: every token of each response."""
    rows = batch.rows(list(range(min(NUM_SEQUENCES, len(batch)))))
    kept = Batch({name: rows[name].clone() for name in COLUMNS})
    return kept.with_columns(response_mask=length_mask(kept["response_len"], kept["response_ids"].shape[1]))


def make_probe(rows: Batch, logp: Tensor) -> Probe:
    """Return the content of `probe.json`; `logp` is [S, T], for the rows [S]."""
    sequences = []
    for row in range(len(rows)):
        prompt, response = int(rows["prompt_len"][row]), int(rows["response_len"][row])
        sequences.append(
            {
                "prompt_ids": rows["prompt_ids"][row, :prompt].tolist(),
                "response_ids": rows["response_ids"][row, :response].tolist(),
                "logp": logp[row, :response].tolist(),
            }
        )
    return {"schema_version": 1, "temperature": TEMPERATURE, "sequences": sequences}


def read_probe(folder: Path) -> Probe | None:
    """Return the probe that lies in a folder, if one does."""
    path = folder / PROBE
    return json.loads(path.read_text()) if path.exists() else None
