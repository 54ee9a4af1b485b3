"""Advantages without a critic, VAPO's, and PF-PPO's draw: against NumPy, against one another, and under the mask."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from rlctl_train.algos.gdpo import Gdpo
from rlctl_train.algos.gpg import Gpg
from rlctl_train.algos.grpo import Grpo
from rlctl_train.algos.opo import Opo
from rlctl_train.algos.ops import Advantages
from rlctl_train.algos.otb import Otb
from rlctl_train.algos.passk_grpo import PassKGrpo
from rlctl_train.algos.ppo import Ppo
from rlctl_train.algos.reinforce_pp import ReinforcePp, ReinforcePpBaseline
from rlctl_train.algos.remax import Remax
from rlctl_train.algos.resample import chances, draw
from rlctl_train.algos.rloo import Rloo
from rlctl_train.algos.vapo import Vapo
from rlctl_train.batch import Batch
from rlctl_train.config.actor_critic import MaxMinResample, MaxRandomResample, PowResample, PpoConfig, VapoConfig
from rlctl_train.config.algo import GrpoConfig
from rlctl_train.config.critic_free import (
    GdpoConfig,
    GpgConfig,
    OpoConfig,
    OtbConfig,
    PassKGrpoConfig,
    ReinforcePpBaselineConfig,
    ReinforcePpConfig,
    RemaxConfig,
    RlooConfig,
)

S, T = 9, 6
GROUPS = [4, 7, 4, 4, 7, 7, 4, 7, 9]
ALONE = 8
"""The row whose group has no other."""
SCORES = [1.0, 0.0, 0.0, 0.5, 2.0, -1.0, 0.5, 0.0, 3.0]
PARTS = {"right": 1.0, "form": 0.25}


def _mask() -> torch.Tensor:
    """Return rows of 1 to 6 tokens; row 2 has tools' replies in it, row 7 wrote nothing."""
    mask = torch.tensor([[float(t < 1 + i % T) for t in range(T)] for i in range(S)], dtype=torch.float64)
    mask[2], mask[7] = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0, 0.0]), 0.0
    return mask


def _batch(scores: list[float] | None = None, fill: float = 0.0, mask: torch.Tensor | None = None) -> Batch:
    """Return a batch with most of each score on the last sampled token, the rest spread, `fill` where masked."""
    mask = _mask() if mask is None else mask
    generator = torch.Generator().manual_seed(3)

    def column() -> torch.Tensor:
        return torch.randn(S, T, generator=generator, dtype=torch.float64)

    written = mask.bool()
    rewards = torch.zeros(S, T, dtype=torch.float64)
    for row, score in enumerate(SCORES if scores is None else scores):
        for place in written[row].nonzero().flatten()[-1:]:
            rewards[row, place] = score
    columns = {"rewards": rewards, "values": column(), "old_logp": -column().abs()}
    columns["sum_pi_squared"] = columns["old_logp"].exp().square() + 0.1 * (1 - columns["old_logp"].exp())
    filled = {name: torch.where(written, values, fill) for name, values in columns.items()}
    parts = {f"part/{name}": torch.randn(S, generator=generator, dtype=torch.float64) for name in PARTS}
    baseline = torch.randn(S, generator=generator, dtype=torch.float64)
    return Batch({**filled, **parts, "baseline": baseline, "response_mask": mask, "group": torch.tensor(GROUPS)})


ALGOS: dict[str, Any] = {
    "passk_grpo": PassKGrpo(PassKGrpoConfig()),
    "gdpo": Gdpo(GdpoConfig(parts=PARTS)),
    "rloo": Rloo(RlooConfig()),
    "opo": Opo(OpoConfig()),
    "gpg": Gpg(GpgConfig(f_norm=2.0)),
    "otb": Otb(OtbConfig()),
    "otb_multi_turn": Otb(OtbConfig(multi_turn=True)),
    "reinforce_pp": ReinforcePp(ReinforcePpConfig(gamma=0.9)),
    "reinforce_pp_baseline": ReinforcePpBaseline(ReinforcePpBaselineConfig()),
    "remax": Remax(RemaxConfig()),
    "vapo": Vapo(VapoConfig(length_alpha=0.5, critic_lam=0.9, gamma=0.95)),
}
Matrix = np.ndarray[Any, np.dtype[np.float64]]


def _columns(batch: Batch) -> dict[str, Matrix]:
    return {name: column.numpy() for name, column in batch.columns.items()}


