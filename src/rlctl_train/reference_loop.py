"""The whole of GRPO and PPO in one flat file: one process, no Ray, no packing. To read, and to check the library by.

Run it: `python -m rlctl_train.reference_loop --algo grpo --steps 20`. It shares the configuration and the makers of
model and data with the library, and none of its arithmetic.

Letters: S sequences, P padded prompt length, T padded response length, L = P + T, V vocabulary.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification, AutoTokenizer

from rlctl_train.batch import Batch, length_mask, pad_rows
from rlctl_train.config.algo import GrpoConfig, PpoConfig, RlConfig
from rlctl_train.config.data import ArithmeticData
from rlctl_train.config.losses import ClipLoss
from rlctl_train.config.model import RandomModel
from rlctl_train.config.policy import KlEstimator
from rlctl_train.data.arithmetic import arithmetic_splits
from rlctl_train.model_factory import make_random_model


def sequences(batch: Batch) -> tuple[Tensor, Tensor]:
    """Return each prompt directly followed by its response [S, L], and the places that predict the response [S, T].

    All padding is at the end, where no real token sees it: a causal model needs no attention mask.
    """
    prompts, responses = batch["prompt_ids"], batch["response_ids"]
    ids = torch.zeros(len(batch), prompts.shape[1] + responses.shape[1], dtype=torch.long)
    for i, (p, t) in enumerate(zip(batch["prompt_len"].tolist(), batch["response_len"].tolist(), strict=True)):
        ids[i, :p], ids[i, p : p + t] = prompts[i, :p], responses[i, :t]
    return ids, batch["prompt_len"][:, None] - 1 + torch.arange(responses.shape[1])


def distributions(model: Any, batch: Batch, temperature: float) -> Tensor:
    """Return the log-probability of every token of the vocabulary where each response token was drawn, [S, T, V]."""
    ids, before = sequences(batch)
    logits = model(input_ids=ids).logits / temperature
    everywhere = logits.log_softmax(-1)  # [S, L, V]
    return everywhere[torch.arange(len(ids))[:, None], before]


def of_drawn(full_logp: Tensor, batch: Batch) -> Tensor:
    """Return the log-probability of each response token, [S, T] in nats."""
    return full_logp.gather(-1, batch["response_ids"][:, :, None]).squeeze(-1)


def critic_values(critic: Any, batch: Batch) -> Tensor:
    """Return the critic's value of the state before each response token, [S, T]."""
    ids, before = sequences(batch)
    return critic(input_ids=ids).logits.squeeze(-1)[torch.arange(len(ids))[:, None], before]


def kl(logp: Tensor, ref_logp: Tensor, estimator: KlEstimator) -> Tensor:
    """Return the KL estimate of each token, [S, T] in nats."""
    difference = logp - ref_logp
    squared = difference**2 / 2
    inverse = (-difference).clamp(-20, 20)
    k3 = (inverse.exp() - inverse - 1).clamp(-10, 10)
    values = {"k1": difference, "k2": squared, "k3": k3, "abs": difference.abs()}
    if estimator.endswith("+"):  # the value of one, the gradient of k2
        return values[estimator[:-1]].detach() + squared - squared.detach()
    return values[estimator]


def penalised_rewards(batch: Batch, config: RlConfig, coef: float) -> Tensor:
    """Return `rewards` [S, T], less `coef` times the KL to the reference where the configuration asks for it."""
    if config.kl_in_reward is None:
        return batch["rewards"]
    return batch["rewards"] - coef * kl(batch["old_logp"], batch["ref_logp"], config.kl_in_reward.estimator)


def grpo_advantages(batch: Batch, config: GrpoConfig) -> Tensor:
    """Return each response's score against those of its group, on every token, [S, T]."""
    mask = batch["response_mask"]
    scores, groups = (batch["rewards"] * mask).sum(1), batch["group"]
    advantages = torch.zeros_like(mask)
    for group in groups.unique():
        members = groups == group
        centred = scores[members] - scores[members].mean()
        if config.normalize_std:
            centred = centred / (scores[members].std() + 1e-6)
        advantages[members] = centred[:, None] * mask[members]
    return advantages


