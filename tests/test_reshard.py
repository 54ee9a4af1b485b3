"""Resharded checkpoints: every value where it belongs, and training that goes on as if nothing had happened.

Losses agree to rounding in float32: another number of ranks adds the same terms in another order, and Adam's division
passes on the relative error of a gradient. A run that loses its moments is a thousand times further away.
"""

from __future__ import annotations

import json
import multiprocessing
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from rlctl_train.checkpoint import reshard as module
from rlctl_train.checkpoint.manifest import MANIFEST, damages, is_complete, read_manifest
from rlctl_train.checkpoint.reshard import reshard
from rlctl_train.checkpoint.sharded import Reader
from rlctl_train.checkpoint.shares import HostCopies, seal, tensors_of, told_of
from rlctl_train.checkpoint.store import CheckpointStore
from rlctl_train.config.errors import UserError
from tests.engine_support import make_batch, make_engine, make_model, train

RELATIVE = 1e-5
STEPS = 2
"""Optimizer steps between two changes of the number of ranks."""


def save(engine: Any, folder: Path, step: int = 1) -> Path:
    """Save a role of one rank as a run does; return the step folder."""
    store = CheckpointStore(folder, 9)
    aside = store.begin(step)
    written = {"actor": [engine.write_share(aside / "actor")]}
    seal(aside / "actor", written["actor"])
    (aside / "state.json").write_text('{"step": 1}')
    return store.commit(step, {"tensors": tensors_of(written), "metrics": {"a": 1.0}}, told_of(written))


def leg(rank: int, num_ranks: int, path: str, source: Path, target: Path, results: Any) -> None:
    """Go on from a checkpoint with one of several ranks, and save."""
    torch.set_num_threads(1)
    if dist.is_initialized():  # the fork's copy of a group of one, which an engine of an earlier test brought up
        dist.destroy_process_group()
    meeting = f"file://{target.parent}/meeting_{num_ranks}"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=num_ranks)
    engine = make_engine(path)
    engine.load(source / "actor")
    batch = make_batch()
    own = batch.rows(list(range(rank, len(batch), num_ranks)))
    losses = train(engine, own, STEPS)
    share = engine.copy_share(target / "actor", HostCopies())
    train(engine, own, 1)  # what is copied stays as it was
    shares: list[Any] = [None] * num_ranks
    dist.all_gather_object(shares, share.write())
    if rank == 0:
        seal(target / "actor", shares)
        written = {"actor": shares}
        manifest = {"step": 1, "files": told_of(written), "tensors": tensors_of(written)}
        (target / MANIFEST).write_text(json.dumps(manifest))
        results.put(losses)
    dist.barrier()
    dist.destroy_process_group()


def on_ranks(num_ranks: int, act: Callable[..., None], *arguments: Any) -> Any:
    """Run `act` once a rank, in forks of this process; return what rank 0 puts."""
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    ranks = [context.Process(target=act, args=(r, num_ranks, *arguments, results)) for r in range(num_ranks)]
    for process in ranks:
        process.start()
    answer = results.get(timeout=240)
    for process in ranks:
        process.join(60)
    assert [process.exitcode for process in ranks] == [0] * num_ranks
    return answer


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def saved(path: str, tmp_path: Path) -> Path:
    engine = make_engine(path)
    train(engine, make_batch(), STEPS)
    return save(engine, tmp_path / "checkpoints")


def test_training_goes_on_over_one_two_four_and_one_ranks(path: str, tmp_path: Path) -> None:
    whole = make_engine(path)
    train(whole, make_batch(), STEPS)
    step = save(whole, tmp_path / "checkpoints")
    expected = train(whole, make_batch(), 3 * STEPS)
    losses: list[float] = []
    for num_ranks in (2, 4):
        reshard(step, tmp_path / f"for_{num_ranks}", num_ranks)
        step = tmp_path / f"from_{num_ranks}"
        losses += on_ranks(num_ranks, leg, path, tmp_path / f"for_{num_ranks}", step)
    reshard(step, tmp_path / "for_1", 1)
    one = make_engine(path)
    one.load(tmp_path / "for_1" / "actor")
    losses += train(one, make_batch(), STEPS)
    assert losses == pytest.approx(expected, rel=RELATIVE)


