"""What an engine says of other tokens than the sampled ones: the likeliest, those a teacher names, and all of them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from transformers import AutoModelForCausalLM

from rlctl_train.algos.ops import Counts, TokenOutputs, aggregate
from rlctl_train.algos.prime import OutcomeObjective
from rlctl_train.batch import Batch, concat, gather
from rlctl_train.config.prime import PrimeConfig
from tests.engine_support import gradients, kl_objective, make_batch, make_engine, make_model

K, TEMPERATURE = 5, 1.3


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_model(tmp_path_factory.mktemp("candidates"))


def plain_log_probs(path: str, batch: Batch) -> tuple[torch.nn.Module, Tensor]:
    """Return the log-probability of every token of the vocabulary at every place, [S, T, V], row by row."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    rows = torch.zeros(*batch["response_ids"].shape, model.config.vocab_size)
    for i in range(len(batch)):
        prompt = batch["prompt_ids"][i, : batch["prompt_len"][i]]
        response = batch["response_ids"][i, : batch["response_len"][i]]
        logits = model(torch.cat([prompt, response])[None]).logits[0, len(prompt) - 1 : -1]
        rows[i, : len(response)] = (logits / TEMPERATURE).log_softmax(-1)
    return model, rows


def asked_batch() -> Batch:
    batch = make_batch()
    draw = torch.Generator().manual_seed(7)
    return batch.with_columns(teacher_ids=torch.randint(0, 100, (*batch["response_ids"].shape, K), generator=draw))


def objective(outputs: TokenOutputs, micro: Batch, counts: Counts) -> tuple[Tensor, dict[str, Tensor]]:
    """Weigh every candidate, the sampled token and the entropy differently."""
    assert outputs.logp is not None and outputs.entropy is not None and outputs.top_logp is not None
    weights = 1 + torch.arange(outputs.top_logp.shape[-1])
    values = (outputs.top_logp * weights).sum(-1) * micro["weight"] + outputs.logp - 0.1 * outputs.entropy
    loss = aggregate(values, micro["response_mask"], "token-mean", counts)
    return loss, {"loss": loss.detach()}


def test_the_likeliest_tokens_are_those_of_the_whole_distribution(model: str) -> None:
    batch = make_batch()
    mask = batch["response_mask"].bool()
    ids, logp = make_engine(model, role="reference", logits_chunk_tokens=7).top_logprobs(
        batch, TEMPERATURE, k=K, num_ids=1000
    )
    _, expected = plain_log_probs(model, batch)
    best = expected.topk(K, dim=-1)
    torch.testing.assert_close(logp[mask], best.values[mask], atol=1e-5, rtol=1e-5)
    assert torch.equal(ids[mask], best.indices[mask])
    assert not logp[~mask].any() and not ids[~mask].any()


def test_tokens_that_the_student_does_not_have_are_not_named(model: str) -> None:
    batch = make_batch()
    ids, logp = make_engine(model, role="reference").top_logprobs(batch, TEMPERATURE, k=1000, num_ids=30)
    mass = logp.exp().sum(-1)[batch["response_mask"].bool()]
    assert ids.shape[-1] == 30 and ids.max() == 29 and (mass < 1).all()


@pytest.mark.parametrize("budget", [1000, 60, 24])
def test_candidates_have_the_values_and_gradients_of_plain_transformers(model: str, budget: int) -> None:
    batch = asked_batch()
    plain, log_probs = plain_log_probs(model, batch)
    outputs = TokenOutputs(
        logp=log_probs.gather(-1, batch["response_ids"][..., None]).squeeze(-1),
        entropy=-(log_probs.exp() * log_probs).sum(-1),
        top_logp=log_probs.gather(-1, batch["teacher_ids"]),
    )
    expected, _ = objective(outputs, batch, Counts(float(batch["response_mask"].sum()), 0.0))
    expected.backward()
    engine = make_engine(model, max_tokens_per_micro_batch=budget, logits_chunk_tokens=7)
    found = engine.forward_backward(batch, objective, TEMPERATURE)
    assert found["loss"] == pytest.approx(expected.item(), rel=1e-5)
    ours = gradients(engine)
    for name, parameter in plain.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(ours[name], parameter.grad, atol=2e-5, rtol=1e-4)


