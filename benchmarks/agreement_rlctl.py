"""rlctl's side of `agreement.py`: every call of `agreement_cases`, answered by what a run itself uses."""

from __future__ import annotations

from typing import Any

import torch
from agreement_cases import Call
from pydantic import TypeAdapter
from torch import Tensor

from rlctl_train.algos import ops
from rlctl_train.algos.correction import correct
from rlctl_train.algos.covariance import alone
from rlctl_train.algos.dapo import OverlongPenalty
from rlctl_train.algos.distill import top_k_kl
from rlctl_train.algos.groups import scores
from rlctl_train.algos.kl_control import KlController
from rlctl_train.algos.mismatch import mismatch, weight_metrics
from rlctl_train.algos.objective import PolicyObjective, ValueObjective
from rlctl_train.algos.prime import OutcomeObjective
from rlctl_train.algos.resample import chances
from rlctl_train.batch import Batch
from rlctl_train.config.actor_critic import PpoConfig, Resample
from rlctl_train.config.algo import AlgoConfig, GrpoConfig, RlConfig
from rlctl_train.config.correction import ImportanceWeights, RolloutCorrection
from rlctl_train.config.policy import AdaptiveKl, FixedKl
from rlctl_train.config.prime import PrimeConfig
from rlctl_train.registry import ALGOS, LOSSES, load

Columns = dict[str, Tensor]
Options = dict[str, Any]


def advantage(name: str) -> Call:
    """Return the call that answers with the advantages of one algorithm."""

    def answer(x: Columns, o: Options) -> Columns:
        x = dict(x)
        weights = x.pop("weights")
        more = {"rollout_weights": weights} if o.get("weights") else {}
        wanted = {"type": name} | {key: value for key, value in o.items() if key != "weights"}
        config: Any = TypeAdapter(AlgoConfig).validate_python(wanted)
        made = load(ALGOS, name)(config).advantages(Batch(x | more))
        return {"advantages": made.advantages} | ({} if made.returns is None else {"returns": made.returns})

    return answer


def objective(config: RlConfig, x: Columns) -> Columns:
    """Return loss and metrics of the whole batch as one micro-batch."""
    mask = x["response_mask"]
    numbers = {"row": torch.arange(len(mask)), "policy_version": torch.zeros(len(mask), dtype=torch.long)}
    batch = Batch(x | numbers)
    loss = PolicyObjective(load(LOSSES, config.loss.type)(config.loss), config, mask.shape[1])
    if loss.needs_statistics:
        batch = batch.with_columns(**loss.statistics(x["logp"].detach(), batch, alone))
    value, metrics = loss(ops.TokenOutputs(logp=x["logp"]), batch, ops.count(mask))
    return {"loss": value} | metrics


def policy_loss(x: Columns, o: Options) -> Columns:
    fields = {key: o[key] for key in ("loss", "aggregation", "kl_loss_coef") if key in o}
    if "bypass" in o:
        fields["correction"] = {"mode": "bypass", **o["bypass"]}
    if o.get("per_sequence"):
        x = x | {"advantages": x["advantages"][:, :1].expand_as(x["advantages"])}
    more = {"rollout_weights": x.pop("weights")} if o.get("weights") else {}
    return objective(GrpoConfig.model_validate(fields), x | more)


def response_level(wanted: Options, x: Columns) -> Columns:
    """Return the loss of an algorithm whose loss is made for its advantages."""
    config: Any = TypeAdapter(AlgoConfig).validate_python(wanted)
    return objective(config, x | {"advantages": load(ALGOS, config.type)(config).advantages(Batch(x)).advantages})


def kl(x: Columns, o: Options) -> Columns:
    return {"kl": ops.select(ops.kl_estimate(x["logp"], x["ref_logp"], o["estimator"]), x["response_mask"])}


