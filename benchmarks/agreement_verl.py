"""verl's side of `agreement.py`, in an environment of its own: verl==0.9.1; and that of a checkout of verl-recipe."""

from __future__ import annotations

import ast
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import verl
import verl.utils.torch_functional as verl_F
from agreement_cases import Call, serve
from verl import DataProto
from verl.trainer.distillation.fsdp.losses import compute_forward_kl_topk
from verl.trainer.ppo import core_algos as core
from verl.trainer.ppo import rollout_corr_helper as corr
from verl.trainer.ppo.ray_trainer import apply_kl_penalty
from verl.workers.config import ActorConfig
from verl.workers.config.actor import PolicyLossConfig
from verl.workers.reward_manager.dapo import DAPORewardManager

Columns = dict[str, torch.Tensor]
Options = dict[str, Any]
MODES = {"clip": "vanilla", "gmpo": "geo_mean", "dppo": "dppo_{variant}"}
FIELDS = {
    "clip_low": "clip_ratio_low", "clip_high": "clip_ratio_high", "threshold_low": "clip_ratio_low",
    "threshold_high": "clip_ratio_high", "dual_clip": "clip_ratio_c", "max_ratio": "clip_ratio_c",
    "tau_pos": "tau_pos", "tau_neg": "tau_neg",
}  # fmt: skip
SHARE = {"clip_cov": "clip_cov_ratio", "kl_cov": "kl_cov_ratio"}
LOSS_FIELDS = {"cov_low": "clip_cov_lb", "cov_high": "clip_cov_ub", "coef": "ppo_kl_coef", "beta": "dro_beta"}
LEVELS = {"token": "token", "sequence": "seq_sum", "geometric": "seq_mean", "max": "seq_max"}
UNLIKE = ("clip_cov", "kl_cov", "gmpo")
"""Losses of which the metrics have the names of rlctl's and other meanings."""


def grouped(name: str) -> Call:
    """Return the call of one advantage that compares the responses of a group."""

    def answer(x: Columns, o: Options) -> Columns:
        more: dict[str, Any] = {"f_norm": o["f_norm"]} if "f_norm" in o else {}
        if "normalize_std" in o:
            more = {"norm_adv_by_std_in_grpo": o["normalize_std"]}
            more |= {"config": more} if name.endswith("passk_outcome") else {}
        function = getattr(core, f"compute_{name}_advantage")
        made = function(x["rewards"], response_mask=x["response_mask"], index=x["group"].numpy(), **more)
        return {"advantages": made[0]}

    return answer


def gdpo(x: Columns, o: Options) -> Columns:
    mask, parts = x["response_mask"], list(o["parts"])
    made = core.compute_gdpo_outcome_advantage(
        x["rewards"], mask, x["group"].numpy(),
        config={"gdpo_reward_keys": parts, "gdpo_reward_weights": list(o["parts"].values())},
        non_tensor_batch={part: x[f"part/{part}"].numpy() for part in parts},
        batch={"prompts": torch.zeros(len(mask), 1), "attention_mask": whole(x)},
    )  # fmt: skip
    return {"advantages": made[0]}


def otb(x: Columns, o: Options) -> dict[str, Any]:
    turns = "multi_turn_" if o.get("multi_turn") else ""
    made = getattr(core, f"compute_{turns}optimal_token_baseline_advantage")(
        x["rewards"], x["response_mask"], x["group"].numpy(), x["old_logp"], x["sum_pi_squared"],
        x["weights"] if o.get("weights") else None,
    )  # fmt: skip
    return both(made)


