"""Operations against plain NumPy loops, and their three promises: masks, splits, no overflow."""

from __future__ import annotations

import itertools
import math
from typing import Any, get_args

import numpy as np
import pytest
import torch

from rlctl_train.algos import ops
from rlctl_train.config.policy import Aggregation, KlEstimator

MODES = get_args(Aggregation)
ESTIMATORS = get_args(KlEstimator)
NORM = 7.0
S, T = 8, 6


def _values_and_mask(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return [8, 6] values and a mask with a gap in the middle of a row and one row without any token."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.ones(S, T)
    mask[0, 3:], mask[1, 1:], mask[2, 2:4], mask[3] = 0, 0, 0, 0
    return torch.randn(S, T, generator=generator, dtype=torch.float64), mask


def _numpy_aggregate(values: np.ndarray, mask: np.ndarray, mode: str) -> float:
    rows = [[v for v, m in zip(row, keep, strict=True) if m] for row, keep in zip(values, mask, strict=True)]
    rows = [row for row in rows if row]
    total = math.fsum(itertools.chain.from_iterable(rows))
    return {
        "token-mean": total / sum(map(len, rows)),
        "token-sum": total,
        "seq-mean-token-sum": total / len(rows),
        "seq-mean-token-mean": sum(sum(row) / len(row) for row in rows) / len(rows),
        "seq-mean-token-sum-norm": total / len(rows) / NORM,
    }[mode]


@pytest.mark.parametrize("mode", MODES)
def test_aggregate_equals_a_plain_loop(mode: Aggregation) -> None:
    values, mask = _values_and_mask()
    ours = ops.aggregate(values, mask, mode, ops.count(mask), NORM)
    assert ours.item() == pytest.approx(_numpy_aggregate(values.numpy(), mask.numpy(), mode), abs=1e-14)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("num_parts", [1, 2, 4, 8])
@pytest.mark.parametrize("permuted", [False, True])
def test_shares_add_up_however_the_rows_are_cut(mode: Aggregation, num_parts: int, permuted: bool) -> None:
    values, mask = _values_and_mask()
    counts = ops.count(mask)
    whole = ops.aggregate(values, mask, mode, counts, NORM)
    order = torch.randperm(S, generator=torch.Generator().manual_seed(1)) if permuted else torch.arange(S)
    parts = [ops.aggregate(values[rows], mask[rows], mode, counts, NORM) for rows in order.reshape(num_parts, -1)]
    assert torch.stack(parts).sum().item() == pytest.approx(whole.item(), abs=1e-14)


@pytest.mark.parametrize("mode", MODES)
def test_aggregate_does_not_depend_on_the_padded_width(mode: Aggregation) -> None:
    values, mask = _values_and_mask()
    wide_values, wide_mask = (torch.nn.functional.pad(x, (0, 5)) for x in (values, mask))
    counts = ops.count(mask)
    narrow = ops.aggregate(values, mask, mode, counts, NORM)
    assert ops.aggregate(wide_values, wide_mask, mode, counts, NORM).item() == pytest.approx(narrow.item(), abs=1e-14)


@pytest.mark.parametrize("mode", MODES)
def test_a_step_without_any_token_gives_zero(mode: Aggregation) -> None:
    empty = torch.zeros(2, 3)
    assert ops.aggregate(torch.full((2, 3), math.nan), empty, mode, ops.count(empty), NORM).item() == 0


def test_counts_see_only_sequences_that_have_a_token() -> None:
    _, mask = _values_and_mask()
    assert ops.count(mask) == ops.Counts(tokens=mask.sum().item(), sequences=7.0)


def test_whitened_values_have_mean_zero_and_unit_variance_with_bessel_correction() -> None:
    values, mask = _values_and_mask()
    kept = values[mask.bool()].numpy()
    expected = (kept - kept.mean()) / np.sqrt(kept.var(ddof=1) + 1e-8)
    white = ops.whiten(values, mask)
    np.testing.assert_allclose(white[mask.bool()].numpy(), expected, rtol=1e-12)
    assert (white[~mask.bool()] == 0).all()


def test_whitening_a_single_token_gives_zero() -> None:
    assert ops.whiten(torch.tensor([[3.0, 5.0]]), torch.tensor([[1.0, 0.0]])).tolist() == [[0.0, 0.0]]


def test_masked_mean_ignores_what_is_masked() -> None:
    values, mask = _values_and_mask()
    poisoned = torch.where(mask.bool(), values, math.nan)
    assert ops.masked_mean(poisoned, mask).item() == pytest.approx(values[mask.bool()].mean().item())


def _numpy_kl(x: float, y: float, name: str) -> float:
    d = y - x
    return {"k1": -d, "abs": abs(d), "k2": d * d / 2, "k3": min(math.exp(min(max(d, -20), 20)) - d - 1, 10)}[name]


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize(("x", "y"), [(-1.0, -1.5), (-2.0, -0.25), (-0.7, -0.7)])
def test_kl_estimates_equal_their_formulas(estimator: KlEstimator, x: float, y: float) -> None:
    ours = ops.kl_estimate(torch.tensor(x, dtype=torch.float64), torch.tensor(y, dtype=torch.float64), estimator)
    assert ours.item() == pytest.approx(_numpy_kl(x, y, estimator.removesuffix("+")), abs=1e-14)


@pytest.mark.parametrize("estimator", ["k1+", "k3+"])
def test_a_plus_takes_the_gradient_of_k2(estimator: KlEstimator) -> None:
    logp = torch.tensor([-1.0, -3.0], dtype=torch.float64, requires_grad=True)
    ref = torch.tensor([-1.5, -0.5], dtype=torch.float64)
    ops.kl_estimate(logp, ref, estimator).sum().backward()
    assert logp.grad is not None
    assert logp.grad.tolist() == pytest.approx((logp.detach() - ref).tolist())


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "abs"])
def test_kl_gradients_equal_finite_differences(estimator: KlEstimator) -> None:
    logp = torch.tensor([[-1.0, -3.0, -0.2]], dtype=torch.float64, requires_grad=True)
    ref = torch.tensor([[-1.5, -0.5, -0.9]], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda p: ops.kl_estimate(p, ref, estimator), (logp,))


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("gap", [-80.0, 80.0, -1e4, 1e4])
def test_extreme_log_ratios_keep_kl_and_its_gradient_finite(estimator: KlEstimator, gap: float) -> None:
    logp = torch.tensor([gap], requires_grad=True)
    value = ops.kl_estimate(logp, torch.zeros(1), estimator)
    value.sum().backward()
    assert logp.grad is not None and torch.isfinite(value).all() and torch.isfinite(logp.grad).all()


@pytest.mark.parametrize("gap", [-80.0, 80.0])
def test_the_log_ratio_is_clamped_before_exp(gap: float) -> None:
    logp = torch.tensor([[gap]], requires_grad=True)
    ratio = ops.log_ratio(logp, torch.zeros(1, 1), torch.ones(1, 1)).exp()
    ratio.sum().backward()
    assert logp.grad is not None and torch.isfinite(logp.grad).all()
    assert ratio.item() == pytest.approx(math.exp(math.copysign(20, gap)), rel=1e-5)


@pytest.mark.parametrize("function", [ops.whiten, lambda v, m: ops.log_ratio(v, torch.zeros_like(v), m).exp()])
def test_nan_under_the_mask_changes_no_value_and_no_gradient(function: Any) -> None:
    values, mask = _values_and_mask()
    results = []
    for fill in (0.0, math.nan):
        leaf = torch.where(mask.bool(), values, fill).requires_grad_()
        out = ops.select(function(leaf, mask), mask)
        (out * torch.arange(out.numel()).reshape(out.shape)).sum().backward()
        results.append((out.detach(), leaf.grad))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])
