"""Rollout correction: by value, by mask, by cutting the batch differently, and in its special cases."""

from __future__ import annotations

import math
import re
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rlctl_train.algos import ops
from rlctl_train.algos.clip import Clip
from rlctl_train.algos.correction import bypassed, correct, corrected
from rlctl_train.algos.mismatch import mismatch, rollout_correction, token_mismatch, weight_metrics
from rlctl_train.algos.objective import PolicyObjective
from rlctl_train.batch import Batch
from rlctl_train.config import RunConfig, relation_problems
from rlctl_train.config.algo import GrpoConfig
from rlctl_train.config.correction import (
    ImportanceWeights,
    KlRejection,
    RatioRejection,
    Rejection,
    RolloutCorrection,
    SquareRejection,
)
from rlctl_train.config.losses import ClipLoss
from rlctl_train.telemetry.glossary import describe
from tests.algo_support import assert_cuts_change_nothing
from tests.engine_support import make_batch, make_engine, make_model
from tests.runs import CONFIG

S, T = 8, 5
PAGE = Path(__file__).parent.parent / "docs" / "correction.md"
WEIGHTS = [
    ImportanceWeights(level=level, upper=upper, lower=lower, normalize=normalize)
    for level in ("token", "sequence")
    for upper, lower in ((1.5, None), (1.4, 0.8))
    for normalize in (False, True)
]
REJECTIONS: list[Rejection] = [
    *(RatioRejection(level=level, upper=1.3) for level in ("token", "sequence", "geometric")),
    RatioRejection(level="geometric", upper=1.1, lower=0.7),
    *(SquareRejection(level=level, upper=0.045) for level in ("token", "sequence", "geometric", "max")),
    *(KlRejection(level=level, upper=0.045) for level in ("token", "sequence", "geometric", "max")),
]
EVERYTHING = RolloutCorrection(
    weights=ImportanceWeights(level="sequence", normalize=True),
    rejections=(KlRejection(level="token", upper=0.1), RatioRejection(upper=1.5)),
    veto=0.4,
)


def _columns(fill: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """Return trainer's and rollout's log-probabilities and the mask of 8 ragged rows: one has a gap, one is empty."""
    draw = torch.Generator().manual_seed(3)
    mask = torch.tensor([[float(t < 1 + i % 5) for t in range(T)] for i in range(S)], dtype=torch.float64)
    mask[0], mask[7] = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0]), 0.0
    rollout = -torch.rand(S, T, generator=draw, dtype=torch.float64) - 1
    logp = rollout + 0.4 * torch.randn(S, T, generator=draw, dtype=torch.float64)
    return torch.where(mask.bool(), logp, fill), torch.where(mask.bool(), rollout, fill), mask


def _log_ratios() -> list[np.ndarray]:
    logp, rollout, mask = (column.numpy() for column in _columns())
    return [(logp - rollout)[i][mask[i] > 0] for i in range(S)]


def _numpy_weights(config: ImportanceWeights) -> list[np.ndarray]:
    rows = []
    for x in _log_ratios():
        ratio = np.exp(x) if config.level == "token" else np.full(len(x), math.exp(x.sum()))
        if config.lower is None:
            rows.append(np.minimum(ratio, config.upper))
        else:
            rows.append(np.where((ratio < config.lower) | (ratio > config.upper), 0.0, ratio))
    if config.normalize:
        units = np.concatenate(rows) if config.level == "token" else np.array([row[0] for row in rows if len(row)])
        rows = [row / units.mean() for row in rows]
    return rows


def _numpy_kept(rule: Rejection) -> list[np.ndarray]:
    rows = []
    for x in _log_ratios():
        value = {"k1": x, "k2": x**2 / 2, "k3": np.exp(x) - 1 - x}[rule.type]
        over = {"token": lambda v: v, "sequence": np.sum, "geometric": np.mean, "max": np.max}[rule.level]
        value = np.broadcast_to(over(value), value.shape) if len(x) else value
        if isinstance(rule, RatioRejection):
            lower = rule.lower or 1 / rule.upper
            rows.append((np.exp(value) >= lower) & (np.exp(value) <= rule.upper))
        else:
            rows.append(value <= rule.upper)
    return rows