def policy_loss(x: Columns, o: Options) -> dict[str, Any]:
    loss, mask, kind = o["loss"], x["response_mask"], o["loss"]["type"]
    mode, old = MODES.get(kind, kind).format(**loss), x["old_logp"]
    details = {LOSS_FIELDS[key]: value for key, value in loss.items() if key in LOSS_FIELDS}
    details |= {SHARE[kind]: loss["token_share"]} if kind in SHARE else {}
    if "bypass" in o:
        mode, old = "bypass_mode", x["rollout_logp"]
        details["rollout_correction"] = rules(o["bypass"]) | {
            "loss_type": "ppo_clip" if kind == "clip" else "reinforce"
        }
    counts = {"batch_num_tokens": int(mask.sum()), "global_batch_size": int(mask.any(-1).sum())}
    config = ActorConfig(
        strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, policy_loss=PolicyLossConfig(**details),
        global_batch_info={"dp_size": 1, "loss_scale_factor": mask.shape[1], **counts},
        **{FIELDS[key]: value for key, value in loss.items() if key in FIELDS},
    )  # fmt: skip
    logp = x["logp"]
    weights = x["weights"] if o.get("weights") else None
    function = core.get_policy_loss_fn(mode)
    value, metrics = function(old, logp, x["advantages"], mask, o["aggregation"], config, weights)
    return {"loss": value} | ({} if kind in UNLIKE or "bypass" in o else metrics)


def rules(o: Options) -> Options:
    """Return rejection rules and weights in verl's words; its k1 bounds are those of the inverse ratio."""
    names, bounds = [], []
    for rule in o.get("rejections", ()):
        names.append(f"{LEVELS[rule['level']]}_{rule['type']}")
        lower, upper = rule.get("lower", 1 / rule["upper"]), rule["upper"]
        lower, upper = (1 / upper, 1 / lower) if o.get("inverse") else (lower, upper)
        bounds.append(f"{lower!r}_{upper!r}" if rule["type"] == "k1" else repr(upper))
    found: Options = {"rollout_rs": ",".join(names), "rollout_rs_threshold": ",".join(bounds)} if names else {}
    if weights := o.get("weights"):
        upper, lower = weights["upper"], weights.get("lower")
        found["rollout_is"] = weights.get("level", "token")
        found["rollout_is_threshold"] = upper if lower is None else f"{lower}_{upper}"
        found["rollout_is_batch_normalize"] = weights.get("normalize", False)
    return found


def correction(x: Columns, o: Options) -> dict[str, Any]:
    try:
        made, mask, metrics = corr.compute_rollout_correction_and_rejection_mask(
            x["logp"], x["rollout_logp"], x["response_mask"], **rules(o)
        )
    except ZeroDivisionError:  # of its own diagnostics, where every weight is 0
        return {"weights": torch.full_like(x["logp"], torch.nan)}
    names = ("rollout_corr/rollout_rs_masked_fraction", "rollout_corr/rollout_rs_seq_masked_fraction")
    shares = {name: metrics[name] for name in names if name in metrics}
    return {"mask": mask, **shares} | ({} if made is None else {"weights": made.batch["rollout_is_weights"]})


def diagnostics(x: Columns, o: Options) -> dict[str, float]:
    made = corr.compute_offpolicy_metrics(x["logp"], x["rollout_logp"], x["response_mask"])
    return {f"rollout_corr/{name}": value for name, value in made.items()}


def weight_diagnostics(x: Columns, o: Options) -> dict[str, float]:
    return corr.compute_rollout_correction_and_rejection_mask(
        x["logp"], x["rollout_logp"], x["response_mask"], **rules({"weights": o})
    )[2]


def kl(x: Columns, o: Options) -> dict[str, Any]:
    logp, mask = x["logp"], x["response_mask"]
    values = core.kl_penalty(logp, x["ref_logp"], o["estimator"]) * mask
    return {"kl": values}


def aggregate(x: Columns, o: Options) -> Columns:
    mask, half = x["response_mask"], len(x["response_mask"]) // 2
    counts = {"batch_num_tokens": int(mask.sum()), "global_batch_size": int(mask.any(-1).sum())}
    loss = core.agg_loss(
        x["advantages"][half:], mask[half:], o["aggregation"], loss_scale_factor=mask.shape[1], **counts
    )
    return {"loss": loss}


def value_loss(x: Columns, o: Options) -> dict[str, Any]:
    values = x["new_values"]
    loss, share = core.compute_value_loss(values, x["returns"], x["values"], x["response_mask"], o["value_clip"])
    return {"loss": loss, "clipfrac": share}


