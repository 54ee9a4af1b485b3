"""Policy losses besides the clipped one: by value against NumPy loops, by gradient, by mask, by cutting the batch."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import Tensor

from rlctl_train.algos import ops
from rlctl_train.algos.clip import Clip
from rlctl_train.algos.covariance import random_draws
from rlctl_train.algos.objective import PolicyObjective, WholeBatchLoss
from rlctl_train.batch import Batch
from rlctl_train.config.algo import GrpoConfig
from rlctl_train.config.losses import (
    CispoLoss,
    ClipCovLoss,
    ClipLoss,
    DppoLoss,
    DroLoss,
    GmpoLoss,
    GpgLoss,
    GspoLoss,
    KlCovLoss,
    PolicyLossConfig,
    SapoLoss,
)
from rlctl_train.config.policy import Aggregation
from rlctl_train.registry import LOSSES, load

S, T = 8, 5
CONFIGS: dict[str, Any] = {
    "gspo": GspoLoss(clip_low=0.1, clip_high=0.15),
    "sapo": SapoLoss(tau_pos=1.0, tau_neg=1.5),
    "gpg": GpgLoss(),
    "cispo": CispoLoss(clip_low=0.3, clip_high=0.2),
    "clip_cov": ClipCovLoss(clip_low=0.1, clip_high=0.02, token_share=0.1, cov_low=0.2, cov_high=5.0),
    "kl_cov": KlCovLoss(token_share=0.2, coef=0.7),
    "gmpo": GmpoLoss(clip_low=0.2, clip_high=0.1),
    "dppo-tv": DppoLoss(variant="tv", threshold_low=0.05, threshold_high=0.04, max_ratio=1.1),
    "dppo-kl": DppoLoss(variant="kl", threshold_low=0.02, threshold_high=0.01, max_ratio=1.1),
    "dro": DroLoss(beta=0.4),
}
DEFAULTS = [type(config)(**({"variant": config.variant} if "dppo" in name else {})) for name, config in CONFIGS.items()]
SMOOTH = ("sapo", "gpg", "clip_cov", "kl_cov", "gmpo", "dro")
"""Losses without stop-gradient, whose gradient is that of their value."""


def _loss(config: Any) -> Any:
    return load(LOSSES, config.type)(config)


def _batch(fill: float = 0.0, *, per_sequence: bool = False) -> tuple[Batch, Tensor]:
    """Return 8 ragged rows with a gap in row 0 and nothing in row 7, and current log-probabilities."""
    generator = torch.Generator().manual_seed(5)
    mask = torch.tensor([[float(t < 1 + i % 5) for t in range(T)] for i in range(S)], dtype=torch.float64)
    mask[0], mask[7] = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0]), 0.0

    def column() -> Tensor:
        return torch.randn(S, T, generator=generator, dtype=torch.float64)

    def hide(values: Tensor) -> Tensor:
        return torch.where(mask.bool(), values, fill)

    old, advantages, moved = -column().abs(), column(), column()
    if per_sequence:
        advantages = advantages[:, :1].expand(S, T)
    columns = {"response_mask": mask, "old_logp": hide(old), "advantages": hide(advantages)}
    numbers = {"row": torch.arange(S) + 16, "policy_version": torch.full((S,), 3)}
    return Batch(columns | numbers), hide((old + 0.4 * moved).clamp(max=-1e-3))


def _known(loss: Any, logp: Tensor, batch: Batch) -> Batch:
    """Return the batch with what the loss asks to know about it."""
    if not isinstance(loss, WholeBatchLoss):
        return batch
    return batch.with_columns(**loss.statistics(logp.detach(), batch, lambda values: values))


def _numpy_sequence(config: Any, logp: np.ndarray, old: np.ndarray, a: np.ndarray) -> list[float]:
    """Return the loss of each token of one sequence without gaps, for losses that look at whole sequences."""
    n = len(logp)
    if isinstance(config, GspoLoss):
        ratio = math.exp(sum(logp - old) / n)
        held = min(max(ratio, 1 - config.clip_low), 1 + config.clip_high)
        return [max(-x * ratio, -x * held) for x in a]
    exponent = 0.0
    for d, x in zip(logp - old, a, strict=True):
        held = min(max(d, -config.clip_low), config.clip_high)
        exponent += (min(d, held) if x > 0 else max(d, held)) / n
    return [-sum(a) / n * math.exp(exponent)] * n


def _numpy_token(config: Any, logp: float, old: float, a: float, chosen: bool) -> float:
    r, p, q, moved = math.exp(logp - old), math.exp(logp), math.exp(old), 0.0
    match config:
        case SapoLoss():
            tau = config.tau_pos if a > 0 else config.tau_neg
            return -a * 4 / tau / (1 + math.exp(-tau * (r - 1)))
        case GpgLoss():
            return -a * logp
        case CispoLoss():
            return -a * logp * min(max(r, 1 - config.clip_low), 1 + config.clip_high)
        case ClipCovLoss():
            held = min(max(r, 1 - config.clip_low), 1 + config.clip_high)
            return 0.0 if chosen else max(-a * r, -a * held)
        case KlCovLoss():
            return -a * r + (config.coef * abs(logp - old) if chosen else 0.0)
        case DppoLoss(variant="tv"):
            moved = abs(p - q)
        case DppoLoss():
            moved = q * math.log(q / p) + (1 - q) * math.log((1 - q) / (1 - p))
        case _:
            return -(logp * a - config.beta / 2 * (logp - old) ** 2)
    threshold = config.threshold_high if a > 0 else config.threshold_low
    assert threshold is not None
    return 0.0 if moved > threshold and (p > q) == (a > 0) else -a * logp * min(r, config.max_ratio)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_loss_of_each_token_equals_its_formula(name: str) -> None:
    config, (batch, logp) = CONFIGS[name], _batch()
    loss = _loss(config)
    batch = _known(loss, logp, batch)
    ours = loss(logp, batch)[0].numpy()
    chosen = batch["chosen"] if "chosen" in batch else torch.zeros(S, T)
    for i in range(S - 1):
        keep = batch["response_mask"][i].bool()
        row = [x[i][keep].numpy() for x in (logp, batch["old_logp"], batch["advantages"], chosen)]
        if isinstance(config, (GspoLoss, GmpoLoss)):
            expected = _numpy_sequence(config, *row[:3])
        else:
            expected = [_numpy_token(config, *token) for token in zip(*row, strict=True)]
        np.testing.assert_allclose(ours[i][keep.numpy()], expected, rtol=1e-6 if "kl" in name else 1e-12)


@pytest.mark.parametrize("name", ["gspo", "cispo", "clip_cov", "gmpo", "dppo-tv", "dppo-kl"])
def test_the_fixture_reaches_every_side_of_a_clip(name: str) -> None:
    batch, logp = _batch()
    _, metrics = _loss(CONFIGS[name])(logp, batch)
    signs = batch["advantages"][metrics["actor/pg_clipfrac"].bool()].sign()
    assert set(signs.tolist()) == {-1.0, 1.0}


def _covariances(batch: Batch, logp: Tensor) -> np.ndarray:
    keep = batch["response_mask"].bool().numpy()
    a, x = batch["advantages"].numpy(), logp.numpy()
    return np.where(keep, (a - a[keep].mean()) * (x - x[keep].mean()), -math.inf)


@pytest.mark.parametrize("share", [0.01, 0.1, 0.3, 1.0])
def test_kl_cov_chooses_the_share_of_highest_covariance_at_least_one(share: float) -> None:
    batch, logp = _batch()
    known = _known(_loss(KlCovLoss(token_share=share)), logp, batch)
    covariances, num = _covariances(batch, logp), max(1, int(share * float(batch["response_mask"].sum())))
    assert known["chosen"].sum() == num
    assert covariances[known["chosen"].numpy()].min() == sorted(covariances.ravel())[-num]


@pytest.mark.parametrize("share", [0.01, 0.1, 1.0])
def test_clip_cov_draws_from_unclipped_tokens_within_the_bounds(share: float) -> None:
    batch, logp = _batch()
    known = _known(_loss(ClipCovLoss(token_share=share, cov_low=-0.3, cov_high=1.0)), logp, batch)
    clipped = Clip(ClipLoss())(logp, batch)[1]["actor/pg_clipfrac"].bool().numpy()
    covariances = _covariances(batch, logp)
    candidates = (covariances > -0.3) & (covariances < 1.0) & ~clipped
    num = min(max(1, int(share * float(batch["response_mask"].sum()))), candidates.sum())
    chosen = known["chosen"].numpy()
    assert candidates.sum() > 3 and chosen.sum() == num and not (chosen & ~candidates).any()


def test_equal_covariances_are_no_reason_to_choose_more_tokens() -> None:
    batch, logp = _batch()
    batch = batch.with_columns(advantages=0 * batch["advantages"])
    assert _known(_loss(KlCovLoss(token_share=0.2)), logp, batch)["chosen"].sum() == 4


def test_draws_are_even_and_differ_from_step_to_step() -> None:
    places = torch.ones(200, 100).nonzero()
    first, second = (
        random_draws(Batch({"row": torch.arange(200), "policy_version": torch.full((200,), v)}), places).view(200, 100)
        for v in (0, 1)
    )
    assert first.min() >= 0 and first.max() < 1 and first.unique().numel() == 20000
    counts = torch.histc(first, 10)
    assert ((counts - 2000).abs() < 200).all()
    for other in (second, first.roll(1, 0), first.roll(1, 1)):
        assert abs(torch.corrcoef(torch.stack([first.ravel(), other.ravel()]))[0, 1]) < 0.03


@pytest.mark.parametrize("name", ["clip_cov", "kl_cov"])
@pytest.mark.parametrize("cut", [[8], [4, 4], [1, 7], [0, 8], [3, 2, 3]], ids=str)
def test_the_choice_depends_on_neither_ranks_nor_the_order_of_rows(name: str, cut: list[int]) -> None:
    loss, (batch, logp) = _loss(CONFIGS[name]), _batch()
    expected = _known(loss, logp, batch)["chosen"]
    order = torch.randperm(S, generator=torch.Generator().manual_seed(2))
    found = torch.zeros(S, T, dtype=torch.bool)
    objective = PolicyObjective(loss, GrpoConfig(), T)

    def ask(rows: Tensor, gather: Any) -> None:
        own = batch.rows(rows) if len(rows) else Batch({})
        chosen = objective.statistics(logp[rows] if len(rows) else torch.zeros(0, 1), own, gather)["chosen"]
        if len(rows):
            found[rows] = chosen

    _on_ranks([lambda gather, rows=rows: ask(rows, gather) for rows in order.split(cut)])
    assert expected.any() and torch.equal(found, expected)


def _on_ranks(works: list[Callable[[Any], None]]) -> None:
    """Run one thread a rank; each hands its work a `gather` that meets the others'."""
    barrier, held = threading.Barrier(len(works), timeout=20), [torch.zeros(0)] * len(works)

    def run(rank: int, work: Callable[[Any], None]) -> None:
        def gather(values: Tensor) -> Tensor:
            held[rank] = values
            barrier.wait()
            everyone = torch.cat(held)
            barrier.wait()
            return everyone

        work(gather)

    threads = [threading.Thread(target=run, args=pair) for pair in enumerate(works)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


@pytest.mark.parametrize("name", SMOOTH)
def test_gradients_equal_finite_differences(name: str) -> None:
    loss, (batch, logp) = _loss(CONFIGS[name]), _batch()
    known = _known(loss, logp, batch)
    mask = batch["response_mask"]
    assert torch.autograd.gradcheck(lambda x: ops.select(loss(x, known)[0], mask).sum(), (logp.requires_grad_(),))


@pytest.mark.parametrize("name", ["cispo", "dppo-tv", "dppo-kl"])
def test_a_constant_weight_is_the_whole_gradient(name: str) -> None:
    loss, (batch, logp) = _loss(CONFIGS[name]), _batch()
    leaf = logp.requires_grad_()
    values, _ = loss(leaf, batch)
    values.sum().backward()
    torch.testing.assert_close(leaf.grad, (values / logp).detach().nan_to_num() * batch["response_mask"])


def test_the_gradient_of_gspo_is_that_of_the_sequence_ratio() -> None:
    config = CONFIGS["gspo"]
    batch, logp = _batch(per_sequence=True)
    mask, advantages = batch["response_mask"], batch["advantages"][:, 0]
    lengths = mask.sum(-1).clamp(min=1)

    def sequences(x: Tensor) -> Tensor:
        ratio = ((mask * (x - batch["old_logp"])).sum(-1) / lengths).exp()
        held = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
        return torch.maximum(-advantages * ratio, -advantages * held).sum()

    leaf, other = logp.clone().requires_grad_(), logp.clone().requires_grad_()
    assert torch.autograd.gradcheck(sequences, (other,))
    (ops.select(_loss(config)(leaf, batch)[0], mask) / lengths[:, None]).sum().backward()
    torch.testing.assert_close(leaf.grad, torch.autograd.grad(sequences(other), other)[0])


@pytest.mark.parametrize("config", DEFAULTS, ids=str)
def test_on_policy_the_gradient_is_the_plain_policy_gradient(config: Any) -> None:
    batch, _ = _batch(per_sequence=True)
    loss, logp = _loss(config), batch["old_logp"].clone().requires_grad_()
    known = batch.with_columns(chosen=torch.zeros(S, T, dtype=torch.bool))
    ops.select(loss(logp, known)[0], batch["response_mask"]).sum().backward()
    torch.testing.assert_close(logp.grad, -batch["advantages"] * batch["response_mask"])


@pytest.mark.parametrize("a", [-0.7, 1.3])
def test_gspo_of_one_token_is_ppos_clip(a: float) -> None:
    old = torch.full((9, 1), -1.0)
    logp = old + torch.linspace(-0.5, 0.5, 9)[:, None]
    batch = Batch({"response_mask": torch.ones(9, 1), "old_logp": old, "advantages": torch.full((9, 1), a)})
    ours = _loss(GspoLoss(clip_low=0.1, clip_high=0.2))(logp, batch)
    theirs = Clip(ClipLoss(clip_low=0.1, clip_high=0.2, dual_clip=None))(logp, batch)
    torch.testing.assert_close(ours, theirs)


def test_gmpo_without_bounds_is_gspo_without_clip() -> None:
    batch, logp = _batch(per_sequence=True)
    gmpo, gspo = GmpoLoss(clip_low=50, clip_high=50), GspoLoss(clip_low=0.999999, clip_high=1e6)
    torch.testing.assert_close(_loss(gmpo)(logp, batch)[0], _loss(gspo)(logp, batch)[0] * batch["response_mask"])


def test_the_sequence_loss_of_gmpo_is_the_mean_over_its_tokens() -> None:
    batch, logp = _batch()
    loss, mask = _loss(CONFIGS["gmpo"]), batch["response_mask"]
    values = loss(logp, batch)[0]
    whole = ops.aggregate(values, mask, "seq-mean-token-mean", ops.count(mask))
    assert whole.item() == pytest.approx(values.amax(1).where(values.amax(1) != 0, values.amin(1)).sum().item() / 7)


def _objective(config: Any, aggregation: Aggregation = "token-mean") -> PolicyObjective:
    return PolicyObjective(_loss(config), GrpoConfig(loss=config, aggregation=aggregation), T)


@pytest.mark.parametrize("name", CONFIGS)
def test_nan_under_the_mask_changes_no_loss_no_metric_and_no_gradient(name: str) -> None:
    results = []
    for fill in (0.0, math.nan):
        batch, logp = _batch(fill)
        objective, leaf = _objective(CONFIGS[name]), logp.requires_grad_()
        known = _known(objective.loss, logp, batch)
        loss, metrics = objective(ops.TokenOutputs(logp=leaf), known, ops.count(batch["response_mask"]))
        loss.backward()
        results.append([loss, *metrics.values(), leaf.grad])
    assert all(torch.equal(clean, dirty) for clean, dirty in zip(*results, strict=True))


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("aggregation", get_args(Aggregation))
def test_loss_metrics_and_gradient_do_not_depend_on_the_micro_batches(name: str, aggregation: Aggregation) -> None:
    batch, logp = _batch()
    objective, counts = _objective(CONFIGS[name], aggregation), ops.count(batch["response_mask"])
    known, results = _known(objective.loss, logp, batch), []
    order = torch.randperm(S, generator=torch.Generator().manual_seed(2))
    for cut in ([8], [4, 4], [1] * 8, [5, 0, 3]):
        leaf, sums = logp.clone().requires_grad_(), dict[str, float]()
        for rows in order.split(cut):
            share, metrics = objective(ops.TokenOutputs(logp=leaf[rows]), known.rows(rows), counts)
            share.backward()
            sums = {key: sums.get(key, 0.0) + value.item() for key, value in metrics.items()}
        results.append((leaf.grad, sums))
    for grad, sums in results[1:]:
        torch.testing.assert_close(grad, results[0][0])
        assert sums == pytest.approx(results[0][1], abs=1e-12)


@pytest.mark.parametrize("config", DEFAULTS, ids=str)
@pytest.mark.parametrize("gap", [-80.0, 0.0, 80.0])
@pytest.mark.parametrize("old", [-100.0, -90.0, 0.0])
def test_extreme_inputs_keep_loss_and_gradient_finite(config: Any, gap: float, old: float) -> None:
    """Rows: positive, negative and no advantage on one token each; one without any token."""
    mask = torch.tensor([[1.0], [1.0], [1.0], [0.0]])
    columns = {"old_logp": torch.full((4, 1), old), "advantages": torch.tensor([[1.0], [-1.0], [0.0], [1.0]])}
    batch = Batch({"response_mask": mask, **columns})
    logp = (columns["old_logp"] + gap).requires_grad_()
    objective = _objective(config, "seq-mean-token-mean")
    known = _known(objective.loss, logp, batch)
    loss, _ = objective(ops.TokenOutputs(logp=logp), known, ops.count(mask))
    loss.backward()
    assert logp.grad is not None and torch.isfinite(loss) and torch.isfinite(logp.grad).all()


@pytest.mark.parametrize("name", ["clip_cov", "kl_cov"])
def test_a_part_of_a_mini_batch_is_refused_where_the_whole_one_counts(name: str) -> None:
    batch, logp = _batch()
    with pytest.raises(AssertionError, match="whole mini-batch"):
        _objective(CONFIGS[name])(ops.TokenOutputs(logp=logp), batch, ops.count(batch["response_mask"]))


def test_a_lower_clip_of_one_leaves_the_ratio_of_clip_cov_without_a_lower_bound() -> None:
    batch, logp = _batch()
    loss = _loss(ClipCovLoss(clip_low=1.0, clip_high=1e6, cov_low=1e6, cov_high=2e6))(logp - 3, batch)[0]
    plain = -batch["advantages"] * (logp - 3 - batch["old_logp"]).exp()
    mask = batch["response_mask"]
    torch.testing.assert_close(ops.select(loss, mask), ops.select(plain, mask))


def test_every_loss_of_the_union_is_registered_and_tested_here() -> None:
    types = {model.model_fields["type"].default for model in get_args(get_args(PolicyLossConfig)[0])}
    assert types == {"clip"} | {config.type for config in CONFIGS.values()}
    assert types <= set(LOSSES)


def test_the_defaults_are_the_papers() -> None:
    assert (GspoLoss().clip_low, GspoLoss().clip_high) == (3e-4, 4e-4)
    assert (SapoLoss().tau_pos, SapoLoss().tau_neg) == (1.0, 1.05)
    assert (GmpoLoss().clip_low, GmpoLoss().clip_high) == (0.4, 0.4)
    cov = ClipCovLoss()
    assert (cov.clip_low, cov.clip_high, cov.token_share, cov.cov_low, cov.cov_high) == (0.2, 0.2, 2e-4, 1.0, 5.0)
    assert (KlCovLoss().token_share, KlCovLoss().coef) == (2e-4, 1.0)
    assert [(_loss(DppoLoss(variant=v)).low, _loss(DppoLoss(variant=v)).high) for v in ("tv", "kl")] == [
        (0.15, 0.15),
        (0.05, 0.05),
    ]
