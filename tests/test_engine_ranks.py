"""Two ranks give what one gives: loss, gradients, weights; and checkpoints move between both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from rlctl_train.algos.objective import PolicyObjective
from rlctl_train.batch import Batch
from rlctl_train.config.algo import GrpoConfig
from rlctl_train.config.losses import ClipCovLoss, KlCovLoss
from rlctl_train.engines.sharding import full
from rlctl_train.registry import LOSSES, load
from tests.engine_support import (
    gradients,
    make_batch,
    make_engine,
    make_model,
    policy_objective,
    reference,
    train,
    value_objective,
    weights,
)

CLOSE = {"rtol": 1e-4, "atol": 2e-6}
SHARES = {
    "even": ([0, 2, 4, 6, 8], [1, 3, 5, 7, 9]),
    "uneven": ([5], [0, 1, 2, 3, 4, 6, 7, 8, 9]),
    "none": ([], list(range(10))),
}
CASES: list[dict[str, Any]] = [
    {"tied": tied, "share": share, "max_tokens_per_micro_batch": budget, "packing": packing}
    for tied in (True, False)
    for budget in (1000, 45, 20)
    for packing in (True, False)
    for share in (("even", "uneven", "none") if packing and budget == 45 else ("uneven",))
]


COVARIANCE_LOSSES = (ClipCovLoss(token_share=0.1, cov_low=0.0), KlCovLoss(token_share=0.1))


def covariance_objective(loss: ClipCovLoss | KlCovLoss) -> PolicyObjective:
    """Make an objective that chooses a few tokens of the whole mini-batch."""
    return PolicyObjective(load(LOSSES, loss.type)(loss), GrpoConfig(loss=loss), max_response_tokens=12)


def sampled(batch: Batch) -> Batch:
    """Return the batch as if some engine had sampled it: with advantages, old log-probabilities and row numbers."""
    rows = torch.arange(len(batch))
    columns = {"advantages": batch["weight"], "old_logp": batch["weight"] / 3 - 4}
    return batch.with_columns(**columns, row=rows, policy_version=torch.full_like(rows, 2))


def run_rank(rank: int, folder: Path) -> None:
    """Do everything a second rank is needed for, once, and leave the results in files."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    batch, results = make_batch(), {}
    paths = {True: str(folder / "tied"), False: str(folder / "untied")}
    for number, case in enumerate(CASES):
        case = dict(case)
        path, own = paths[case.pop("tied")], batch.rows(SHARES[case.pop("share")][rank])
        if not len(own):
            own = Batch({})
        engine = make_engine(path, **case)
        logp, _ = engine.logprobs(own, 0.8)
        metrics = engine.forward_backward(own, policy_objective, 0.8)
        results[number] = (logp, metrics, gradients(engine), engine.optim_step(), weights(engine))
    own = batch.rows(SHARES["even"][rank])

    for loss in COVARIANCE_LOSSES:
        for share, rows in SHARES.items():
            engine = make_engine(paths[True], max_tokens_per_micro_batch=45)
            given = sampled(batch).rows(rows[rank]) if rows[rank] else Batch({})
            metrics = engine.forward_backward(given, covariance_objective(loss), 0.8)
            results[loss.type, share] = (metrics, gradients(engine))

    critic = make_engine(paths[True], role="critic", max_tokens_per_micro_batch=45)
    results["critic"] = (critic.forward_backward(own, value_objective), gradients(critic))

    half = make_engine(paths[False], compute_dtype="bfloat16")
    half.forward_backward(own, policy_objective)
    results["bfloat16"] = (gradients(half), half.logprobs(own, 1.0)[0])

    two = make_engine(paths[True])
    train(two, own, 2)
    two.save(folder / "from_two")
    results["saved"] = whole_state(two)
    results["continued"] = (train(two, own, 2), weights(two))
    again = make_engine(paths[True])
    again.load(folder / "from_two")
    results["resumed"] = (train(again, own, 2), weights(again))
    again.export(folder / "hf")

    loaded = make_engine(paths[True])
    loaded.load(folder / "from_one")
    results["from_one"] = (whole_state(loaded), train(loaded, own, 2))
    torch.save(results, folder / f"results_{rank}.pt")
    dist.destroy_process_group()


