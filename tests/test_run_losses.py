"""Whole runs with a loss that chooses tokens of the whole mini-batch: on one rank and on two the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests import runs

pytestmark = pytest.mark.long

LOSSES: list[dict[str, Any]] = [
    {"type": "clip_cov", "token_share": 0.1, "cov_low": 0.01},
    {"type": "kl_cov", "token_share": 0.1},
]


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss["type"])
def test_a_run_chooses_the_same_tokens_on_one_rank_and_on_two(tmp_path: Path, loss: dict[str, Any]) -> None:
    traces = []
    for ranks, budget in ((1, 256), (2, 60)):
        files = runs.make_run(
            tmp_path / str(ranks),
            plan={"trainer_devices": ranks, "max_tokens_per_micro_batch": budget},
            algo={"type": "grpo", "group_size": 4, "loss": loss},
            trainer={"num_steps": 3, "mini_batches_per_step": 2},
            validation={"every_steps": 0},
        )
        assert runs.run(files) == 0, runs.log(files)
        names = ("actor/pg_covfrac", "actor/pg_loss", "actor/grad_norm")
        traces.append([line[name] for line in runs.lines(files) for name in names])
    assert max(traces[0][::3]) > 0.05
    assert traces[1] == pytest.approx(traces[0], rel=1e-3, abs=1e-5)
