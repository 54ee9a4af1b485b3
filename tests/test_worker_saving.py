"""A worker's part of a save: both ways write the same, the disk is named, and the probe is of the weights saved."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import pytest
import torch

from rlctl_train.checkpoint.probe import probe_rows
from rlctl_train.checkpoint.shares import seal
from rlctl_train.checksum import checksum
from rlctl_train.config import RunConfig
from rlctl_train.config.errors import UserError
from rlctl_train.sync.buckets import PackedBucket, unpack
from rlctl_train.workers import EngineWorker, WorkerSpec
from tests import runs
from tests.engine_support import make_batch, make_engine, make_model, train


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_model(tmp_path_factory.mktemp("model"))


def worker(path: str, *, asynchronous: bool = True) -> EngineWorker:
    config = RunConfig.model_validate(runs.CONFIG | {"checkpoint": {"asynchronous": asynchronous}})
    made = EngineWorker(WorkerSpec(config, runs.PLAN, path, path, 8), "actor", 0, 1)
    made._engine = make_engine(path)
    return made


@pytest.mark.parametrize("asynchronous", [True, False])
def test_what_was_held_at_the_save_is_written_whichever_way(path: str, tmp_path: Path, asynchronous: bool) -> None:
    saver = worker(path, asynchronous=asynchronous)
    train(saver._engine, make_batch(), 2)
    held = {name: tensor.clone() for name, tensor in saver._engine._state().items()}
    saver.save(tmp_path)
    train(saver._engine, make_batch(), 1)
    written = saver.written(True)
    assert written is not None and written.files.keys() == {"__0_0.distcp"}
    seal(tmp_path / "actor", [written])
    again = make_engine(path)
    again.load(tmp_path / "actor")
    state = again._state() | {"schedule": torch.tensor(2)}
    torch.testing.assert_close(state, held | {"schedule": torch.tensor(2)}, rtol=0, atol=0)
    assert train(again, make_batch(), 1) != train(make_engine(path), make_batch(), 1)


def test_what_is_saved_is_counted_before(path: str, tmp_path: Path) -> None:
    saver = worker(path)
    saver.save(tmp_path)
    written = saver.written(True)
    assert written is not None
    stored = sum(piece.bytes for piece in written.pieces)
    assert 0.2 * stored < saver.state_bytes() < stored  # small tensors: most is what torch writes around each


def test_a_disk_that_refuses_is_named_with_the_step(path: str, tmp_path: Path) -> None:
    (tmp_path / ".step_000007.writing").touch()
    with pytest.raises(UserError, match=f"the checkpoint of step 7 could not be written to {tmp_path}: Not a dir"):
        worker(path).save(tmp_path / ".step_000007.writing")


def test_the_probe_holds_every_token_of_the_first_responses(path: str) -> None:
    asked, batch = worker(path), make_batch()
    assert asked.probe()["sequences"] == []
    asked._probed = probe_rows(batch)
    sequences = asked.probe()["sequences"]
    assert [len(sequence["logp"]) for sequence in sequences] == batch["response_len"][:4].tolist()
    logp, _ = asked._engine.logprobs(batch, 1.0)
    kept = batch["response_mask"][0].bool()
    torch.testing.assert_close(torch.tensor(sequences[0]["logp"]), logp[0][kept], rtol=1e-5, atol=1e-6)


def test_what_is_streamed_of_an_exported_folder_is_what_lies_there(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rlctl_train.engines.export.FILE_BYTES", 20_000)  # several files
    trainer = worker(path)
    trainer._engine.export(tmp_path / "hf")
    assert len(list((tmp_path / "hf").glob("model-*.safetensors"))) > 1
    there = {name: tensor.clone() for name, tensor in trainer._engine.weights()}
    train(trainer._engine, make_batch(), 1)
    *sent, told = trainer.stream_weights("float32", tmp_path / "hf")
    streamed = {name: tensor for bucket in sent for name, tensor in unpack(cast(PackedBucket, bucket))}
    torch.testing.assert_close(streamed, there, rtol=0, atol=0)
    assert told == checksum(there.items(), torch.float32) != checksum(trainer._engine.weights(), torch.float32)
