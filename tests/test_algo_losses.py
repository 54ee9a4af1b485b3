"""Losses and objectives: by value, by gradient, by mask, and by cutting the batch differently."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import Tensor

from rlctl_train.algos import ops
from rlctl_train.algos.clip import Clip
from rlctl_train.algos.objective import PolicyObjective, SupervisedObjective, ValueObjective
from rlctl_train.batch import Batch
from rlctl_train.config.algo import DapoConfig, GrpoConfig, PpoConfig, RlConfig, VapoConfig
from rlctl_train.config.losses import ClipLoss
from rlctl_train.config.policy import Aggregation, KlEstimator
from rlctl_train.registry import LOSSES, load
from tests.algo_support import assert_cuts_change_nothing

S, T = 8, 5


def _batch(fill: float = 0.0) -> tuple[Batch, Tensor]:
    """Return a batch of 8 ragged rows with a gap in row 0 and nothing in row 7, and current log-probabilities."""
    generator = torch.Generator().manual_seed(5)
    mask = torch.tensor([[float(t < 1 + i % 5) for t in range(T)] for i in range(S)], dtype=torch.float64)
    mask[0], mask[7] = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0]), 0.0

    def column() -> Tensor:
        values = torch.randn(S, T, generator=generator, dtype=torch.float64)
        return torch.where(mask.bool(), values, fill)

    old = -column().abs()
    names = ("advantages", "ref_logp", "values", "returns")
    correct = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 1.0], dtype=torch.float64)
    columns = {"response_mask": mask, "old_logp": old, "correct": correct, **{name: column() for name in names}}
    batch = Batch(columns)
    return batch, old + 0.4 * column()


def _numpy_clip(logp: float, old: float, advantage: float, config: ClipLoss) -> tuple[float, int, int]:
    ratio = math.exp(min(max(logp - old, -20), 20))
    free = -advantage * ratio
    clipped = -advantage * min(max(ratio, 1 - config.clip_low), 1 + config.clip_high)
    loss, bound = max(free, clipped), math.inf
    if config.dual_clip is not None and advantage < 0:
        bound = -advantage * config.dual_clip
    return min(loss, bound), int(clipped > free), int(loss > bound)


CONFIGS = [ClipLoss(), ClipLoss(clip_low=0.1, clip_high=0.28, dual_clip=1.2), DapoConfig().loss]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_the_policy_loss_of_each_token_equals_its_formula(config: ClipLoss) -> None:
    batch, logp = _batch()
    loss, metrics = Clip(config)(logp, batch)
    for i, t in np.argwhere(batch["response_mask"].numpy()):
        old, advantage = batch["old_logp"][i, t].item(), batch["advantages"][i, t].item()
        expected, clipped, lower = _numpy_clip(logp[i, t].item(), old, advantage, config)
        assert loss[i, t].item() == pytest.approx(expected, abs=1e-13)
        assert metrics["actor/pg_clipfrac"][i, t].item() == clipped
        assert metrics["actor/ppo_kl"][i, t].item() == pytest.approx(old - logp[i, t].item())
        if config.dual_clip is not None:
            assert metrics["actor/pg_clipfrac_lower"][i, t].item() == lower


def test_the_fixture_reaches_both_clips() -> None:
    batch, logp = _batch()
    _, metrics = Clip(CONFIGS[1])(logp, batch)
    assert metrics["actor/pg_clipfrac"].sum() > 2 and metrics["actor/pg_clipfrac_lower"].sum() > 0


@pytest.mark.parametrize("advantage", [-1.0, 1.0])
@pytest.mark.parametrize("gap", [-80.0, 80.0])
@pytest.mark.parametrize("dual_clip", [3.0, None])
def test_extreme_ratios_keep_the_loss_and_its_gradient_finite(
    advantage: float, gap: float, dual_clip: float | None
) -> None:
    one = torch.ones(1, 1)
    batch = Batch({"response_mask": one, "old_logp": 0 * one, "advantages": advantage * one, "ref_logp": 0 * one})
    config = GrpoConfig(loss=ClipLoss(dual_clip=dual_clip), kl_loss_coef=0.1)
    logp = torch.full((1, 1), gap, requires_grad=True)
    loss, _ = PolicyObjective(_loss(config), config, T)(ops.TokenOutputs(logp=logp), batch, ops.count(one))
    loss.backward()
    assert logp.grad is not None and torch.isfinite(loss) and torch.isfinite(logp.grad).all()


def test_on_policy_the_gradient_is_the_plain_policy_gradient() -> None:
    batch, _ = _batch()
    logp = batch["old_logp"].clone().requires_grad_()
    Clip(ClipLoss())(logp, batch)[0].sum().backward()
    torch.testing.assert_close(logp.grad, -batch["advantages"])


def _loss(config: RlConfig) -> Any:
    return load(LOSSES, config.loss.type)(config.loss)


def _policy(config: RlConfig) -> Callable[[Tensor, Batch, ops.Counts], tuple[Tensor, dict[str, Any]]]:
    objective = PolicyObjective(_loss(config), config, max_response_tokens=32)
    return lambda x, micro, counts: objective(
        ops.TokenOutputs(logp=x, entropy=0.5 * x if objective.needs_entropy else None), micro, counts
    )


OBJECTIVES: dict[str, Callable[[Tensor, Batch, ops.Counts], tuple[Tensor, dict[str, Any]]]] = {
    **{mode: _policy(GrpoConfig(aggregation=mode, kl_loss_coef=0.1)) for mode in get_args(Aggregation)},
    "dapo": _policy(DapoConfig()),
    "entropy": _policy(GrpoConfig(entropy_coef=0.3)),
    "ppo": _policy(PpoConfig(entropy_coef=-0.1, kl_loss_coef=0.2, kl_loss_estimator="k2")),
    "vapo": _policy(VapoConfig(lm_coef=0.7)),
    "value": lambda x, m, c: ValueObjective(PpoConfig(value_clip=0.3))(ops.TokenOutputs(values=x), m, c),
    "supervised": lambda x, m, c: SupervisedObjective()(ops.TokenOutputs(logp=x), m, c),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_gradients_equal_finite_differences(name: str) -> None:
    batch, logp = _batch()
    counts = ops.count(batch["response_mask"], batch["correct"])
    leaf = logp.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: OBJECTIVES[name](x, batch, counts)[0], (leaf,))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_nan_under_the_mask_changes_no_loss_no_metric_and_no_gradient(name: str) -> None:
    results = []
    for fill in (0.0, math.nan):
        batch, logp = _batch(fill)
        leaf = logp.requires_grad_()
        loss, metrics = OBJECTIVES[name](leaf, batch, ops.count(batch["response_mask"], batch["correct"]))
        loss.backward()
        results.append([loss, *metrics.values(), leaf.grad])
    assert all(torch.equal(clean, dirty) for clean, dirty in zip(*results, strict=True))


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("cut", [[8], [4, 4], [1] * 8, [5, 0, 3]], ids=str)
def test_loss_metrics_and_gradient_do_not_depend_on_the_micro_batches(name: str, cut: list[int]) -> None:
    batch, logp = _batch()
    counts = ops.count(batch["response_mask"], batch["correct"])
    assert_cuts_change_nothing(OBJECTIVES[name], logp, batch, counts, cut)


def test_the_objective_is_policy_loss_less_entropy_plus_kl() -> None:
    batch, logp = _batch()
    mask, counts = batch["response_mask"], ops.count(batch["response_mask"])
    entropy = logp.square()
    config = GrpoConfig(aggregation="seq-mean-token-mean", entropy_coef=0.3, kl_loss_coef=0.2, kl_loss_estimator="k2")
    objective = PolicyObjective(_loss(config), config, T)
    loss, metrics = objective(ops.TokenOutputs(logp=logp, entropy=entropy), batch, counts)

    def mean(values: Tensor) -> float:
        rows = [v[m.bool()].numpy().mean() for v, m in zip(values, mask, strict=True) if m.any()]
        return float(np.mean(rows))

    kl = 0.5 * (logp - batch["ref_logp"]).square()
    policy = mean(_loss(config)(logp, batch)[0])
    assert loss.item() == pytest.approx(policy - 0.3 * mean(entropy) + 0.2 * mean(kl))
    assert metrics["actor/kl_loss"].item() == pytest.approx(mean(kl))
    assert metrics["actor/entropy"].item() == pytest.approx(entropy[mask.bool()].mean().item())


@pytest.mark.parametrize(("norm", "expected"), [(None, 32.0), (4.0, 4.0)])
def test_the_constant_divisor_is_the_users_or_the_longest_response(norm: float | None, expected: float) -> None:
    batch, logp = _batch()
    counts = ops.count(batch["response_mask"])
    losses = []
    for mode, divisor in (("seq-mean-token-sum", None), ("seq-mean-token-sum-norm", norm)):
        config = GrpoConfig(aggregation=mode, aggregation_norm=divisor)  # type: ignore[arg-type]
        losses.append(_policy(config)(logp, batch, counts)[0].item())
    assert losses[0] / losses[1] == pytest.approx(expected)


def test_vapo_adds_the_mean_negative_log_likelihood_of_right_responses() -> None:
    batch, logp = _batch()
    counts = ops.count(batch["response_mask"], batch["correct"])
    without, _ = _policy(VapoConfig(lm_coef=0))(logp, batch, counts)
    loss, metrics = _policy(VapoConfig(lm_coef=0.7))(logp, batch, counts)
    right = (batch["response_mask"] * batch["correct"][:, None]).bool()
    assert metrics["actor/lm_loss"].item() == pytest.approx(-logp[right].mean().item())
    assert (loss - without).item() == pytest.approx(-0.7 * logp[right].mean().item())
    none = batch.with_columns(correct=torch.zeros(S))
    assert OBJECTIVES["vapo"](logp, none, ops.count(none["response_mask"], none["correct"]))[1]["actor/lm_loss"] == 0


def test_the_value_loss_takes_the_worse_of_free_and_clipped() -> None:
    batch, _ = _batch()
    values = batch["values"] + torch.linspace(-1, 1, S * T, dtype=torch.float64).reshape(S, T)
    loss, metrics = ValueObjective(PpoConfig(value_clip=0.3))(
        ops.TokenOutputs(values=values), batch, ops.count(batch["response_mask"])
    )
    keep = batch["response_mask"].bool().numpy()
    v, old, r = (x.numpy()[keep] for x in (values, batch["values"], batch["returns"]))
    free, clipped = (v - r) ** 2, (np.clip(v, old - 0.3, old + 0.3) - r) ** 2
    assert loss.item() == pytest.approx(0.5 * np.maximum(free, clipped).mean())
    assert metrics["critic/vf_clipfrac"].item() == pytest.approx((clipped > free).mean())
    assert metrics["critic/vpred_mean"].item() == pytest.approx(v.mean())


@pytest.mark.parametrize(
    ("configured", "now", "counts"), [(0.0, None, False), (0.01, None, True), (0.01, 0.0, False), (0.0, 0.02, True)]
)
def test_entropy_is_asked_for_only_when_it_counts(configured: float, now: float | None, counts: bool) -> None:
    config = GrpoConfig(entropy_coef=configured)
    assert PolicyObjective(_loss(config), config, T, now).needs_entropy == counts


def test_the_bonus_is_paid_at_the_factor_of_the_moment() -> None:
    batch, logp = _batch()
    config, counts = GrpoConfig(entropy_coef=0.3), ops.count(batch["response_mask"])
    outputs = ops.TokenOutputs(logp=logp, entropy=-logp)
    losses = [
        PolicyObjective(_loss(config), config, T, now)(outputs, batch, counts)[0] for now in (0.0, 0.3, 0.6, None)
    ]
    assert losses[3] == losses[1]
    assert (losses[2] - losses[0]).item() == pytest.approx(2 * (losses[1] - losses[0]).item())


@pytest.mark.parametrize("estimator", get_args(KlEstimator))
def test_the_kl_loss_uses_the_estimator_asked_for(estimator: KlEstimator) -> None:
    batch, logp = _batch()
    config = GrpoConfig(kl_loss_coef=1.0, kl_loss_estimator=estimator)
    _, metrics = _policy(config)(logp, batch, ops.count(batch["response_mask"]))
    expected = ops.kl_estimate(logp, batch["ref_logp"], estimator)[batch["response_mask"].bool()].mean()
    assert metrics["actor/kl_loss"].item() == pytest.approx(expected.item())