def kl_controller(x: Columns, o: Options) -> dict[str, Any]:
    controller, coefs = core.AdaptiveKLController(o["coef"], o["target"], o["horizon"]), []
    for measured in x["baseline"].abs().tolist():
        controller.update(measured, len(x["baseline"]))
        coefs.append(controller.value)
    return {"coef": coefs}


def kl_in_reward(x: Columns, o: Options) -> dict[str, Any]:
    names = {"old_log_probs": "old_logp", "ref_log_prob": "ref_logp", "token_level_scores": "rewards"}
    columns = {name: x[ours] for name, ours in names.items()} | {"response_mask": x["response_mask"]}
    adaptive = "target" in o
    controller: Any = core.FixedKLController(o["coef"])
    if adaptive:
        controller = core.AdaptiveKLController(o["coef"], o["target"], o["horizon"])
    made, _ = apply_kl_penalty(DataProto.from_dict(columns), controller, o.get("estimator", "k1"))
    return {"rewards": made.batch["token_level_rewards"], "coef": controller.value}


def overlong(x: Columns, o: Options) -> dict[str, Any]:
    """The reward manager on responses of score 0, decoded by a tokenizer that knows one word."""
    mask, size = whole(x), len(x["group"])
    tokenizer = SimpleNamespace(decode=lambda ids, **_: "word", eos_token="end")
    buffer = SimpleNamespace(enable=True, len=o["buffer_tokens"], penalty_factor=o["penalty"], log=False)
    manager = DAPORewardManager(
        tokenizer, 0, compute_score=lambda **_: 0.0, max_resp_len=o["max_tokens"], overlong_buffer_cfg=buffer
    )
    columns = {"prompts": torch.ones(size, 1), "responses": mask[:, 1:], "attention_mask": mask}
    plain = {"reward_model": [{"ground_truth": ""}] * size, "data_source": [""] * size, "extra_info": [{}] * size}
    told = {name: np.array(column, dtype=object) for name, column in plain.items()}
    return {"penalty": manager(DataProto.from_dict(columns, non_tensors=told)).sum(-1)}


def resample(x: Columns, o: Options) -> dict[str, Any]:
    """The chances as they reach the draw."""
    seen, draw = [], torch.multinomial
    data = DataProto.from_dict({"token_level_scores": x["rewards"] * x["response_mask"]})
    torch.multinomial = lambda weights, *args, **more: seen.append(weights) or draw(weights, *args, **more)
    core.compute_pf_ppo_reweight_data(data, o["type"], o.get("power", 2.0))
    torch.multinomial = draw
    return {"chances": seen[0]}


def top_k_kl(x: Columns, o: Options) -> dict[str, Any]:
    mask, logits = x["response_mask"], x["student_logits"]
    top = x["teacher_logits"].log_softmax(-1).topk(o["k"])
    nested = [torch.nested.as_nested_tensor(list(part), layout=torch.jagged) for part in (top.values, top.indices)]
    settings: Any = SimpleNamespace(distillation_loss=SimpleNamespace(log_prob_min_clamp=None))
    made = compute_forward_kl_topk(logits.flatten(0, 1)[None], *nested, settings, "thd")
    values = made["distillation_losses"].reshape(mask.shape) * mask
    return {"kl": values, "mass": made["teacher_mass"].reshape(mask.shape) * mask}


def both(made: tuple[torch.Tensor, torch.Tensor]) -> Columns:
    return dict(zip(("advantages", "returns"), made, strict=True))


def whole(x: Columns) -> torch.Tensor:
    """Return the attention mask of one prompt token and the response with its tool replies, as integers."""
    return torch.cat([torch.ones(len(x["group"]), 1), x["whole_mask"]], 1).long()


