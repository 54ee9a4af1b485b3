"""The library agrees with the reference loop, step by step: losses, gradient norms and weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification

from rlctl_train import reference_loop
from rlctl_train.algos.grpo import Grpo
from rlctl_train.algos.kl_control import KlController
from rlctl_train.algos.objective import PolicyObjective, ValueObjective
from rlctl_train.algos.ppo import Ppo
from rlctl_train.batch import Batch
from rlctl_train.config.algo import GrpoConfig, PpoConfig, RlConfig
from rlctl_train.config.losses import ClipLoss
from rlctl_train.config.optim import OptimConfig
from rlctl_train.config.policy import FixedKl
from rlctl_train.registry import LOSSES, load
from tests.engine_support import make_batch, make_engine, make_model, weights

TEMPERATURE, MAX_RESPONSE_TOKENS, STEPS = 0.8, 12, 3
# With this epsilon Adam does not blow rounding errors of small gradients up to whole steps.
OPTIM = OptimConfig(lr=1e-2, eps=1e-2, max_grad_norm=0.5)


def _scored_batch(model: Any) -> Batch:
    """Return ragged rows in mixed groups, with scores, old log-probabilities and those of another policy."""
    batch = make_batch()
    draw = torch.Generator().manual_seed(4)
    rewards = torch.zeros_like(batch["response_mask"])
    rewards[torch.arange(len(batch)), batch["response_len"] - 1] = torch.rand(len(batch), generator=draw)
    with torch.no_grad():
        full = reference_loop.distributions(model, batch, TEMPERATURE)
    old = reference_loop.of_drawn(full, batch)
    near = old + 0.3 * torch.randn(old.shape, generator=draw)
    near_full = (full + 0.3 * torch.randn(full.shape, generator=draw)).log_softmax(-1)
    return batch.with_columns(
        rewards=rewards, old_logp=old, ref_logp=near, ref_full_logp=near_full,
        group=torch.tensor([0, 1, 2, 0, 1, 2, 0, 1, 2, 0]),
    )  # fmt: skip


def _loss(config: RlConfig) -> Any:
    return load(LOSSES, config.loss.type)(config.loss)


def _library_rewards(batch: Batch, config: RlConfig) -> Batch:
    if config.kl_in_reward is None:
        return batch
    return batch.with_columns(rewards=KlController(config.kl_in_reward).apply(batch)[0])


def _adamw(model: Any, config: OptimConfig = OPTIM) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=config.lr, eps=config.eps, weight_decay=0.0)


def _assert_same_weights(engine: Any, model: Any) -> None:
    ours = weights(engine)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(ours[name], parameter.detach(), rtol=1e-4, atol=2e-6, msg=name)


@pytest.mark.parametrize(
    "config",
    [
        GrpoConfig(loss=ClipLoss(clip_low=0.05, clip_high=0.05)),
        GrpoConfig(
            normalize_std=False, aggregation="seq-mean-token-sum-norm", entropy_coef=0.05, loss=ClipLoss(dual_clip=None)
        ),
        GrpoConfig(aggregation="seq-mean-token-mean", kl_loss_coef=0.3, kl_in_reward=FixedKl(coef=0.2)),
        GrpoConfig(aggregation="seq-mean-token-sum", kl_loss_coef=0.3, kl_loss_estimator="k1+"),
        GrpoConfig(aggregation="token-sum", kl_loss_coef=0.3, kl_loss_estimator="abs"),
        GrpoConfig(aggregation="seq-mean-token-mean", kl_loss_coef=2.0, kl_loss_estimator="full"),
    ],
    ids=lambda config: f"{config.aggregation}, {config.kl_loss_estimator}",
)
def test_grpo_agrees_step_by_step(config: GrpoConfig, tmp_path: Path) -> None:
    path = make_model(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(path)
    optimizer, engine = _adamw(model), make_engine(path, optim=OPTIM, max_tokens_per_micro_batch=40)
    batch, algo = _scored_batch(model), Grpo(config)
    objective = PolicyObjective(_loss(config), config, MAX_RESPONSE_TOKENS)
    coef = config.kl_in_reward.coef if config.kl_in_reward else 0.0
    for _ in range(STEPS):
        expected = reference_loop.grpo_update(
            model, optimizer, batch, config, temperature=TEMPERATURE, max_response_tokens=MAX_RESPONSE_TOKENS,
            max_grad_norm=OPTIM.max_grad_norm, kl_coef=coef,
        )  # fmt: skip
        ready = batch.with_columns(advantages=algo.advantages(_library_rewards(batch, config)).advantages)
        metrics = engine.forward_backward(ready, objective, TEMPERATURE)
        assert _total(metrics, config) == pytest.approx(expected["loss"], rel=1e-4, abs=1e-6)
        assert engine.optim_step()["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)
        _assert_same_weights(engine, model)


def _total(metrics: dict[str, float], config: RlConfig) -> float:
    """Return the loss from its parts; the entropy metric is a mean over tokens and cannot stand for another mean."""
    loss = metrics["actor/pg_loss"] + config.kl_loss_coef * metrics.get("actor/kl_loss", 0.0)
    if config.entropy_coef == 0:
        return loss
    assert config.aggregation == "seq-mean-token-sum-norm"
    mask = make_batch()["response_mask"]
    tokens_per_norm = float(mask.sum()) / float(mask.any(1).sum()) / MAX_RESPONSE_TOKENS
    return loss - config.entropy_coef * metrics["actor/entropy"] * tokens_per_norm


@pytest.mark.parametrize(
    "config",
    [
        PpoConfig(gamma=0.95, lam=0.9, value_clip=0.02, critic_optim=OPTIM),
        PpoConfig(kl_in_reward=FixedKl(coef=0.3, estimator="k3"), kl_loss_coef=0.1, critic_optim=OPTIM),
    ],
    ids=["gae", "kl"],
)
def test_ppo_agrees_step_by_step(config: PpoConfig, tmp_path: Path) -> None:
    path = make_model(tmp_path / "actor")
    model = AutoModelForCausalLM.from_pretrained(path)
    critic_path = _critic_folder(path, tmp_path / "critic")
    critic = AutoModelForTokenClassification.from_pretrained(critic_path)
    optimizers = _adamw(model), _adamw(critic)
    engine = make_engine(path, optim=OPTIM, max_tokens_per_micro_batch=40)
    critic_engine = make_engine(critic_path, role="critic", optim=OPTIM, max_tokens_per_micro_batch=60)
    batch, algo = _scored_batch(model), Ppo(config)
    coef = config.kl_in_reward.coef if config.kl_in_reward else 0.0
    for _ in range(STEPS):
        expected = reference_loop.ppo_update(
            model, optimizers[0], critic, optimizers[1], batch, config, temperature=TEMPERATURE,
            max_response_tokens=MAX_RESPONSE_TOKENS, max_grad_norm=OPTIM.max_grad_norm, kl_coef=coef,
        )  # fmt: skip
        ready = _library_rewards(batch.with_columns(values=critic_engine.values(batch)), config)
        advantages = algo.advantages(ready)
        assert advantages.returns is not None
        ready = ready.with_columns(advantages=advantages.advantages, returns=advantages.returns)
        vf = critic_engine.forward_backward(ready, ValueObjective(config)) | critic_engine.optim_step()
        policy = engine.forward_backward(
            ready, PolicyObjective(_loss(config), config, MAX_RESPONSE_TOKENS), TEMPERATURE
        )
        assert vf["critic/vf_loss"] == pytest.approx(expected["vf_loss"], rel=1e-4)
        assert vf["grad_norm"] == pytest.approx(expected["vf_grad_norm"], rel=1e-4)
        assert _total(policy, config) == pytest.approx(expected["loss"], rel=1e-4, abs=1e-6)
        assert engine.optim_step()["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)
        _assert_same_weights(engine, model)
        _assert_same_weights(critic_engine, critic)


def _critic_folder(path: str, folder: Path) -> str:
    """Write a critic whose output is not zero, so that its values and gradients say something from the start."""
    critic = AutoModelForTokenClassification.from_pretrained(path, num_labels=1)
    torch.nn.init.normal_(critic.score.weight, std=0.3, generator=torch.Generator().manual_seed(2))
    critic.save_pretrained(folder)
    return str(folder)


def test_an_on_policy_batch_may_leave_out_the_old_logprobs(tmp_path: Path) -> None:
    path = make_model(tmp_path)
    model, config = AutoModelForCausalLM.from_pretrained(path), GrpoConfig()
    batch = _scored_batch(model)
    on_policy = Batch({name: column for name, column in batch.columns.items() if name != "old_logp"})
    results = []
    for given in (batch, on_policy):
        engine = make_engine(path, optim=OPTIM)
        ready = given.with_columns(advantages=Grpo(config).advantages(given).advantages)
        engine.forward_backward(ready, PolicyObjective(_loss(config), config, MAX_RESPONSE_TOKENS), TEMPERATURE)
        engine.optim_step()
        results.append(weights(engine))
    for name, tensor in results[0].items():
        torch.testing.assert_close(tensor, results[1][name], rtol=1e-4, atol=1e-6)


def test_sampling_stops_at_the_end_token_and_greedy_takes_the_likeliest(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(make_model(tmp_path))
    prompts = [[5, 6, 7], [8, 9], [10]]
    first = reference_loop.sample(model, prompts, end=-1, max_tokens=4, temperature=0.0)
    assert first["response_len"].tolist() == [4, 4, 4]
    logits = model(input_ids=torch.tensor([[8, 9]])).logits[0, -1]
    assert first["response_ids"][1, 0] == logits.argmax()
    end = int(first["response_ids"][0, 1])
    stopped = reference_loop.sample(model, prompts, end=end, max_tokens=4, temperature=0.0)
    ids = first["response_ids"][0].tolist()
    assert stopped["response_len"][0] == ids.index(end) + 1


@pytest.mark.parametrize("algo", ["grpo", "ppo"])
def test_the_loop_runs_from_start_to_end(algo: str, capsys: pytest.CaptureFixture[str]) -> None:
    reference_loop.main(["--algo", algo, "--warm-steps", "2", "--steps", "1"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("warmed up: held-out accuracy") and lines[-1].startswith("trained: held-out accuracy")
    assert lines[1].startswith("step 1: score")
