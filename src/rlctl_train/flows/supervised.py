"""The supervised step: cross-entropy on the completion tokens of given responses."""

from __future__ import annotations

from collections.abc import Sequence

from rlctl_train.data.loader import PromptRow
from rlctl_train.flows.verbs import SupervisedRun


def step(run: SupervisedRun, rows: Sequence[PromptRow]) -> None:
    """Read rows and learn from their responses."""
    batch = run.read(rows)
    run.update_supervised(batch)