def recipe(folder: Path) -> dict[str, Call]:
    """Return the calls of functions in files that need an older verl to be imported as a whole."""

    def function(path: str, name: str) -> Any:
        tree = ast.parse((folder / path).read_text())
        tree.body = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name]
        space: dict[str, Any] = {"torch": torch, "verl": verl, "verl_F": verl_F}
        exec(compile(tree, path, "exec"), space)
        return space[name]

    def prime(x: Columns, o: Options) -> Columns:
        coefs = SimpleNamespace(reward_dpo_coef=o["process_coef"], reward_gt_coef=o["outcome_coef"])
        columns = {"rm_scores": 0.05 * (x["reward_logp"] - x["ref_logp"]), "acc": x["rewards"].sum(-1)}
        data = DataProto.from_dict(columns | {"prompts": torch.ones(len(x["group"]), 1), "attention_mask": whole(x)})
        advantages = function("prime/prime_core_algos.py", "compute_rloo_advantage_return")
        made = advantages(data, x["response_mask"], 4, SimpleNamespace(algorithm=coefs))
        return both(made)

    def prime_reward_loss(x: Columns, o: Options) -> dict[str, Any]:
        logp = x["reward_logp"]
        made = function("prime/prime_core_algos.py", "compute_ce_dpo_loss_rm")
        loss = made(logp - x["ref_logp"], x["part/a"], x["response_mask"], o["beta"])
        return {"loss": loss}

    def sppo(x: Columns, o: Options) -> dict[str, Any]:
        logp, score = x["logp"], x["rewards"].sum(-1)
        better = score - function("sppo/sppo_ray_trainer.py", "softmean")(score, o["eta"], keepdim=True)
        made = function("sppo/dp_actor.py", "compute_sppo_loss")
        loss = made(x["old_logp"], logp, better, x["response_mask"], o["eta"])[0]
        return {"loss": loss}

    def pairs(x: Columns, o: Options) -> dict[str, Any]:
        logp, mask = x["logp"], x["response_mask"]
        best = function("spin/core_algos.py", "compute_onlinedpo_pref")(x["rewards"], mask)
        policy, reference = (logp * mask).sum(-1), (x["ref_logp"] * mask).sum(-1)
        loss = function("spin/core_algos.py", "compute_online_dpo_loss")(
            policy[best], policy[~best], reference[best], reference[~best],
            o["beta"], o.get("label_smoothing", 0.0), {"dpo": "sigmoid"}.get(o["type"], o["type"]),
        )  # fmt: skip
        return {"loss": loss}

    return {"prime": prime, "prime_reward_loss": prime_reward_loss, "sppo": sppo, "pairs": pairs}


OUTCOME = ("grpo", "grpo_vectorized", "rloo", "rloo_vectorized", "opo", "gpg")
CALLS: dict[str, Call] = {
    "gae": lambda x, o: both(
        core.compute_gae_advantage_return(x["rewards"], x["values"], x["response_mask"], o["gamma"], o["lam"])
    ),
    **{name: grouped(f"{name}_outcome") for name in OUTCOME},
    "passk_grpo": grouped("grpo_passk_outcome"),
    "reinforce_pp_baseline": grouped("reinforce_plus_plus_baseline_outcome"),
    "reinforce_pp": lambda x, o: both(
        core.compute_reinforce_plus_plus_outcome_advantage(x["rewards"], x["response_mask"], SimpleNamespace(**o))
    ),
    "remax": lambda x, o: both(core.compute_remax_outcome_advantage(x["rewards"], x["baseline"], x["response_mask"])),
    "gdpo": gdpo,
    "otb": otb,
    "loss": policy_loss,
    "kl": kl,
    "aggregate": aggregate,
    "value_loss": value_loss,
    "kl_controller": kl_controller,
    "kl_in_reward": kl_in_reward,
    "correction": correction,
    "diagnostics": diagnostics,
    "weight_diagnostics": weight_diagnostics,
    "overlong": overlong,
    "resample": resample,
    "top_k_kl": top_k_kl,
}

if __name__ == "__main__":
    serve("verl", CALLS, Path(sys.argv[1]), torch.from_numpy)
    if len(sys.argv) > 2:
        serve("recipe", recipe(Path(sys.argv[2])), Path(sys.argv[1]), torch.from_numpy)
