"""The engine in one process: exact against plain transformers, whatever the cut, the layout and the order of rows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from rlctl_train import reference_loop
from rlctl_train.algos.ops import Counts, TokenOutputs
from rlctl_train.batch import Batch
from rlctl_train.config.errors import PREFLIGHT, UserError
from rlctl_train.config.optim import OptimConfig
from tests.engine_support import (
    gradients,
    make_batch,
    make_engine,
    make_model,
    policy_objective,
    reference,
    value_objective,
    weights,
)

CLOSE = {"rtol": 1e-4, "atol": 2e-6}


@pytest.fixture(scope="module", params=["tied", "untied"])
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_model(tmp_path_factory.mktemp("model"), tie_embeddings=request.param == "tied")


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("budget", [1000, 45, 20])
@pytest.mark.parametrize("chunk", [1024, 7])
def test_loss_and_gradients_are_those_of_plain_transformers(path: str, packing: bool, budget: int, chunk: int) -> None:
    batch = make_batch()
    logp, entropy, loss, grads = reference(path, batch, 0.8)
    engine = make_engine(path, packing=packing, max_tokens_per_micro_batch=budget, logits_chunk_tokens=chunk)
    ours = engine.logprobs(batch, 0.8)
    torch.testing.assert_close(ours[0], logp, **CLOSE)
    torch.testing.assert_close(ours[1], entropy, **CLOSE)
    metrics = engine.forward_backward(batch, policy_objective, 0.8)
    assert metrics["loss"] == pytest.approx(loss, rel=1e-5)
    assert metrics["rows"] == len(batch)
    torch.testing.assert_close(gradients(engine), grads, **CLOSE)


@pytest.mark.parametrize("architecture", ["qwen3", "llama"])
def test_other_architectures_agree_with_transformers(tmp_path: Path, architecture: str) -> None:
    path, batch = make_model(tmp_path, architecture=architecture), make_batch()
    _, _, _, grads = reference(path, batch, 1.0)
    engine = make_engine(path)
    engine.forward_backward(batch, policy_objective)
    torch.testing.assert_close(gradients(engine), grads, **CLOSE)


@pytest.mark.parametrize("budget", [1000, 20])
def test_sums_of_squared_probabilities_are_those_of_plain_transformers(path: str, budget: int) -> None:
    batch = make_batch()
    logp, squares = make_engine(path, max_tokens_per_micro_batch=budget).logprobs_and_squares(batch, 0.8)
    torch.testing.assert_close(logp, reference(path, batch, 0.8)[0], **CLOSE)
    model, mask = AutoModelForCausalLM.from_pretrained(path), batch["response_mask"].bool()
    ids, before = reference_loop.sequences(batch)
    probs = (model(input_ids=ids).logits / 0.8).softmax(-1)[torch.arange(len(ids))[:, None], before]
    torch.testing.assert_close(squares[mask], probs.square().sum(-1)[mask].detach(), **CLOSE)


def test_the_order_of_rows_does_not_matter(path: str) -> None:
    batch, order = make_batch(), torch.tensor([9, 3, 0, 7, 2, 8, 5, 1, 6, 4])
    grads = []
    for rows in (batch, batch.rows(order)):
        engine = make_engine(path, max_tokens_per_micro_batch=50)
        engine.forward_backward(rows, policy_objective)
        grads.append(gradients(engine))
    torch.testing.assert_close(*grads, **CLOSE)


def test_gradients_of_mini_batches_add_up_until_the_step(path: str) -> None:
    engine, batch = make_engine(path), make_batch()
    engine.forward_backward(batch, policy_objective)
    once = gradients(engine)
    engine.forward_backward(batch, policy_objective)
    torch.testing.assert_close(gradients(engine), {name: 2 * grad for name, grad in once.items()}, **CLOSE)


def test_gradient_checkpointing_changes_nothing(path: str) -> None:
    grads = []
    for on in (False, True):
        engine = make_engine(path, recompute="full" if on else "none")
        engine.forward_backward(make_batch(), policy_objective)
        grads.append(gradients(engine))
    torch.testing.assert_close(*grads, **CLOSE)


def test_a_critic_starts_at_zero_and_learns(path: str) -> None:
    engine, batch = make_engine(path, role="critic", max_tokens_per_micro_batch=40), make_batch()
    assert engine.values(batch).eq(0).all()
    losses = []
    for _ in range(8):
        losses.append(engine.forward_backward(batch, value_objective)["loss"])
        engine.optim_step()
    assert losses[-1] < losses[0]
    values = engine.values(batch)
    assert values.shape == batch["weight"].shape
    assert values[batch["response_mask"] == 0].eq(0).all() and values.ne(0).any()


def test_packing_does_not_change_values(path: str) -> None:
    values = []
    for packing in (True, False):
        engine = make_engine(path, role="critic", packing=packing, optim=OptimConfig(lr=1e-3))
        engine.forward_backward(make_batch(), value_objective)
        engine.optim_step()
        values.append(engine.values(make_batch()))
    torch.testing.assert_close(*values, **CLOSE)


def test_weights_have_the_names_of_the_model_and_tied_ones_come_once(path: str) -> None:
    names = [name for name, _ in make_engine(path).weights()]
    stored = load_file(Path(path) / "model.safetensors")
    assert sorted(names) == sorted(stored)


def test_a_gradient_that_is_not_finite_skips_the_step(path: str) -> None:
    engine, batch = make_engine(path), make_batch()
    before = weights(engine)

    def poisoned(outputs: TokenOutputs, micro: Batch, counts: Counts) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        loss, metrics = policy_objective(outputs, micro, counts)
        return loss * float("nan"), metrics

    engine.forward_backward(batch, poisoned)
    assert engine.optim_step()["skipped"] == 1
    torch.testing.assert_close(weights(engine), before, rtol=0, atol=0)
    engine.forward_backward(batch, policy_objective)
    assert engine.optim_step()["skipped"] == 0
    assert all(tensor.isfinite().all() for tensor in weights(engine).values())


def test_the_gradient_is_clipped_by_its_global_norm(path: str) -> None:
    engine = make_engine(path, optim=OptimConfig(lr=1.0, max_grad_norm=1e-3, betas=(0.0, 0.0), eps=1e3))
    before = weights(engine)
    engine.forward_backward(make_batch(), policy_objective)
    norm = torch.stack([grad.norm() for grad in gradients(engine).values()]).norm()
    assert engine.optim_step()["grad_norm"] == pytest.approx(float(norm), rel=1e-5)
    # With a huge epsilon AdamW is gradient descent with rate lr / eps.
    moved = torch.stack([(after - before[name]).norm() for name, after in weights(engine).items()]).norm()
    assert float(moved) == pytest.approx(1e-3 / 1e3, rel=0.1)


def test_the_rate_follows_the_schedule_and_a_new_optimizer_starts_anew(path: str) -> None:
    engine = make_engine(path, optim=OptimConfig(lr=1.0, warmup_steps=2), num_updates=4)
    rates = []
    for _ in range(3):
        engine.forward_backward(make_batch(), policy_objective)
        rates.append(engine.optim_step()["lr"])
    assert rates == [0.5, 1.0, 1.0]
    engine.reset_optimizer(OptimConfig(lr=2.0, warmup_steps=4), 4)
    engine.forward_backward(make_batch(), policy_objective)
    assert engine.optim_step()["lr"] == 0.5


def test_offloading_is_invisible(path: str) -> None:
    results = []
    for away in (False, True):
        engine = make_engine(path, offload_params=away, offload_optimizer=away)
        engine.offload()
        engine.onload()
        for _ in range(2):
            engine.forward_backward(make_batch(), policy_objective)
            engine.optim_step()
            engine.offload()
            engine.onload()
        results.append(weights(engine))
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_no_rows_give_no_answers(path: str) -> None:
    logp, entropy = make_engine(path).logprobs(Batch({}), 1.0)
    assert len(logp) == len(entropy) == 0


def test_a_model_that_is_not_there_is_the_users_to_mend(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not load") as caught:
        make_engine(str(tmp_path / "nothing"))
    assert caught.value.exit_code == PREFLIGHT


def test_what_is_held_is_counted_part_by_part(path: str) -> None:
    engine = make_engine(path)
    numbers = sum(weight.numel() for _, weight in engine.weights())
    assert engine.held_bytes() == {"weights": 4 * numbers, "gradients": 0, "optimizer": 8 * numbers}
    engine.forward_backward(make_batch(), policy_objective)
    assert engine.held_bytes()["gradients"] == 4 * numbers
    engine.optim_step()
    assert engine.held_bytes()["gradients"] == 0
