"""What pairs need of engines: margins over ranks, and a reference that becomes the policy, also after a resume."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from rlctl_train.algos.objective import PolicyObjective
from rlctl_train.batch import Batch
from rlctl_train.checksum import checksum
from rlctl_train.config.losses import DpoLoss
from rlctl_train.config.preference import SpinConfig
from rlctl_train.registry import LOSSES, load
from rlctl_train.sync.buckets import buckets, pack, unpack
from tests import runs
from tests.engine_support import gradients, make_batch, make_engine, make_model, policy_objective, weights

DTYPES = ("float32", "bfloat16")


def _trained(path: str, batch: Batch, dtype: str) -> Any:
    """Return an actor that took a step, and so differs from its model's folder."""
    actor = make_engine(path, compute_dtype=dtype)
    actor.forward_backward(batch, policy_objective)
    actor.optim_step()
    return actor


def _refresh(reference: Any, actor: Any) -> None:
    """Stream weights as the controller does: packed, in buckets, in float32."""
    for bucket in buckets(actor.weights(), 4096):
        reference.take_weights(unpack(pack(bucket, torch.float32)))


def _answers(path: str, batch: Batch, dtype: str) -> dict[str, Any]:
    """Return what a reference says before and after it was refreshed from an actor, and what the actor says."""
    actor, reference = (
        _trained(path, batch, dtype),
        make_engine(path, role="reference", optim=None, compute_dtype=dtype),
    )
    before = reference.logprobs(batch, 1.0)[0]  # leaves the last weights of a pass gathered
    _refresh(reference, actor)
    answers = {"before": before, "after": reference.logprobs(batch, 1.0)[0], "actor": actor.logprobs(batch, 1.0)[0]}
    sums = {f"sum {who}": checksum(one.weights(), torch.float32) for who, one in (("ref", reference), ("actor", actor))}
    return answers | sums | {"weights": weights(reference)}


def _check(answers: dict[str, Any]) -> None:
    assert (answers["after"] - answers["before"]).abs().max() > 1e-3
    torch.testing.assert_close(answers["after"], answers["actor"], rtol=0, atol=0)
    assert answers["sum ref"] == answers["sum actor"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_refreshed_reference_answers_as_the_policy(tmp_path: Path, dtype: str) -> None:
    _check(_answers(make_model(tmp_path / "model"), make_batch(), dtype))


def test_a_refreshed_reference_is_saved_and_loaded(tmp_path: Path) -> None:
    path, batch = make_model(tmp_path / "model"), make_batch()
    reference = make_engine(path, role="reference", optim=None)
    _refresh(reference, _trained(path, batch, "float32"))
    reference.save(tmp_path / "saved")
    again = make_engine(path, role="reference", optim=None)
    again.load(tmp_path / "saved")
    torch.testing.assert_close(again.logprobs(batch, 1.0), reference.logprobs(batch, 1.0), rtol=0, atol=0)


def _pair_step(path: str, own: Batch, budget: int) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """Return metrics and gradient of DPO on 5 pairs, the last of equal scores."""
    config = SpinConfig(loss=DpoLoss(beta=0.5))
    objective = PolicyObjective(load(LOSSES, "dpo")(config.loss), config, max_response_tokens=12)
    engine = make_engine(path, max_tokens_per_micro_batch=budget)
    metrics = engine.forward_backward(own, objective, 0.8)
    return metrics, gradients(engine)


def _pairs() -> Batch:
    batch, side = make_batch(), torch.tensor([1.0, -1, -1, 1, 1, -1, 1, -1, 0, 0])
    rows = torch.arange(10)
    numbers = {"group": rows // 2, "row": rows, "policy_version": torch.zeros_like(rows)}
    advantages = side[:, None] * batch["response_mask"]
    return batch.with_columns(advantages=advantages, ref_logp=batch["weight"] / 3 - 4, **numbers)


def test_pairs_are_learnt_from_alike_however_passes_cut_them(tmp_path: Path) -> None:
    path = make_model(tmp_path / "model")
    metrics, grads = _pair_step(path, _pairs(), 1000)
    assert metrics["actor/pair_tied"] > 0 and 0 < metrics["actor/pair_right"] < 1
    for budget in (45, 20):
        again, others = _pair_step(path, _pairs(), budget)
        assert again == pytest.approx(metrics, rel=1e-5)
        torch.testing.assert_close(others, grads, rtol=1e-4, atol=2e-6)


def _run_rank(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    own = make_batch().rows(list(range(rank, 10, 2)))
    results: dict[str, Any] = {dtype: _answers(str(folder / "model"), own, dtype) for dtype in DTYPES}
    # Every pair has one response on each rank.
    results["pairs"] = _pair_step(str(folder / "model"), _pairs().rows(list(range(rank, 10, 2))), 45)
    torch.save(results, folder / f"results_{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_may_part_pairs_and_each_takes_its_part_of_the_weights(tmp_path: Path) -> None:
    path = make_model(tmp_path / "model")
    mp.spawn(_run_rank, (tmp_path,), nprocs=2)  # type: ignore[attr-defined]
    alone = weights(_trained(path, make_batch(), "float32"))
    metrics, grads = _pair_step(path, _pairs(), 1000)
    for rank in range(2):
        results = torch.load(tmp_path / f"results_{rank}.pt")
        for dtype in DTYPES:
            _check(results[dtype])
        torch.testing.assert_close(results["float32"]["weights"], alone, rtol=1e-3, atol=1e-4)
        assert results["pairs"][0] == pytest.approx(metrics, rel=1e-5)
        torch.testing.assert_close(results["pairs"][1], grads, rtol=1e-4, atol=2e-6)


def _spin_run(root: Path) -> runs.RunFiles:
    algo, trainer = {"type": "spin", "refresh_every_steps": 2}, {"num_steps": 6, "prompts_per_step": 8}
    return runs.make_run(root, algo=algo, trainer=trainer, validation={"every_steps": 0})


@pytest.mark.long
def test_in_a_run_the_policy_becomes_its_reference_and_a_resume_remembers_it(tmp_path: Path) -> None:
    whole, parted = _spin_run(tmp_path / "whole"), _spin_run(tmp_path / "parted")
    assert runs.run(whole) == 0, runs.log(whole)
    process = runs.start(parted)
    runs.wait_for_step(parted, process, 3)
    process.send_signal(signal.SIGTERM)
    assert process.wait(120) == 130 and runs.run(parted) == 0, runs.log(parted)
    margins, resumed = ([line["actor/pair_margin"] for line in runs.lines(files)] for files in (whole, parted))
    assert all(line["actor/grad_norm"] > 0 for line in runs.lines(whole)), "nothing is learnt: nothing is compared"
    assert all(abs(margin) < 1e-6 for margin in margins[::2]), "after a refresh the policy is its own reference"
    assert all(abs(margin) > 1e-6 for margin in margins[1::2])
    assert resumed == margins and runs.learning_trace(parted) == runs.learning_trace(whole)