@pytest.mark.parametrize("config", WEIGHTS, ids=str)
def test_weights_equal_their_formula_and_are_zero_on_padding(config: ImportanceWeights) -> None:
    logp, rollout, mask = _columns()
    weights = correct(logp, rollout, mask, RolloutCorrection(weights=config)).weights
    assert weights is not None and not weights[mask == 0].any()
    np.testing.assert_allclose(weights[mask > 0].numpy(), np.concatenate(_numpy_weights(config)), rtol=1e-12)


@pytest.mark.parametrize("rule", REJECTIONS, ids=str)
def test_what_a_rule_rejects_equals_its_formula(rule: Rejection) -> None:
    logp, rollout, mask = _columns()
    made = correct(logp, rollout, mask, RolloutCorrection(rejections=(rule,)))
    expected = np.concatenate(_numpy_kept(rule))
    assert 0 < expected.sum() < len(expected), "the rule should reject some and keep some"
    assert (made.mask[mask > 0].numpy() == expected).all() and not made.mask[mask == 0].any()
    share = made.metrics["rollout_corr/rollout_rs_masked_fraction"]
    assert share == pytest.approx(1 - expected.mean())
    assert made.metrics[f"rollout_corr/rollout_rs_{rule.level}_{rule.type}_masked_fraction"] == pytest.approx(share)
    rows = [row for row in _numpy_kept(rule) if len(row)]
    lost = np.mean([not row.all() for row in rows])
    assert made.metrics["rollout_corr/rollout_rs_seq_masked_fraction"] == pytest.approx(lost)


def test_several_rules_must_all_pass() -> None:
    logp, rollout, mask = _columns()
    both = correct(logp, rollout, mask, RolloutCorrection(rejections=(REJECTIONS[0], REJECTIONS[6]))).mask
    alone = [correct(logp, rollout, mask, RolloutCorrection(rejections=(REJECTIONS[i],))).mask for i in (0, 6)]
    assert torch.equal(both, alone[0] * alone[1])


def test_one_unlikely_token_vetoes_its_whole_sequence_and_no_other() -> None:
    logp, rollout, mask = _columns()
    logp[3, 1] = rollout[3, 1] + math.log(1e-5)
    made = correct(logp, rollout, mask, RolloutCorrection(veto=1e-4))
    assert not made.mask[3].any() and torch.equal(
        made.mask.bool().any(-1), mask.bool().any(-1) & (torch.arange(S) != 3)
    )
    assert made.metrics["rollout_corr/rollout_is_veto_fraction"] == pytest.approx(1 / 7)
    assert made.metrics["rollout_corr/rollout_is_catastrophic_token_fraction"] == pytest.approx(1 / mask.sum().item())


def test_the_measures_of_mismatch_equal_their_formulas() -> None:
    logp, rollout, mask = (column.numpy() for column in _columns())
    rows = [(logp[i][mask[i] > 0], rollout[i][mask[i] > 0]) for i in range(S) if mask[i].any()]
    ours, theirs = (np.concatenate(side) for side in zip(*rows, strict=True))
    rho, apart = np.exp(ours - theirs), np.array([b.mean() - a.mean() for a, b in rows])
    expected = {
        "rollout_corr/kl": (theirs - ours).mean(),
        "rollout_corr/k3_kl": (rho - 1 - np.log(rho)).mean(),
        "rollout_corr/training_ppl": np.mean([np.exp(-a.mean()) for a, _ in rows]),
        "rollout_corr/rollout_ppl": np.mean([np.exp(-b.mean()) for _, b in rows]),
        "rollout_corr/log_ppl_diff": apart.mean(),
        "rollout_corr/log_ppl_abs_diff": np.abs(apart).mean(),
        "rollout_corr/log_ppl_diff_max": apart.max(),
        "rollout_corr/log_ppl_diff_min": apart.min(),
        "rollout_corr/ppl_ratio": np.exp(apart).mean(),
        "rollout_corr/chi2_token": (rho**2).mean() - 1,
        "rollout_corr/chi2_seq": np.mean([np.exp(2 * (a - b).sum()) for a, b in rows]) - 1,
        "health/logprob_gap": np.abs(ours - theirs).max(),
        "health/logprob_gap_mean": np.abs(ours - theirs).mean(),
        "training/rollout_probs_diff_mean": np.abs(np.exp(ours) - np.exp(theirs)).mean(),
        "training/rollout_probs_diff_max": np.abs(np.exp(ours) - np.exp(theirs)).max(),
        "training/rollout_probs_diff_std": np.abs(np.exp(ours) - np.exp(theirs)).std(),
        "training/rollout_actor_probs_pearson_corr": np.corrcoef(np.exp(ours), np.exp(theirs))[0, 1],
    }
    assert mismatch(*_columns()) == pytest.approx(expected)