def test_without_its_moments_the_same_run_would_go_elsewhere(path: str, saved: Path) -> None:
    engine = make_engine(path)
    engine.load(saved / "actor")
    other = make_engine(path)
    other.load(saved / "actor")
    for name, tensor in other._state().items():
        if ".exp_avg" in name:
            tensor.zero_()
    first, second = train(engine, make_batch(), STEPS), train(other, make_batch(), STEPS)
    assert second[1] != pytest.approx(first[1], rel=100 * RELATIVE)


@pytest.mark.parametrize("num_ranks", [1, 3, 64])
def test_any_number_of_ranks_holds_the_same_values(path: str, saved: Path, tmp_path: Path, num_ranks: int) -> None:
    reshard(saved, tmp_path / "made", num_ranks)
    first, second = make_engine(path), make_engine(path)
    first.load(saved / "actor")
    second.load(tmp_path / "made" / "actor")
    torch.testing.assert_close(second._state(), first._state(), rtol=0, atol=0)
    assert len(list((tmp_path / "made" / "actor").glob("*.distcp"))) == num_ranks


def test_each_rank_has_its_rows_in_a_file_of_its_own(saved: Path, tmp_path: Path) -> None:
    reshard(saved, tmp_path / "made", 2)
    entry = Reader(tmp_path / "made" / "actor").read_metadata().state_dict_metadata["model.model.embed_tokens.weight"]
    rows = entry.size[0]  # pyright: ignore[reportAttributeAccessIssue]
    pieces = read_manifest(tmp_path / "made")["tensors"]["actor/model.model.embed_tokens.weight"]  # type: ignore[index]
    assert [piece["file"] for piece in pieces] == ["actor/__0_0.distcp", "actor/__1_0.distcp"]
    assert [chunk.sizes[0] for chunk in entry.chunks] == [  # pyright: ignore[reportAttributeAccessIssue]
        -(-rows // 2),
        rows // 2,
    ]


def test_the_manifest_is_whole_and_keeps_what_was_measured(saved: Path, tmp_path: Path) -> None:
    reshard(saved, tmp_path / "made", 2)
    manifest = read_manifest(tmp_path / "made")
    assert manifest is not None and manifest["step"] == 1 and manifest["metrics"] == {"a": 1.0}
    assert list(damages(tmp_path / "made", manifest)) == []
    assert manifest["tensors"].keys() == read_manifest(saved)["tensors"].keys()  # type: ignore[index]
    assert (tmp_path / "made" / "state.json").read_text() == '{"step": 1}'


def test_a_flipped_bit_in_the_source_is_found_and_nothing_appears(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rlctl_train.checkpoint.manifest.HASHED_BYTES", 0)
    shard = saved / "actor" / "__0_0.distcp"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    with pytest.raises(UserError, match="does not have the checksum"):
        reshard(saved, tmp_path / "made", 2)
    assert not (tmp_path / "made").exists() and not list(tmp_path.glob(".made*"))


def test_one_whole_tensor_at_a_time_is_in_memory(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alive = []
    read = module._read

    def counted(*arguments: Any) -> Any:
        whole = read(*arguments)
        assert sum(reference() is not None for reference in alive) <= 1
        alive.append(weakref.ref(whole))
        return whole

    monkeypatch.setattr(module, "_read", counted)
    reshard(saved, tmp_path / "made", 2)
    assert len(alive) > 10


def test_what_is_there_already_is_left_alone(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "made").mkdir()
    with pytest.raises(UserError, match="is there already"):
        reshard(saved, tmp_path / "made", 2)
    with pytest.raises(UserError, match="is no checkpoint of rlctl"):
        reshard(tmp_path / "made", tmp_path / "other", 2)
    assert is_complete(saved)