def ppo_advantages(batch: Batch, config: PpoConfig) -> tuple[Tensor, Tensor]:
    """Return whitened GAE advantages and the critic's targets, [S, T] each."""
    mask = batch["response_mask"]
    advantages = torch.zeros_like(mask)
    for i in range(len(batch)):
        value_after = advantage_after = 0.0
        for t in reversed(mask[i].nonzero().squeeze(1).tolist()):
            value = float(batch["values"][i, t])
            error = float(batch["rewards"][i, t]) + config.gamma * value_after - value
            advantage_after = error + config.gamma * config.lam * advantage_after
            value_after = value
            advantages[i, t] = advantage_after
    returns = (advantages + batch["values"]) * mask
    sampled = advantages[mask.bool()]
    return (advantages - sampled.mean()) / (sampled.var() + 1e-8).sqrt() * mask, returns


def aggregate(values: Tensor, mask: Tensor, config: RlConfig, max_response_tokens: int) -> Tensor:
    """Reduce per-token values [S, T] of the whole batch to one number, as `algo.aggregation` says."""
    lengths = mask.sum(1)
    values = torch.where(mask.bool(), values, 0.0)[lengths > 0]
    sums, lengths = values.sum(1), lengths[lengths > 0]
    return {
        "token-mean": sums.sum() / lengths.sum(),
        "token-sum": sums.sum(),
        "seq-mean-token-sum": sums.mean(),
        "seq-mean-token-mean": (sums / lengths).mean(),
        "seq-mean-token-sum-norm": sums.mean() / (config.aggregation_norm or max_response_tokens),
    }[config.aggregation]


def reference_kl(full_logp: Tensor, batch: Batch, config: RlConfig) -> Tensor:
    """Return the KL of each token to the reference, [S, T] in nats: the whole sum, or an estimate of it."""
    if config.kl_loss_estimator == "full":
        return (full_logp.exp() * (full_logp - batch["ref_full_logp"])).sum(-1)
    return kl(of_drawn(full_logp, batch), batch["ref_logp"], config.kl_loss_estimator)


def policy_loss(
    full_logp: Tensor, advantages: Tensor, batch: Batch, config: RlConfig, max_response_tokens: int
) -> Tensor:
    """Return the clipped policy loss, less the entropy bonus, plus the KL loss; `full_logp` is [S, T, V]."""
    logp, entropy = of_drawn(full_logp, batch), -(full_logp.exp() * full_logp).sum(-1)
    old = batch["old_logp"] if "old_logp" in batch else logp.detach()
    ratio = (logp - old).clamp(-20, 20).exp()
    clip = config.loss
    assert isinstance(clip, ClipLoss), "this loop knows the clipped loss alone"
    held = ratio.clamp(1 - clip.clip_low, 1 + clip.clip_high)
    loss = torch.maximum(-advantages * ratio, -advantages * held)
    if clip.dual_clip is not None:
        loss = torch.where(advantages < 0, torch.minimum(loss, -advantages * clip.dual_clip), loss)
    loss = loss - config.entropy_coef * entropy
    if config.kl_loss_coef > 0:
        loss = loss + config.kl_loss_coef * reference_kl(full_logp, batch, config)
    return aggregate(loss, batch["response_mask"], config, max_response_tokens)


def value_loss(values: Tensor, returns: Tensor, batch: Batch, config: PpoConfig) -> Tensor:
    """Return half the mean over tokens of the larger of free and clipped squared error."""
    old, mask = batch["values"], batch["response_mask"].bool()
    near = old + (values - old).clamp(-config.value_clip, config.value_clip)
    return torch.maximum((values - returns) ** 2, (near - returns) ** 2)[mask].mean() / 2


def optimizer_step(model: Any, optimizer: torch.optim.Optimizer, loss: Tensor, max_grad_norm: float) -> float:
    """Take one clipped step down the gradient of the loss; return the gradient's L2 norm before clipping."""
    optimizer.zero_grad()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
    optimizer.step()
    return norm.item()