def _sums(c: dict[str, Matrix]) -> Matrix:
    return (c["rewards"] * c["response_mask"]).sum(1)


def _by_group(c: dict[str, Matrix], scores: Matrix, value: Callable[[Matrix, int, Matrix], float]) -> Matrix:
    """Return, on every token, `value(scores of the group, place in it, rows of the group)`."""
    out = np.zeros(S)
    for name in set(GROUPS):
        rows = np.flatnonzero(c["group"] == name)
        for place, row in enumerate(rows):
            out[row] = value(scores[rows], place, rows)
    return out[:, None] * c["response_mask"]


def _whiten(x: Matrix, mask: Matrix) -> Matrix:
    held = x[mask == 1]
    return np.where(mask == 1, (x - held.mean()) / np.sqrt(held.var(ddof=1) + 1e-8), 0.0)


def _passk(c: dict[str, Matrix]) -> Matrix:
    def value(s: Matrix, i: int, _: Matrix) -> float:
        if len(s) < 2 or i != s.argmax():
            return 0.0
        return (s[i] - np.delete(s, i).max()) / (s.std(ddof=1) + 1e-6)

    return _by_group(c, _sums(c), value)


def _normalised(s: Matrix, i: int, _: Matrix) -> float:
    return 0.0 if len(s) < 2 else (s[i] - s.mean()) / (s.std(ddof=1) + 1e-6)


def _gdpo(c: dict[str, Matrix]) -> Matrix:
    total = sum(weight * _by_group(c, c[f"part/{name}"], _normalised) for name, weight in PARTS.items())
    return _whiten(np.asarray(total), c["response_mask"])


def _rloo(c: dict[str, Matrix]) -> Matrix:
    return _by_group(c, _sums(c), lambda s, i, _: s[i] - np.delete(s, i).mean() if len(s) > 1 else 0.0)


def _opo(c: dict[str, Matrix]) -> Matrix:
    lengths = c["response_mask"].sum(1)
    return _by_group(c, _sums(c), lambda s, i, rows: s[i] - (lengths[rows] @ s) / lengths[rows].sum())


def _gpg(c: dict[str, Matrix]) -> Matrix:
    alpha = S / (_sums(c) != 0).sum()
    return _by_group(c, _sums(c), lambda s, i, _: alpha * (s[i] - s.mean()) / 2.0)


def _returns(c: dict[str, Matrix], gamma: float = 1.0) -> Matrix:
    out = np.zeros((S, T))
    for row in range(S):
        following = 0.0
        for t in reversed(np.flatnonzero(c["response_mask"][row])):
            following = out[row, t] = c["rewards"][row, t] + gamma * following
    return out


def _reinforce_pp(c: dict[str, Matrix]) -> Matrix:
    return _whiten(_returns(c, 0.9), c["response_mask"])


def _reinforce_pp_baseline(c: dict[str, Matrix]) -> Matrix:
    return _whiten(_by_group(c, _sums(c), lambda s, i, _: s[i] - s.mean()), c["response_mask"])


def _remax(c: dict[str, Matrix]) -> Matrix:
    return (_returns(c) - c["baseline"][:, None]) * c["response_mask"]


def _otb(c: dict[str, Matrix], multi_turn: bool = False) -> Matrix:
    """Go through groups and steps one by one, each row's tokens named by their step."""
    mask, returns, out = c["response_mask"], _returns(c), np.zeros((S, T))
    energy = (1 - 2 * np.exp(c["old_logp"]) + c["sum_pi_squared"]) * c.get("rollout_weights", np.ones((S, T))) ** 2
    places = [list(np.flatnonzero(row)) for row in mask]
    steps = [{(k if multi_turn else t): t for k, t in enumerate(row)} for row in places]
    for name in set(GROUPS):
        rows = np.flatnonzero(c["group"] == name)
        ends = sorted(max(steps[row], default=-1) for row in rows)
        for step in range(T if len(rows) > 1 else 0):
            here = [(row, steps[row][step]) for row in rows if step in steps[row]]
            spent = [energy[row, [u for u in places[row] if u <= t]].sum() for row, t in here]
            gains = [returns[row, t] for row, t in here]
            baseline = np.dot(gains, spent) / (sum(spent) + 1e-8) if step <= ends[-2] else 0.0
            for (row, t), gain in zip(here, gains, strict=True):
                out[row, t] = gain - baseline
    return out


