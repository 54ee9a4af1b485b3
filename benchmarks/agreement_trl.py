"""TRL's side of `agreement.py`, in an environment of its own: trl==1.16.0. A trainer's loss is called without one."""

from __future__ import annotations

import sys
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from agreement_cases import Call, serve
from trl import GRPOTrainer
from trl.experimental.gkd import GKDTrainer
from trl.experimental.gmpo import GMPOTrainer

LOSS_TYPES = {"token-mean": "bnpo", "seq-mean-token-mean": "grpo", "seq-mean-token-sum-norm": "dr_grpo"}


def policy_loss(x: dict[str, Any], o: dict[str, Any]) -> dict[str, Any]:
    loss, mask, logp = o["loss"], x["response_mask"], x["logp"]
    kind = loss["type"]
    same = SimpleNamespace(gather=lambda value: value, reduce=lambda value, reduction: value, num_processes=1)
    trainer: Any = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (logp, torch.zeros_like(mask), None),
        loss_type=kind if kind in ("cispo", "sapo") else LOSS_TYPES[o["aggregation"]],
        importance_sampling_level="sequence" if kind == "gspo" else "token",
        epsilon_low=loss.get("clip_low"), epsilon_high=loss.get("clip_high", 0.0) + (kind == "cispo"),
        beta=o.get("kl_loss_coef", 0.0), max_completion_length=mask.shape[1], accelerator=same,
        args=SimpleNamespace(
            delta=loss.get("dual_clip"), use_bias_correction_kl=False, steps_per_generation=1,
            sapo_temperature_pos=loss.get("tau_pos"), sapo_temperature_neg=loss.get("tau_neg"),
        ),
        top_entropy_quantile=1.0, off_policy_mask_threshold=None, use_vllm=False, _entropy_bonus_enabled=False,
        aux_loss_enabled=False, current_gradient_accumulation_steps=1, model=SimpleNamespace(training=True),
        _metrics={"train": defaultdict(list)},
    )  # fmt: skip
    size = len(mask)
    inputs = {
        "prompt_ids": torch.zeros(size, 1), "prompt_mask": torch.ones(size, 1),
        "completion_ids": torch.zeros(mask.shape),
        "completion_mask": x["whole_mask"], "tool_mask": mask, "num_items_in_batch": mask.sum(),
        "advantages": x["advantages"][:, 0], "old_per_token_logps": x["old_logp"],
        "ref_per_token_logps": x["ref_logp"],
    }  # fmt: skip
    trainer_class = GMPOTrainer if kind == "gmpo" else GRPOTrainer
    value = trainer_class._compute_loss(trainer, None, inputs)
    return {"loss": value}


def full_kl(x: dict[str, Any], o: dict[str, Any]) -> dict[str, Any]:
    logits, mask = x["student_logits"], x["response_mask"]
    values = GKDTrainer.generalized_jsd_loss(logits, x["teacher_logits"], beta=0, reduction="none").sum(-1) * mask
    return {"kl": values}


CALLS: dict[str, Call] = {"loss": policy_loss, "full_kl": full_kl}

if __name__ == "__main__":
    serve("trl", CALLS, Path(sys.argv[1]), torch.from_numpy)