def grpo_update(
    model: Any, optimizer: torch.optim.Optimizer, batch: Batch, config: GrpoConfig,
    *, temperature: float, max_response_tokens: int, max_grad_norm: float = 1.0, kl_coef: float = 0.0,
) -> dict[str, float]:  # fmt: skip
    """Take one GRPO step on a scored batch; return its loss and gradient norm."""
    batch = batch.with_columns(rewards=penalised_rewards(batch, config, kl_coef))
    advantages = grpo_advantages(batch, config)
    loss = policy_loss(distributions(model, batch, temperature), advantages, batch, config, max_response_tokens)
    return {"loss": loss.item(), "grad_norm": optimizer_step(model, optimizer, loss, max_grad_norm)}


def ppo_update(
    model: Any, optimizer: torch.optim.Optimizer, critic: Any, critic_optimizer: torch.optim.Optimizer, batch: Batch,
    config: PpoConfig, *, temperature: float, max_response_tokens: int, max_grad_norm: float = 1.0,
    kl_coef: float = 0.0,
) -> dict[str, float]:  # fmt: skip
    """Take one PPO step of critic and policy on a scored batch; return losses and gradient norms."""
    with torch.no_grad():
        batch = batch.with_columns(values=critic_values(critic, batch))
    batch = batch.with_columns(rewards=penalised_rewards(batch, config, kl_coef))
    advantages, returns = ppo_advantages(batch, config)
    vf_loss = value_loss(critic_values(critic, batch), returns, batch, config)
    vf_norm = optimizer_step(critic, critic_optimizer, vf_loss, config.critic_optim.max_grad_norm)
    loss = policy_loss(distributions(model, batch, temperature), advantages, batch, config, max_response_tokens)
    norm = optimizer_step(model, optimizer, loss, max_grad_norm)
    return {"loss": loss.item(), "grad_norm": norm, "vf_loss": vf_loss.item(), "vf_grad_norm": vf_norm}


@torch.no_grad()
def sample(model: Any, prompts: Sequence[list[int]], end: int, *, max_tokens: int, temperature: float) -> Batch:
    """Draw one response per prompt (temperature 0: the likeliest tokens), reading everything anew for each token."""
    responses: list[list[int]] = [[] for _ in prompts]
    for _ in range(max_tokens):
        ids = pad_rows([[*p, *r] for p, r in zip(prompts, responses, strict=True)], dtype=torch.long)
        last = torch.tensor([len(p) + len(r) - 1 for p, r in zip(prompts, responses, strict=True)])
        logits = model(input_ids=ids).logits[torch.arange(len(ids)), last]
        drawn = logits.argmax(-1) if temperature == 0 else (logits / temperature).softmax(-1).multinomial(1).squeeze(1)
        for response, token in zip(responses, drawn.tolist(), strict=True):
            if end not in response:
                response.append(token)
    return to_batch(prompts, responses)


Problem = tuple[list[int], list[int], str]
"""Prompt tokens, tokens of the demonstrated response, right answer."""


def problems(config: ArithmeticData, tokenizer: Any, seed: int) -> dict[str, list[Problem]]:
    """Return the training and the held-out problems as tokens."""

    def encode(row: dict[str, Any]) -> Problem:
        text = tokenizer.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True)
        prompt, response = tokenizer([text, row["response"] + tokenizer.eos_token]).input_ids
        return prompt, response, row["reward_model"]["ground_truth"]

    return {name: [encode(row) for row in rows] for name, rows in arithmetic_splits(config, seed).items()}


def to_batch(prompts: Sequence[list[int]], responses: Sequence[list[int]]) -> Batch:
    """Return prompts and responses as a batch."""
    response_ids = pad_rows(responses, dtype=torch.long)
    response_len = torch.tensor([len(response) for response in responses])
    return Batch(
        {
            "prompt_ids": pad_rows(prompts, dtype=torch.long),
            "prompt_len": torch.tensor([len(prompt) for prompt in prompts]),
            "response_ids": response_ids,
            "response_len": response_len,
            "response_mask": length_mask(response_len, response_ids.shape[1]),
        }
    )


