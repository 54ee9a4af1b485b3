"""Real runs that go on with another number of ranks: the same losses as the uninterrupted run, to rounding.

The tolerance is that of float32 (epsilon 1.2e-7): another number of ranks, and another micro-batch budget, add the same
terms in another order, and Adam's division passes on the relative error of a gradient. After a few steps of such
small models the values agree to about 5e-7; the bounds leave a factor of ten. A run that loses its moments is a
thousand times further away.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from rlctl import app
from rlctl_train.checkpoint.sharded import load_sharded, save_sharded
from rlctl_train.checkpoint.store import CheckpointStore
from rlctl_train.config.layout import RunFiles, write_json
from tests import runs

pytestmark = pytest.mark.long

RELATIVE, ABSOLUTE = 5e-6, 1e-6
NAMES = (
    "actor/pg_loss", "actor/kl_loss", "actor/entropy", "actor/grad_norm", "actor/lr", "critic/vf_loss",
    "critic/grad_norm", "critic/score/mean", "response_length/mean", "perf/total_num_tokens",
)  # fmt: skip
SECTIONS: dict[str, Any] = {
    "algo": {"type": "ppo", "group_size": 2, "critic_optim": {"lr": 1e-3}, "kl_loss_coef": 0.05},
    "trainer": {
        "num_steps": 6,
        "mini_batches_per_step": 2,
        "optim": {"lr": 1e-2, "schedule": "linear", "warmup_steps": 2},
    },
    "validation": {"every_steps": 0},
    "checkpoint": {"every_steps": 2, "keep_last": 9, "export_hf": False},
}
MODELS = {"every weight": {}, "lora": {"model": {**runs.CONFIG["model"], "lora": {"rank": 2, "alpha": 4}}}}


@pytest.fixture(scope="module", autouse=True)
def own_settings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RLCTL_HOME", str(tmp_path_factory.mktemp("home")))
        yield


def uninterrupted(folder: Path, model: str) -> RunFiles:
    files = runs.make_run(folder / "whole", **SECTIONS, **MODELS[model])
    assert runs.run(files) == 0, runs.log(files)
    return files


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> RunFiles:
    return uninterrupted(tmp_path_factory.mktemp("ppo"), "every weight")


def stopped_at(step: int, files: RunFiles, folder: Path) -> RunFiles:
    """Copy a run as it was when it was told to stop after a step."""
    shutil.copytree(files.root, folder)
    copy = RunFiles(folder)
    for later in copy.checkpoints.glob("step_*"):
        if later.name > f"step_{step:06d}":
            shutil.rmtree(later)
    copy.summary.unlink()
    write_json(copy.status, {"schema_version": 1, "state": "stopped", "step": step, "num_steps": 6})
    return copy


def resumed(files: RunFiles, *words: str) -> RunFiles:
    """Continue a run to its end as a person does."""
    assert app.run(["runs", "resume", str(files.root), *words]) == 0, runs.log(files)
    return files


def trace(files: RunFiles) -> dict[str, list[float]]:
    return {name: [line[name] for line in runs.lines(files)] for name in NAMES}


def check_same(files: RunFiles, whole: RunFiles) -> None:
    for name, values in trace(files).items():
        assert values == pytest.approx(trace(whole)[name], rel=RELATIVE, abs=ABSOLUTE), name


def num_trainers(files: RunFiles) -> int:
    return sum(name.startswith("actor") for name in json.loads((files.logs / "workers.json").read_text()))


def test_ppo_goes_on_with_two_ranks_and_then_with_one_as_if_nothing_had_happened(
    whole: RunFiles, tmp_path: Path
) -> None:
    two = resumed(stopped_at(2, whole, tmp_path / "two"), "trainer.num_devices=2")
    one = resumed(stopped_at(4, two, tmp_path / "one"), "trainer.num_devices=1")
    assert [num_trainers(files) for files in (whole, two, one)] == [1, 2, 1]
    check_same(two, whole)
    check_same(one, whole)


def test_a_run_whose_moments_are_lost_is_told_from_one_that_keeps_them(whole: RunFiles, tmp_path: Path) -> None:
    lost = stopped_at(2, whole, tmp_path / "lost")
    drop_moments(lost)
    resumed(lost, "trainer.num_devices=2")
    # In the first step after it the batch is still the same: only each role's own second update has gone elsewhere.
    for name in ("actor/kl_loss", "critic/vf_loss"):
        assert trace(lost)[name][:2] == trace(whole)[name][:2]
        assert trace(lost)[name][2] != pytest.approx(trace(whole)[name][2], rel=100 * RELATIVE), name


def test_adapters_go_on_with_two_ranks(tmp_path: Path) -> None:
    whole = uninterrupted(tmp_path, "lora")
    two = resumed(stopped_at(2, whole, tmp_path / "two"), "trainer.num_devices=2")
    assert num_trainers(two) == 2
    check_same(two, whole)


def drop_moments(files: RunFiles) -> None:
    """Write the last checkpoint anew, with the optimizer's moments at zero."""
    store = CheckpointStore(files.checkpoints, 9)
    last = store.latest()
    assert last is not None
    with store.writing(2) as folder:
        shutil.copy2(last / "state.json", folder)
        for role in ("actor", "critic"):
            stored = FileSystemReader(last / role).read_metadata().state_dict_metadata
            tensors = {
                name: torch.zeros(entry.size, dtype=entry.properties.dtype)
                for name, entry in stored.items()
                if isinstance(entry, TensorStorageMetadata)
            }
            load_sharded({n: t for n, t in tensors.items() if ".exp_avg" not in n}, last / role)
            save_sharded(tensors, folder / role)