def _gae(c: dict[str, Matrix], gamma: float, lam: Matrix) -> Matrix:
    out = np.zeros((S, T))
    for row in range(S):
        value = advantage = 0.0
        for t in reversed(np.flatnonzero(c["response_mask"][row])):
            delta = c["rewards"][row, t] + gamma * value - c["values"][row, t]
            advantage = out[row, t] = delta + gamma * lam[row] * advantage
            value = c["values"][row, t]
    return out


def _vapo(c: dict[str, Matrix]) -> Matrix:
    lengths = np.maximum(c["response_mask"].sum(1), 1)
    return _whiten(_gae(c, 0.95, np.maximum(1 - 1 / (0.5 * lengths), 0)), c["response_mask"])


FORMULAS: dict[str, Callable[[dict[str, Matrix]], Matrix]] = {
    "passk_grpo": _passk,
    "gdpo": _gdpo,
    "rloo": _rloo,
    "opo": _opo,
    "gpg": _gpg,
    "otb": _otb,
    "otb_multi_turn": lambda c: _otb(c, multi_turn=True),
    "reinforce_pp": _reinforce_pp,
    "reinforce_pp_baseline": _reinforce_pp_baseline,
    "remax": _remax,
    "vapo": _vapo,
}


@pytest.mark.parametrize("name", FORMULAS)
def test_advantages_equal_their_formula(name: str) -> None:
    batch = _batch()
    ours = ALGOS[name].advantages(batch).advantages
    np.testing.assert_allclose(ours.numpy(), FORMULAS[name](_columns(batch)), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", FORMULAS)
def test_single_precision_is_good_to_five_digits(name: str) -> None:
    batch = _batch()
    single = Batch({n: c.float() if c.is_floating_point() else c for n, c in batch.columns.items()})
    ours = ALGOS[name].advantages(single).advantages
    assert ours.dtype == torch.float32
    np.testing.assert_allclose(ours.numpy(), FORMULAS[name](_columns(batch)), atol=1e-5)


@pytest.mark.parametrize("name", FORMULAS)
def test_nan_under_the_mask_changes_no_advantage(name: str) -> None:
    clean, dirty = (ALGOS[name].advantages(_batch(fill=fill)) for fill in (0.0, math.nan))
    assert _equal(clean, dirty)


@pytest.mark.parametrize("name", FORMULAS)
def test_the_order_of_rows_changes_no_advantage(name: str) -> None:
    batch, order = _batch(), torch.randperm(S, generator=torch.Generator().manual_seed(1))
    whole, mixed = ALGOS[name].advantages(batch), ALGOS[name].advantages(batch.rows(order))
    torch.testing.assert_close(mixed.advantages, whole.advantages[order])


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("score", [0.0, 1e6])
def test_equal_scores_one_token_and_empty_responses_stay_finite(name: str, score: float) -> None:
    mask = _mask()
    mask[:, 1:] = 0.0
    for batch in (_batch([score] * S), _batch([score] * S, mask=mask), _batch(mask=torch.zeros(S, T).double())):
        advantages = ALGOS[name].advantages(batch).advantages
        assert torch.isfinite(advantages).all() and (advantages[batch["response_mask"] == 0] == 0).all()


@pytest.mark.parametrize("name", ["passk_grpo", "rloo", "opo", "gpg", "otb", "otb_multi_turn"])
def test_a_group_of_one_has_nothing_to_be_compared_with_and_gives_zero(name: str) -> None:
    assert (ALGOS[name].advantages(_batch()).advantages[ALONE] == 0).all()


def test_rloo_is_grpo_without_standard_deviation_times_n_over_n_less_one() -> None:
    batch = _batch().rows([0, 2, 3, 6])
    grpo = Grpo(GrpoConfig(normalize_std=False)).advantages(batch).advantages
    torch.testing.assert_close(Rloo(RlooConfig()).advantages(batch).advantages, grpo * 4 / 3)


def test_opo_of_equal_lengths_and_gpg_without_zeros_are_grpo_without_standard_deviation() -> None:
    scores = [s + 5.0 for s in SCORES]
    batch = _batch(scores, mask=torch.ones(S, T).double())
    grpo = Grpo(GrpoConfig(normalize_std=False)).advantages(batch).advantages
    torch.testing.assert_close(Opo(OpoConfig()).advantages(batch).advantages, grpo)
    torch.testing.assert_close(Gpg(GpgConfig()).advantages(batch).advantages, grpo)


def test_pass_at_k_of_two_equal_best_responses_teaches_nothing() -> None:
    batch = _batch([1.0] * 3 + [0.0] * 6).rows([0, 2, 3, 6])
    assert (PassKGrpo(PassKGrpoConfig()).advantages(batch).advantages == 0).all()


def test_pass_at_k_without_standard_deviation_is_the_lead_itself() -> None:
    batch = _batch().rows([0, 2, 3, 6])
    ours = PassKGrpo(PassKGrpoConfig(normalize_std=False)).advantages(batch).advantages
    assert ours[0].tolist() == (0.5 * batch["response_mask"][0]).tolist() and (ours[1:] == 0).all()


def test_gdpo_of_one_part_is_whitened_grpo() -> None:
    batch = _batch()
    batch = batch.with_columns(**{"part/right": (batch["rewards"] * batch["response_mask"]).sum(-1)})
    grpo = Grpo(GrpoConfig()).advantages(batch).advantages.numpy()
    ours = Gdpo(GdpoConfig(parts={"right": 3.0})).advantages(batch).advantages.numpy()
    mask = batch["response_mask"].numpy()
    np.testing.assert_allclose(ours, _whiten(grpo, mask), atol=1e-8)


@pytest.mark.parametrize("gamma", [1.0, 0.8])
def test_a_return_passes_through_a_tools_reply(gamma: float) -> None:
    result = ReinforcePp(ReinforcePpConfig(gamma=gamma)).advantages(_batch(mask=torch.ones(S, T).double()))
    assert result.returns is not None
    torch.testing.assert_close(result.returns[0, 0].item(), gamma ** (T - 1) * SCORES[0])
    returns = ReinforcePp(ReinforcePpConfig(gamma=gamma)).advantages(_batch([7.0] * S)).returns
    assert returns is not None
    assert returns[2].tolist() == pytest.approx([7 * gamma**2, 0, 0, 7 * gamma, 7, 0])


def test_the_token_baseline_weighs_energies_by_squared_importance_weights() -> None:
    weights = torch.rand(S, T, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    batch = _batch().with_columns(rollout_weights=weights)
    ours = Otb(OtbConfig()).advantages(batch).advantages
    np.testing.assert_allclose(ours.numpy(), _otb(_columns(batch)), atol=1e-12)


def test_the_token_baseline_of_equal_energies_is_the_mean_return() -> None:
    batch = _batch(mask=torch.ones(S, T).double())
    batch = batch.with_columns(old_logp=torch.zeros(S, T).double() - 1, sum_pi_squared=torch.ones(S, T).double())
    ours = Otb(OtbConfig()).advantages(batch).advantages
    torch.testing.assert_close(ours, Grpo(GrpoConfig(normalize_std=False)).advantages(batch).advantages)


def test_vapo_with_one_lambda_for_all_is_ppo() -> None:
    batch = _batch()
    vapo = Vapo(VapoConfig(length_alpha=None, lam=0.9, critic_lam=0.9)).advantages(batch)
    assert _equal(vapo, Ppo(PpoConfig(lam=0.9)).advantages(batch))


def test_vapos_critic_learns_the_return_itself() -> None:
    batch = _batch()
    returns = Vapo(VapoConfig()).advantages(batch).returns
    assert returns is not None
    np.testing.assert_allclose(returns.numpy(), _returns(_columns(batch)), atol=1e-12)


def test_chances_of_being_drawn_follow_the_score() -> None:
    scores = torch.tensor([2.0, -1.0, 0.0, 2.0])

    assert chances(scores, PowResample(power=3.0)).tolist() == pytest.approx([8, 1, 0, 8], abs=1e-7)
    assert chances(scores, MaxMinResample()).tolist() == pytest.approx([1, 1, 0, 1], abs=1e-7)
    assert chances(scores, MaxRandomResample()).tolist() == pytest.approx([0.4, 0.1, 0.1, 0.4], abs=1e-7)


def test_a_draw_repeats_with_its_seed_and_leaves_out_what_has_no_chance() -> None:
    scores = torch.tensor([0.0, 1.0, 0.0, 1.0] * 16)
    rows = draw(scores, PowResample(), seed=3)
    assert rows == draw(scores, PowResample(), seed=3) != draw(scores, PowResample(), seed=4)
    assert len(rows) == 64 and all(row % 2 for row in rows)
    assert len(set(draw(torch.zeros(64), PowResample(), seed=3))) > 20


def _equal(a: Advantages, b: Advantages) -> bool:
    same_returns = a.returns is None or (b.returns is not None and torch.equal(a.returns, b.returns))
    return torch.equal(a.advantages, b.advantages) and same_returns