@pytest.mark.parametrize("config", WEIGHTS, ids=str)
def test_the_description_of_the_weights_is_of_those_before_they_are_normalised(config: ImportanceWeights) -> None:
    plain = config.model_copy(update={"normalize": False})
    w, x = np.concatenate(_numpy_weights(plain)), _log_ratios()
    raw = np.concatenate([np.exp(r) if config.level == "token" else np.full(len(r), math.exp(r.sum())) for r in x])
    metrics = weight_metrics(*_columns(), config)
    expected = {
        "mean": w.mean(), "std": w.std(), "min": w.min(), "max": w.max(),
        "eff_sample_size": 1 / ((w / w.mean()) ** 2).mean(),
        "ratio_fraction_high": (raw > config.upper).mean(),
        "ratio_fraction_low": (raw < (config.lower or 1 / config.upper)).mean(),
    }  # fmt: skip
    assert metrics == pytest.approx({f"rollout_corr/rollout_is_{name}": value for name, value in expected.items()})


def test_the_same_means_over_tokens_come_from_the_parts_of_a_cut_batch() -> None:
    logp, rollout, mask = _columns()
    whole, parts = mismatch(logp, rollout, mask), token_mismatch(logp, rollout, mask)
    assert {name: whole[name] for name in parts} == pytest.approx(
        {name: float(ops.masked_mean(value, mask)) for name, value in parts.items()}
    )


def test_nothing_under_the_mask_changes_anything() -> None:
    results = []
    for fill in (0.0, math.nan):
        logp, rollout, mask = _columns(fill)
        made = correct(logp, rollout, mask, EVERYTHING)
        batch = Batch({"old_logp": logp, "rollout_logp": rollout, "response_mask": mask})
        results.append((made.weights, made.mask, rollout_correction(batch, EVERYTHING)[1]))
    (weights, kept, metrics), (dirty_weights, dirty_kept, dirty_metrics) = results
    assert torch.equal(weights, dirty_weights) and torch.equal(kept, dirty_kept)
    assert metrics == dirty_metrics


def test_equal_policies_give_weights_of_one_and_reject_nothing() -> None:
    logp, _, mask = _columns()
    for weights in WEIGHTS:
        config = RolloutCorrection(weights=weights, rejections=tuple(REJECTIONS), veto=0.99)
        made = correct(logp, logp, mask, config)
        assert made.weights is not None and torch.equal(made.weights, mask) and torch.equal(made.mask, mask)
        assert not any(made.metrics.values())
    metrics = mismatch(logp, logp, mask)
    for name in ("kl", "k3_kl", "log_ppl_diff", "chi2_token", "chi2_seq"):
        assert metrics[f"rollout_corr/{name}"] == 0
    assert metrics["rollout_corr/ppl_ratio"] == 1


def test_a_loose_truncation_at_token_level_is_the_plain_ratio() -> None:
    logp, rollout, mask = _columns()
    made = correct(logp, rollout, mask, RolloutCorrection(weights=ImportanceWeights(upper=1e9)))
    assert made.weights is not None
    torch.testing.assert_close(made.weights, (logp - rollout).exp() * mask)


