"""Relations between settings: what must hold across sections. Each rule refuses and never writes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from rlctl_train.config.algo import DapoConfig, SftConfig
from rlctl_train.config.data import ArithmeticData
from rlctl_train.config.model import RandomModel
from rlctl_train.config.rollout import VllmRollout
from rlctl_train.config.run import RunConfig


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a configuration: the key at fault, its value, what is wrong, and the way out."""

    key: str
    value: Any
    what: str
    remedy: str


def relation_problems(config: RunConfig) -> list[Problem]:
    """Return every violated relation of a valid-by-field configuration, in reading order."""
    return [problem for rule in RULES for problem in rule(config)]


def _model_shape(config: RunConfig) -> Iterator[Problem]:
    model = config.model
    if not isinstance(model, RandomModel):
        return
    if model.hidden_size % model.num_heads:
        yield Problem(
            "model.num_heads", model.num_heads,
            f"does not divide model.hidden_size={model.hidden_size}",
            f"choose one of {_divisors(model.hidden_size)}",
        )  # fmt: skip
    elif (model.hidden_size // model.num_heads) % 2:
        yield Problem(
            "model.num_heads", model.num_heads,
            f"gives an odd head size of {model.hidden_size // model.num_heads}; rotary embeddings need an even one",
            "choose fewer heads or another model.hidden_size",
        )  # fmt: skip
    if model.num_heads % model.num_kv_heads:
        yield Problem(
            "model.num_kv_heads", model.num_kv_heads,
            f"does not divide model.num_heads={model.num_heads}",
            f"choose one of {_divisors(model.num_heads)}",
        )  # fmt: skip
    longest = config.data.max_prompt_tokens + config.rollout.max_response_tokens
    if longest > model.max_position:
        yield Problem(
            "rollout.max_response_tokens", config.rollout.max_response_tokens,
            f"with data.max_prompt_tokens={config.data.max_prompt_tokens} makes sequences of {longest} tokens, "
            f"but model.max_position={model.max_position}",
            f"set it to {max(1, model.max_position - config.data.max_prompt_tokens)}, or raise model.max_position",
        )  # fmt: skip


def _adapters(config: RunConfig) -> Iterator[Problem]:
    if config.model.lora is not None and config.engine.type != "fsdp2":
        yield Problem(
            "model.lora", "set", f"is not known to engine.type={config.engine.type!r}",
            "set engine.type=fsdp2, or remove the model.lora section",
        )  # fmt: skip


def _batch_sizes(config: RunConfig) -> Iterator[Problem]:
    trainer = config.trainer
    if trainer.prompts_per_step % trainer.mini_batches_per_step:
        yield Problem(
            "trainer.mini_batches_per_step", trainer.mini_batches_per_step,
            f"does not divide trainer.prompts_per_step={trainer.prompts_per_step}",
            f"choose one of {_divisors(trainer.prompts_per_step)}",
        )  # fmt: skip
    ranks = trainer.num_devices
    group = 1 if isinstance(config.algo, SftConfig) else config.algo.group_size
    sequences = trainer.prompts_per_step * group // trainer.mini_batches_per_step
    if ranks is not None and sequences < ranks:
        yield Problem(
            "trainer.num_devices", ranks,
            f"is more than the {sequences} sequences of one mini-batch",
            f"use at most {sequences} devices or raise trainer.prompts_per_step",
        )  # fmt: skip
    if isinstance(config.data, ArithmeticData) and trainer.prompts_per_step > config.data.num_train:
        yield Problem(
            "trainer.prompts_per_step", trainer.prompts_per_step,
            f"is more than the {config.data.num_train} training problems of data.num_train",
            f"use at most {config.data.num_train} or raise data.num_train",
        )  # fmt: skip


def _warm_start(config: RunConfig) -> Iterator[Problem]:
    warm = config.warm_start
    if warm is None:
        return
    if warm.rows_per_step % warm.mini_batches_per_step:
        yield Problem(
            "warm_start.mini_batches_per_step", warm.mini_batches_per_step,
            f"does not divide warm_start.rows_per_step={warm.rows_per_step}",
            f"choose one of {_divisors(warm.rows_per_step)}",
        )  # fmt: skip
    updates = warm.num_steps * warm.mini_batches_per_step
    if warm.optim.warmup_steps > updates:
        yield Problem(
            "warm_start.optim.warmup_steps", warm.optim.warmup_steps,
            f"is longer than the warm start's {updates} optimizer steps", f"use at most {updates}",
        )  # fmt: skip


def _micro_batch(config: RunConfig) -> Iterator[Problem]:
    budget = config.engine.max_tokens_per_micro_batch
    longest = config.data.max_prompt_tokens + config.rollout.max_response_tokens
    if budget is not None and budget < longest:
        yield Problem(
            "engine.max_tokens_per_micro_batch", budget,
            f"cannot hold one sequence of {longest} tokens (data.max_prompt_tokens + rollout.max_response_tokens)",
            f"set it to {longest} or more, or leave it unset",
        )  # fmt: skip


def _operands(config: RunConfig) -> Iterator[Problem]:
    data = config.data
    if isinstance(data, ArithmeticData) and data.min_operand > data.max_operand:
        yield Problem(
            "data.min_operand", data.min_operand,
            f"is more than data.max_operand={data.max_operand}",
            f"use at most {data.max_operand} or raise data.max_operand",
        )  # fmt: skip


def _reward(config: RunConfig) -> Iterator[Problem]:
    if config.reward is None and not isinstance(config.algo, SftConfig):
        yield Problem(
            "reward", None, f"is missing: algo.type={config.algo.type!r} needs one",
            "set reward.type (arithmetic, gsm8k, math, sum) or reward.path=FILE.py:FUNCTION",
        )  # fmt: skip
    if (
        isinstance(config.data, ArithmeticData)
        and config.reward is not None
        and config.reward.type in ("gsm8k", "math")
    ):
        yield Problem(
            "reward.type", config.reward.type,
            "looks for an answer form that data.type='arithmetic' never shows", "set reward.type=arithmetic",
        )  # fmt: skip


def _losses(config: RunConfig) -> Iterator[Problem]:
    algo = config.algo
    if isinstance(algo, SftConfig):
        if config.warm_start is not None:
            yield Problem(
                "warm_start",
                "set",
                "is itself supervised, as algo.type='sft' is",
                "remove the warm_start section",
            )
        return
    longest = config.rollout.max_response_tokens
    if isinstance(algo, DapoConfig) and (algo.overlong_buffer_tokens or 0) > longest:
        yield Problem(
            "algo.overlong_buffer_tokens", algo.overlong_buffer_tokens,
            f"is more than rollout.max_response_tokens={longest}", f"use at most {longest}",
        )  # fmt: skip
    if algo.aggregation_norm is not None and algo.aggregation != "seq-mean-token-sum-norm":
        yield Problem(
            "algo.aggregation_norm", algo.aggregation_norm,
            f"has no effect with algo.aggregation={algo.aggregation!r}",
            "unset it, or set algo.aggregation=seq-mean-token-sum-norm",
        )  # fmt: skip


def _placement(config: RunConfig) -> Iterator[Problem]:
    trainer, rollout = config.trainer.num_devices, config.rollout.num_devices
    if config.placement == "colocated" and None not in (trainer, rollout) and trainer != rollout:
        yield Problem(
            "rollout.num_devices", rollout,
            f"differs from trainer.num_devices={trainer}, but placement='colocated' puts both on the same devices",
            "unset one of them, make them equal, or set placement=split",
        )  # fmt: skip


def _tensor_parallel(config: RunConfig) -> Iterator[Problem]:
    rollout = config.rollout
    if not isinstance(rollout, VllmRollout):
        return
    size, devices = rollout.tensor_parallel, rollout.num_devices
    if size is not None and devices is not None and devices % size:
        yield Problem(
            "rollout.tensor_parallel", size,
            f"does not divide rollout.num_devices={devices}", f"choose one of {_divisors(devices)}",
        )  # fmt: skip
    if "tensor_parallel_size" in rollout.engine_args:
        yield Problem(
            "rollout.engine_args", rollout.engine_args,
            "splits the model behind the planner's back", "remove tensor_parallel_size and set rollout.tensor_parallel",
        )  # fmt: skip


def _schedules(config: RunConfig) -> Iterator[Problem]:
    trainer = config.trainer
    updates = trainer.num_steps * trainer.mini_batches_per_step * trainer.epochs_per_step
    if trainer.optim.warmup_steps > updates:
        yield Problem(
            "trainer.optim.warmup_steps", trainer.optim.warmup_steps,
            f"is longer than the run's {updates} optimizer steps", f"use at most {updates}",
        )  # fmt: skip


def _divisors(number: int) -> str:
    """Return the divisors of a number up to 4096: larger ones help nobody, and the search must end."""
    return ", ".join(str(d) for d in range(1, min(number, 4096) + 1) if number % d == 0)


RULES = (
    _model_shape, _adapters, _batch_sizes, _warm_start, _micro_batch, _operands, _reward, _losses, _placement,
    _tensor_parallel, _schedules,
)  # fmt: skip