def compared_batch(fill: float = 0.0) -> Batch:
    """Return rows with another policy's distributions, `fill` where they are masked."""
    batch = make_batch()
    near = torch.randn(*batch["response_ids"].shape, 100, generator=torch.Generator().manual_seed(8))
    return batch.with_columns(
        ref_full_logp=torch.where(batch["response_mask"].bool()[..., None], near.log_softmax(-1), fill)
    )


def test_whole_distributions_are_those_of_plain_transformers(model: str) -> None:
    batch = make_batch()
    mask = batch["response_mask"].bool()
    logp, full = make_engine(model, role="reference", max_tokens_per_micro_batch=60).full_logprobs(batch, TEMPERATURE)
    _, expected = plain_log_probs(model, batch)
    torch.testing.assert_close(full[mask], expected[mask], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logp, full.gather(-1, batch["response_ids"][..., None]).squeeze(-1) * mask)
    assert not full[~mask].any()


@pytest.mark.parametrize(("budget", "fill"), [(1000, 0.0), (60, 0.0), (24, math.nan)])
def test_the_whole_kl_has_the_value_and_gradient_of_plain_transformers(model: str, budget: int, fill: float) -> None:
    batch = compared_batch()
    plain, log_probs = plain_log_probs(model, batch)
    outputs = TokenOutputs(
        logp=log_probs.gather(-1, batch["response_ids"][..., None]).squeeze(-1),
        ref_kl=(log_probs.exp() * (log_probs - batch["ref_full_logp"])).sum(-1),
    )
    expected, _ = kl_objective(outputs, batch, Counts(float(batch["response_mask"].sum()), 0.0))
    expected.backward()
    engine = make_engine(model, max_tokens_per_micro_batch=budget, logits_chunk_tokens=7)
    found = engine.forward_backward(compared_batch(fill), kl_objective, TEMPERATURE)
    assert found["loss"] == pytest.approx(expected.item(), rel=1e-5)
    ours = gradients(engine)
    for name, parameter in plain.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(ours[name], parameter.grad, atol=2e-5, rtol=1e-4)


def test_batches_of_candidates_join_like_others() -> None:
    narrow = Batch({"teacher_ids": torch.ones(2, 3, K)})
    wide = Batch({"teacher_ids": torch.ones(1, 4, K)})
    joined = concat([narrow, wide])["teacher_ids"]
    assert joined.shape == (3, 4, K) and not joined[:2, 3].any()
    assert torch.equal(gather([((0, 2), narrow), ((1,), wide)], [0, 2, 1])["teacher_ids"], joined)


SHARES = {"uneven": ([5], [0, 1, 2, 3, 4, 6, 7, 8, 9]), "none": ([], list(range(10)))}


def judged_batch() -> Batch:
    batch = make_batch()
    return batch.with_columns(ref_logp=batch["weight"] - 4, correct=torch.arange(10) % 2)


def learn(path: str, rows: list[int]) -> tuple[Any, ...]:
    """Return loss and gradient of candidates, outcomes and whole KL, and the likeliest tokens of this rank's rows."""
    found: list[Any] = []
    outcomes = OutcomeObjective(PrimeConfig(beta=0.3))
    for batch, asked in ((asked_batch(), objective), (judged_batch(), outcomes), (compared_batch(), kl_objective)):
        engine = make_engine(path, max_tokens_per_micro_batch=45)
        metrics = engine.forward_backward(batch.rows(rows) if rows else Batch({}), asked, TEMPERATURE)
        found += [metrics, gradients(engine)]
    own = make_batch().rows(rows) if rows else Batch({})
    return *found, *make_engine(path, role="reference").top_logprobs(own, TEMPERATURE, k=K, num_ids=100)


def run_rank(rank: int, path: str, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    torch.save({name: learn(path, rows[rank]) for name, rows in SHARES.items()}, folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_give_what_one_gives(model: str, tmp_path: Path) -> None:
    mp.spawn(run_rank, args=(model, tmp_path), nprocs=2)  # type: ignore[attr-defined]
    *one, ids, logp = learn(model, list(range(10)))
    results = [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(2)]
    for name, shares in SHARES.items():
        for rank, rows in enumerate(shares):
            *made, own_ids, own_logp = results[rank][name]
            for found, expected in zip(made, one, strict=True):
                torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-6)
            if rows:
                torch.testing.assert_close(own_logp, logp[rows], rtol=1e-4, atol=2e-6)
                assert torch.equal(own_ids, ids[rows])
            else:
                assert own_ids.shape[0] == 0