def test_at_length_one_every_level_is_the_same() -> None:
    logp, rollout, mask = (column[:7, :1] for column in _columns())
    for kind in (RatioRejection, SquareRejection, KlRejection):
        kept = [
            correct(logp, rollout, mask, RolloutCorrection(rejections=(kind(level=level, upper=1.1),))).mask
            for level in ("token", "sequence", "geometric")
        ]
        assert torch.equal(kept[0], kept[1]) and torch.equal(kept[0], kept[2])


@pytest.mark.parametrize("gap", [-80.0, 80.0, -math.inf, math.inf])
@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_extremes_stay_finite(gap: float, weights: ImportanceWeights) -> None:
    logp, rollout, mask = (column.float() for column in _columns())
    logp = logp + gap if math.isfinite(gap) else torch.full_like(logp, gap)
    config = EVERYTHING.model_copy(update={"weights": weights})
    made = correct(logp, rollout, mask, config)
    assert made.weights is not None and made.weights.isfinite().all() and not made.mask.any()
    assert all(math.isfinite(value) for value in (weight_metrics(logp, rollout, mask, weights) | made.metrics).values())
    if math.isfinite(gap):
        assert all(math.isfinite(value) for value in mismatch(logp, rollout, mask).values())


def test_a_batch_without_any_token_is_no_error() -> None:
    logp, rollout, mask = _columns()
    made = correct(logp, rollout, 0 * mask, EVERYTHING)
    assert made.weights is not None and not made.weights.any() and not made.mask.any()
    assert mismatch(logp, rollout, 0 * mask) == weight_metrics(logp, rollout, 0 * mask, ImportanceWeights()) == {}


def test_no_gradient_flows_through_the_weights() -> None:
    logp, rollout, mask = _columns()
    weights = correct(logp.requires_grad_(), rollout, mask, EVERYTHING).weights
    assert weights is not None and not weights.requires_grad


def _batch(config: RolloutCorrection | None) -> tuple[Batch, Tensor]:
    """Return a batch as an update reads it, and the current policy's log-probabilities."""
    old, rollout, mask = _columns()
    draw = torch.Generator().manual_seed(4)
    advantages = torch.randn(S, T, generator=draw, dtype=torch.float64) * mask
    columns = {"old_logp": old, "rollout_logp": rollout, "response_mask": mask, "advantages": advantages}
    made, _ = rollout_correction(Batch(columns), config)
    return corrected(Batch(columns | made)), old + 0.1 * torch.randn(S, T, generator=draw, dtype=torch.float64)


def _objective(config: RolloutCorrection | None) -> PolicyObjective:
    return PolicyObjective(Clip(ClipLoss()), GrpoConfig(correction=config), T)


BYPASS = RolloutCorrection(mode="bypass", rejections=(KlRejection(level="token", upper=0.1), KlRejection(upper=0.2)))


def test_the_update_weighs_the_loss_and_means_over_what_is_kept() -> None:
    batch, logp = _batch(EVERYTHING)
    loss, metrics = _objective(EVERYTHING)(ops.TokenOutputs(logp=logp), batch, ops.count(batch["response_mask"]))
    old, rollout, mask = _columns()
    made = correct(old, rollout, mask, EVERYTHING)
    assert made.weights is not None and 0 < made.mask.sum() < mask.sum()
    tokens, _ = Clip(ClipLoss())(logp, batch)
    assert loss.item() == pytest.approx((tokens * made.weights)[made.mask > 0].mean().item())
    assert metrics["actor/ppo_kl"].item() == pytest.approx((old - logp)[made.mask > 0].mean().item())


def test_a_bypass_holds_the_policy_near_the_rollout_and_rejects_by_itself() -> None:
    batch, logp = _batch(BYPASS)
    _, rollout, mask = _columns()
    assert "kept_mask" not in batch and torch.equal(batch["response_mask"], mask)
    loss, metrics = _objective(BYPASS)(ops.TokenOutputs(logp=logp), batch, ops.count(mask))
    kept = correct(logp, rollout, mask, BYPASS).mask
    assert 0 < kept.sum() < mask.sum()
    tokens, _ = Clip(ClipLoss())(logp, batch.with_columns(old_logp=rollout))
    assert loss.item() == pytest.approx((tokens * kept).sum().item() / mask.sum().item())
    name = "rollout_corr/rollout_rs_masked_fraction"
    assert metrics[name].item() == pytest.approx(1 - (kept.sum() / mask.sum()).item())