def aggregate(x: Columns, o: Options) -> Columns:
    """Aggregate the second half of a batch by counts of the whole."""
    mask, half = x["response_mask"], len(x["response_mask"]) // 2
    values, norm = x["advantages"][half:], float(mask.shape[1])
    return {"loss": ops.aggregate(values, mask[half:], o["aggregation"], ops.count(mask), norm)}


def value_loss(x: Columns, o: Options) -> Columns:
    outputs, counts = ops.TokenOutputs(values=x["new_values"]), ops.count(x["response_mask"])
    loss, metrics = ValueObjective(PpoConfig(**o))(outputs, Batch(x), counts)
    return {"loss": loss, "clipfrac": metrics["critic/vf_clipfrac"]}


def kl_controller(x: Columns, o: Options) -> dict[str, Any]:
    controller, coefs = KlController(AdaptiveKl(**o)), []
    for measured in x["baseline"].abs().tolist():
        controller.update(measured, len(x["baseline"]))
        coefs.append(controller.coef)
    return {"coef": coefs}


def kl_in_reward(x: Columns, o: Options) -> dict[str, Any]:
    controller = KlController(AdaptiveKl(**o) if "target" in o else FixedKl(**o))
    rewards, measured = controller.apply(Batch(x))
    controller.update(measured, len(rewards))
    return {"rewards": rewards, "coef": controller.coef}


def correction(x: Columns, o: Options) -> dict[str, Any]:
    config = RolloutCorrection.model_validate({key: value for key, value in o.items() if key != "inverse"})
    made = correct(x["logp"], x["rollout_logp"], x["response_mask"], config)
    return {"mask": made.mask, **made.metrics} | ({} if made.weights is None else {"weights": made.weights})


def weight_diagnostics(x: Columns, o: Options) -> dict[str, float]:
    return weight_metrics(x["logp"], x["rollout_logp"], x["response_mask"], ImportanceWeights(**o))


def teacher_kl(x: Columns, o: Options) -> Columns:
    """Compare with a teacher on its k likeliest tokens, or on all."""
    teacher, student = x["teacher_logits"].log_softmax(-1), x["student_logits"].log_softmax(-1)
    top = teacher.topk(o.get("k", teacher.shape[-1]))
    return dict(
        zip(("kl", "mass"), top_k_kl(student.gather(-1, top.indices), top.values, x["response_mask"]), strict=True)
    )


def prime_reward_loss(x: Columns, o: Options) -> Columns:
    outputs, batch = ops.TokenOutputs(logp=x["reward_logp"]), Batch(x | {"correct": x["part/a"]})
    return {"loss": OutcomeObjective(PrimeConfig(**o))(outputs, batch, ops.count(x["response_mask"]))[0]}


CALLS: dict[str, Call] = {
    "gae": advantage("ppo"),
    "grpo_vectorized": advantage("grpo"),
    "rloo_vectorized": advantage("rloo"),
    **{name: advantage(name) for name in ("grpo", "rloo", "opo", "gpg", "gdpo", "remax", "otb", "passk_grpo", "prime")},
    **{name: advantage(name) for name in ("reinforce_pp", "reinforce_pp_baseline")},
    "loss": policy_loss,
    "pairs": lambda x, o: response_level({"type": "spin", "loss": o}, x),
    "sppo": lambda x, o: response_level({"type": "sppo", **o}, x),
    "kl": kl,
    "aggregate": aggregate,
    "value_loss": value_loss,
    "kl_controller": kl_controller,
    "kl_in_reward": kl_in_reward,
    "correction": correction,
    "diagnostics": lambda x, o: mismatch(x["logp"], x["rollout_logp"], x["response_mask"]),
    "weight_diagnostics": weight_diagnostics,
    "overlong": lambda x, o: {"penalty": -OverlongPenalty(**o).of(x["whole_mask"].sum(-1))},
    "resample": lambda x, o: {"chances": chances(scores(Batch(x)), TypeAdapter(Resample).validate_python(o))},
    "top_k_kl": teacher_kl,
    "full_kl": teacher_kl,
    "prime_reward_loss": prime_reward_loss,
}
