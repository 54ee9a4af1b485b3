"""Tiny models, batches and objectives for the engine's tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from rlctl_hw.types import Savings
from torch import Tensor
from transformers import AutoModelForCausalLM

from rlctl_train.algos.ops import Counts, TokenOutputs, aggregate
from rlctl_train.batch import Batch
from rlctl_train.config.engine import Fsdp2Config
from rlctl_train.config.model import RandomModel
from rlctl_train.config.optim import OptimConfig
from rlctl_train.engines.fsdp2 import Fsdp2Engine
from rlctl_train.engines.sharding import full
from rlctl_train.model_factory import make_random_model

SMALL = RandomModel(
    hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, intermediate_size=48, max_position=64, init_std=0.2
)


def make_model(folder: Path, **changes: Any) -> str:
    """Make a tiny model and return its path."""
    make_random_model(SMALL.model_copy(update=changes), folder, seed=1)
    return str(folder)


def make_engine(path: str, **changes: Any) -> Fsdp2Engine:
    """Make an engine; `changes` are its arguments, fields of `Savings`, or fields of `Fsdp2Config`."""
    arguments: dict[str, Any] = {
        "model_path": path,
        "role": "actor",
        "lora": None,
        "optim": OptimConfig(lr=1e-2, max_grad_norm=0.1, schedule="cosine", warmup_steps=2),
        "num_updates": 8,
        "compute_dtype": "float32",
        "device": "cpu",
        "max_tokens_per_micro_batch": 1000,
        "seed": 0,
        "trust_remote_code": False,
    }
    saved = {key: changes.pop(key) for key in list(changes) if key in Savings.__dataclass_fields__}
    config = {key: changes.pop(key) for key in list(changes) if key not in arguments}
    return Fsdp2Engine(**(arguments | changes), config=Fsdp2Config(**config), savings=Savings(**saved))


def make_batch(num_rows: int = 10, *, seed: int = 0) -> Batch:
    """Rows of different lengths; most share a prompt, one is masked in the middle and one altogether."""
    draw = torch.Generator().manual_seed(seed)

    def integers(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=draw)

    prompt = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 3, 4])[:num_rows]
    response_len = integers(1, 13, num_rows)
    mask = (torch.arange(12) < response_len[:, None]).float()
    mask[3, 1] = 0
    mask[8] = 0
    prompt_len = integers(2, 9, 5)[prompt]
    return Batch(
        {
            "prompt_ids": integers(4, 100, 5, 8)[prompt] * (torch.arange(8) < prompt_len[:, None]),
            "prompt_len": prompt_len,
            "response_ids": integers(4, 100, num_rows, 12),
            "response_len": response_len,
            "response_mask": mask,
            "weight": torch.randn(num_rows, 12, generator=draw),
        }
    )


def policy_objective(outputs: TokenOutputs, micro: Batch, counts: Counts) -> tuple[Tensor, dict[str, Tensor]]:
    """A loss with a different weight on every token, and a small entropy bonus, averaged over tokens."""
    assert outputs.logp is not None and outputs.entropy is not None
    loss = aggregate(
        -micro["weight"] * outputs.logp - 0.1 * outputs.entropy, micro["response_mask"], "token-mean", counts
    )
    return loss, {"loss": loss.detach(), "rows": torch.tensor(float(len(micro)))}


def value_objective(outputs: TokenOutputs, micro: Batch, counts: Counts) -> tuple[Tensor, dict[str, Tensor]]:
    """Squared distance of values to the weights, averaged over tokens."""
    assert outputs.values is not None
    loss = aggregate((outputs.values - micro["weight"]).square(), micro["response_mask"], "token-mean", counts)
    return loss, {"loss": loss.detach()}


def kl_objective(outputs: TokenOutputs, micro: Batch, counts: Counts) -> tuple[Tensor, dict[str, Tensor]]:
    """Weigh the KL of every token differently."""
    assert outputs.ref_kl is not None and outputs.logp is not None
    loss = aggregate(outputs.ref_kl * micro["weight"] + outputs.logp, micro["response_mask"], "token-mean", counts)
    return loss, {"loss": loss.detach()}


def gradients(engine: Fsdp2Engine) -> dict[str, Tensor]:
    """Return the whole gradient by name."""
    return {name: full(p.grad).clone() for name, p in engine._parameters.items() if p.grad is not None}


def weights(engine: Fsdp2Engine) -> dict[str, Tensor]:
    """Return all weights by name."""
    return {name: tensor.clone() for name, tensor in engine.weights()}


def reference(path: str, batch: Batch, temperature: float) -> tuple[Tensor, Tensor, float, dict[str, Tensor]]:
    """Return log-probs [S, T], entropies [S, T], loss and gradients by plain transformers, row by row, no packing."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    logp, entropy = torch.zeros_like(batch["weight"]), torch.zeros_like(batch["weight"])
    for i in range(len(batch)):
        prompt = batch["prompt_ids"][i, : batch["prompt_len"][i]]
        response = batch["response_ids"][i, : batch["response_len"][i]]
        logits = model(torch.cat([prompt, response])[None]).logits[0, len(prompt) - 1 : -1]
        log_probs = (logits / temperature).log_softmax(-1)
        logp[i, : len(response)] = log_probs.gather(1, response[:, None]).squeeze(1)
        entropy[i, : len(response)] = -(log_probs.exp() * log_probs).sum(-1)
    logp, entropy = logp * batch["response_mask"], entropy * batch["response_mask"]
    counts = Counts(float(batch["response_mask"].sum()), 0.0)
    loss, _ = policy_objective(TokenOutputs(logp=logp, entropy=entropy), batch, counts)
    loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return logp.detach(), entropy.detach(), float(loss.detach()), grads


def train(engine: Fsdp2Engine, batch: Batch, num_steps: int) -> list[float]:
    """Take optimizer steps on one batch and return the losses before each."""
    losses = []
    for _ in range(num_steps):
        losses.append(engine.forward_backward(batch, policy_objective)["loss"])
        engine.optim_step()
    return losses