def test_a_weighted_bypass_is_reinforce_with_the_current_ratio() -> None:
    config = RolloutCorrection(mode="bypass", weights=ImportanceWeights(upper=1.2))
    batch, logp = _batch(config)
    _, rollout, mask = _columns()
    ready = bypassed(logp, batch, config)
    torch.testing.assert_close(ready["rollout_weights"], (logp - rollout).exp().clamp(max=1.2) * mask)


def test_a_bypass_of_one_policy_equals_the_uncorrected_update() -> None:
    batch, logp = _batch(None)
    batch = batch.with_columns(rollout_logp=batch["old_logp"])
    counts = ops.count(batch["response_mask"])
    losses = [
        _objective(config)(ops.TokenOutputs(logp=logp), batch, counts)[0]
        for config in (None, RolloutCorrection(mode="bypass"))
    ]
    assert torch.equal(*losses)


@pytest.mark.parametrize("config", [EVERYTHING, BYPASS], ids=["decoupled", "bypass"])
@pytest.mark.parametrize("cut", [[8], [4, 4], [2] * 4, [1] * 8], ids=str)
def test_loss_and_gradient_do_not_depend_on_the_micro_batches(config: RolloutCorrection, cut: list[int]) -> None:
    batch, logp = _batch(config)
    objective = _objective(config)
    assert_cuts_change_nothing(
        lambda x, micro, counts: objective(ops.TokenOutputs(logp=x), micro, counts),
        logp, batch, ops.count(batch["response_mask"]), cut,
    )  # fmt: skip


@pytest.mark.parametrize("rejected", [slice(0, 10), slice(0, 7)], ids=["everything", "most"])
def test_an_engine_takes_a_step_of_which_all_or_most_is_rejected(rejected: slice, tmp_path: Path) -> None:
    engine, batch = make_engine(make_model(tmp_path)), make_batch()
    kept = batch["response_mask"].clone()
    kept[rejected] = 0
    old, _ = engine.logprobs(batch, 1.0)
    ready = corrected(batch.with_columns(old_logp=old, advantages=torch.ones_like(old), kept_mask=kept))
    metrics = engine.forward_backward(ready, _objective(EVERYTHING)) | engine.optim_step()
    assert math.isfinite(metrics["grad_norm"]) and (metrics["grad_norm"] > 0) == bool(kept.any())
    assert metrics["actor/pg_loss"] == pytest.approx(-float(kept.any()), abs=1e-5)


def test_gradients_of_a_weighted_loss_equal_finite_differences() -> None:
    batch, logp = _batch(EVERYTHING)
    counts = ops.count(batch["response_mask"])
    objective = _objective(EVERYTHING)
    leaf = logp.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: objective(ops.TokenOutputs(logp=x), batch, counts)[0], (leaf,))


def test_every_measure_has_a_meaning() -> None:
    config = RolloutCorrection(weights=ImportanceWeights(), rejections=tuple(REJECTIONS), veto=0.5)
    old, rollout, mask = _columns()
    batch = Batch({"old_logp": old, "rollout_logp": rollout, "response_mask": mask})
    for name in rollout_correction(batch, config)[1]:
        assert describe(name).text


def _snippets() -> dict[str, dict[str, Any]]:
    found = re.findall(r"^### (\S+)\n.*?```toml\n(.*?)```", PAGE.read_text(), flags=re.DOTALL | re.MULTILINE)
    return {name: tomllib.loads(text) for name, text in found}


@pytest.mark.parametrize("name", _snippets())
def test_every_setting_of_the_page_is_valid(name: str) -> None:
    config = RunConfig.model_validate({**CONFIG, "algo": {**CONFIG["algo"], **_snippets()[name]["algo"]}})
    assert relation_problems(config) == []


def test_the_page_has_all_settings_in_use() -> None:
    assert len(_snippets()) == 18