def whole_state(engine: Any) -> dict[str, torch.Tensor]:
    """Return weights and optimizer state by name, unsharded."""
    return {name: full(tensor).clone() for name, tensor in engine._state().items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    make_model(folder / "tied", tie_embeddings=True)
    make_model(folder / "untied", tie_embeddings=False)
    one = make_engine(str(folder / "tied"))
    train(one, make_batch(), 2)
    one.save(folder / "from_one")
    mp.spawn(run_rank, (folder,), nprocs=2)  # type: ignore[attr-defined]
    return folder


@pytest.fixture(scope="module")
def results(folder: Path) -> list[dict[Any, Any]]:
    return [torch.load(folder / f"results_{rank}.pt") for rank in range(2)]


@pytest.fixture(scope="module")
def expected(folder: Path) -> dict[bool, Any]:
    return {
        tied: reference(str(folder / name), make_batch(), 0.8) for tied, name in ((True, "tied"), (False, "untied"))
    }


@pytest.mark.parametrize("number", range(len(CASES)), ids=[" ".join(map(str, case.values())) for case in CASES])
def test_loss_and_gradients_do_not_depend_on_ranks_cuts_and_layout(
    results: list[dict[Any, Any]], expected: dict[bool, Any], number: int
) -> None:
    logp, _, loss, grads = expected[CASES[number]["tied"]]
    for rank, rows in enumerate(SHARES[CASES[number]["share"]]):
        own_logp, metrics, own_grads, _, _ = results[rank][number]
        assert metrics["loss"] == pytest.approx(loss, rel=1e-5)
        assert metrics["rows"] == 10
        torch.testing.assert_close(own_grads, grads, **CLOSE)
        assert len(own_logp) == len(rows)
        if rows:
            torch.testing.assert_close(own_logp, logp[rows], **CLOSE)


def test_ranks_agree_on_norm_and_weights_after_a_step(results: list[dict[Any, Any]], folder: Path) -> None:
    alone = make_engine(str(folder / "tied"), max_tokens_per_micro_batch=45)
    alone.forward_backward(make_batch(), policy_objective, 0.8)
    norm = alone.optim_step()["grad_norm"]
    case = next(i for i, case in enumerate(CASES) if case["tied"] and case["share"] == "none")
    steps = [result[case][3] for result in results]
    assert steps[0] == steps[1]
    assert steps[0]["grad_norm"] == pytest.approx(norm, rel=1e-5)
    torch.testing.assert_close(results[0][case][4], results[1][case][4], rtol=0, atol=0)


@pytest.mark.parametrize("loss", COVARIANCE_LOSSES, ids=lambda loss: loss.type)
@pytest.mark.parametrize("share", SHARES)
def test_tokens_chosen_of_the_whole_mini_batch_are_the_same_on_two_ranks(
    results: list[dict[Any, Any]], folder: Path, loss: ClipCovLoss | KlCovLoss, share: str
) -> None:
    alone = make_engine(str(folder / "tied"))
    expected = alone.forward_backward(sampled(make_batch()), covariance_objective(loss), 0.8)
    assert expected["actor/pg_covfrac"] > 0.05
    for result in results:
        metrics, grads = result[loss.type, share]
        assert metrics == pytest.approx(expected, rel=1e-5)
        torch.testing.assert_close(grads, gradients(alone), **CLOSE)


def test_a_critic_has_the_same_gradients_on_two_ranks(results: list[dict[Any, Any]], folder: Path) -> None:
    alone = make_engine(str(folder / "tied"), role="critic")
    metrics = alone.forward_backward(make_batch(), value_objective)
    assert results[0]["critic"][0]["loss"] == pytest.approx(metrics["loss"], rel=1e-5)
    torch.testing.assert_close(results[0]["critic"][1], gradients(alone), **CLOSE)


def test_mixed_precision_keeps_single_precision_gradients_near_the_exact_ones(
    results: list[dict[Any, Any]], folder: Path
) -> None:
    alone = make_engine(str(folder / "untied"))
    alone.forward_backward(make_batch(), policy_objective)
    ours, exact = results[0]["bfloat16"][0], gradients(alone)
    assert {grad.dtype for grad in ours.values()} == {torch.float32}
    distance = sum(float((ours[n] - exact[n]).square().sum()) for n in exact)
    assert distance < 0.05**2 * sum(float(grad.square().sum()) for grad in exact.values())


def test_a_resumed_run_repeats_the_uninterrupted_one_bit_for_bit(results: list[dict[Any, Any]]) -> None:
    for result in results:
        assert result["resumed"][0] == result["continued"][0]
        torch.testing.assert_close(result["resumed"][1], result["continued"][1], rtol=0, atol=0)


def test_a_checkpoint_of_two_ranks_loads_exactly_in_one(results: list[dict[Any, Any]], folder: Path) -> None:
    one = make_engine(str(folder / "tied"))
    one.load(folder / "from_two")
    torch.testing.assert_close(whole_state(one), results[0]["saved"], rtol=0, atol=0)
    assert train(one, make_batch(), 2) == pytest.approx(results[0]["continued"][0], rel=1e-4)


def test_a_checkpoint_of_one_rank_loads_exactly_in_two(results: list[dict[Any, Any]], folder: Path) -> None:
    one = make_engine(str(folder / "tied"))
    one.load(folder / "from_one")
    state, losses = results[1]["from_one"]
    torch.testing.assert_close(state, whole_state(one), rtol=0, atol=0)
    assert losses == pytest.approx(train(one, make_batch(), 2), rel=1e-4)


def test_two_ranks_export_one_whole_model(results: list[dict[Any, Any]], folder: Path) -> None:
    exported = make_engine(str(folder / "hf"))
    torch.testing.assert_close(weights(exported), results[0]["resumed"][1], rtol=0, atol=0)