def scores(batch: Batch, truths: Sequence[str], tokenizer: Any) -> Tensor:
    """Return 1 where the whole response is the right number and 0 elsewhere, [S]."""
    rows = zip(batch["response_ids"], batch["response_len"].tolist(), strict=True)
    texts = [tokenizer.decode(ids[:length], skip_special_tokens=True) for ids, length in rows]
    return torch.tensor([float(text == truth) for text, truth in zip(texts, truths, strict=True)])


def main(arguments: list[str] | None = None) -> None:
    """Warm a tiny model up on sums by a careless pupil, then let GRPO or PPO teach it to carry."""
    parser = argparse.ArgumentParser(prog="python -m rlctl_train.reference_loop", description=main.__doc__)
    parser.add_argument("--algo", choices=("grpo", "ppo"), default="grpo")
    parser.add_argument("--steps", type=int, default=20, help="reinforcement-learning steps (default: 20)")
    parser.add_argument("--warm-steps", type=int, default=1000, help="supervised steps before them (default: 1000)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    prompts_per_step, max_tokens, temperature = 64, 5, 1.0
    algo = GrpoConfig() if options.algo == "grpo" else PpoConfig(group_size=8, lam=0.95)
    shape = RandomModel(hidden_size=64, num_layers=2, num_heads=2, intermediate_size=256, init_std=0.05)
    sums = ArithmeticData(min_operand=10, num_train=7500, careless_demonstrations=0.6)

    torch.manual_seed(options.seed)
    draw = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as folder:
        make_random_model(shape, Path(folder), options.seed)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder)
        data = problems(sums, tokenizer, options.seed)

        optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
        for step in range(options.warm_steps):
            optimizer.param_groups[0]["lr"] = 2e-3 * (1 - step / options.warm_steps)
            prompts, responses, _ = zip(*draw.sample(data["train"], prompts_per_step), strict=True)
            batch = to_batch(prompts, responses)
            logp = of_drawn(distributions(model, batch, 1.0), batch)
            optimizer_step(model, optimizer, -logp[batch["response_mask"].bool()].mean(), 1.0)

        model.save_pretrained(folder)
        critic = AutoModelForTokenClassification.from_pretrained(folder, num_labels=1)
        torch.nn.init.zeros_(critic.score.weight)
        torch.nn.init.zeros_(critic.score.bias)

    def accuracy() -> float:
        prompts, _, truths = zip(*data["val"], strict=True)
        batch = sample(model, prompts, tokenizer.eos_token_id, max_tokens=max_tokens, temperature=0.0)
        return scores(batch, truths, tokenizer).mean().item()

    print(f"warmed up: held-out accuracy {accuracy():.3f}")
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4, weight_decay=0.0)
    critic_optimizer = torch.optim.AdamW(critic.parameters(), lr=1e-3, weight_decay=0.0)
    for step in range(1, options.steps + 1):
        chosen = [problem for problem in draw.sample(data["train"], prompts_per_step) for _ in range(algo.group_size)]
        prompts, _, truths = zip(*chosen, strict=True)
        batch = sample(model, prompts, tokenizer.eos_token_id, max_tokens=max_tokens, temperature=temperature)
        score = scores(batch, truths, tokenizer)
        rewards = torch.zeros_like(batch["response_mask"])
        rewards[torch.arange(len(batch)), batch["response_len"] - 1] = score
        batch = batch.with_columns(rewards=rewards, group=torch.arange(len(batch)) // algo.group_size)
        sizes = {"temperature": temperature, "max_response_tokens": max_tokens}
        if isinstance(algo, GrpoConfig):
            metrics = grpo_update(model, optimizer, batch, algo, **sizes)
        else:
            metrics = ppo_update(model, optimizer, critic, critic_optimizer, batch, algo, **sizes)
        shown = " ".join(f"{name} {value:.3f}" for name, value in metrics.items())
        print(f"step {step}: score {score.mean().item():.3f} {shown}")
    print(f"trained: held-out accuracy {accuracy():.3f}")


if __name__ == "__main__":
    main()
