"""Relations between settings: what must hold across sections. Each rule refuses and never writes.

A relation names the keys it relates and says its rule in the docstring of its check, for whoever explains a key.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from rlctl_train.config.algo import DapoConfig, GdpoConfig, OtbConfig, SftConfig
from rlctl_train.config.data import ArithmeticData
from rlctl_train.config.distill import DistillConfig
from rlctl_train.config.launch_slurm import SlurmLaunch
from rlctl_train.config.model import RandomModel
from rlctl_train.config.preference import SpinConfig, SppoConfig
from rlctl_train.config.prime import PrimeConfig
from rlctl_train.config.rollout import VllmRollout
from rlctl_train.config.run import RunConfig


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a configuration: the key at fault, its value, what is wrong, and the way out."""

    key: str
    value: Any
    what: str
    remedy: str


Check = Callable[[RunConfig], Iterator[Problem]]


@dataclass(frozen=True)
class Relation:
    """One rule: the keys it relates, the rule in words, and the check that finds what breaks it."""

    keys: tuple[str, ...]
    rule: str
    check: Check


def relation_problems(config: RunConfig) -> list[Problem]:
    """Return every violated relation of a valid-by-field configuration, in reading order."""
    return [problem for relation in RELATIONS for problem in relation.check(config)]


def relations_of(key: str) -> tuple[Relation, ...]:
    """Return the relations that name a key, or a section that holds it."""
    parts = key.split(".")
    names = {".".join(parts[:end]) for end in range(1, len(parts) + 1)}
    return tuple(relation for relation in RELATIONS if names & set(relation.keys))


def _relates(*keys: str) -> Callable[[Check], Relation]:
    """Make a relation of a check, whose docstring is the rule."""

    def made(check: Check) -> Relation:
        return Relation(keys, " ".join((check.__doc__ or "").split()), check)

    return made


@_relates("model.num_heads", "model.hidden_size")
def _head_size(config: RunConfig) -> Iterator[Problem]:
    """In a random model model.num_heads divides model.hidden_size, into heads of an even number of features."""
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


@_relates("model.num_kv_heads", "model.num_heads")
def _key_value_heads(config: RunConfig) -> Iterator[Problem]:
    """In a random model model.num_kv_heads divides model.num_heads."""
    model = config.model
    if isinstance(model, RandomModel) and model.num_heads % model.num_kv_heads:
        yield Problem(
            "model.num_kv_heads", model.num_kv_heads,
            f"does not divide model.num_heads={model.num_heads}",
            f"choose one of {_divisors(model.num_heads)}",
        )  # fmt: skip


@_relates("rollout.max_response_tokens", "data.max_prompt_tokens", "model.max_position")
def _reach(config: RunConfig) -> Iterator[Problem]:
    """Prompt and response together, data.max_prompt_tokens + rollout.max_response_tokens, are at most
    model.max_position of a random model."""
    model = config.model
    longest = config.data.max_prompt_tokens + config.rollout.max_response_tokens
    if isinstance(model, RandomModel) and longest > model.max_position:
        yield Problem(
            "rollout.max_response_tokens", config.rollout.max_response_tokens,
            f"with data.max_prompt_tokens={config.data.max_prompt_tokens} makes sequences of {longest} tokens, "
            f"but model.max_position={model.max_position}",
            f"set it to {max(1, model.max_position - config.data.max_prompt_tokens)}, or raise model.max_position",
        )  # fmt: skip


@_relates("model.lora", "engine.type")
def _adapters(config: RunConfig) -> Iterator[Problem]:
    """Adapters (model.lora) need engine.type=fsdp2."""
    if config.model.lora is not None and config.engine.type != "fsdp2":
        yield Problem(
            "model.lora", "set", f"is not known to engine.type={config.engine.type!r}",
            "set engine.type=fsdp2, or remove the model.lora section",
        )  # fmt: skip


@_relates("algo.kl_loss_estimator", "engine.type")
def _whole_distributions(config: RunConfig) -> Iterator[Problem]:
    """algo.kl_loss_estimator=full needs engine.type=fsdp2."""
    algo = config.algo
    if not isinstance(algo, SftConfig) and algo.compares_distributions() and config.engine.type != "fsdp2":
        yield Problem(
            "algo.kl_loss_estimator", "full",
            f"needs whole distributions, which engine.type={config.engine.type!r} does not give",
            "set algo.kl_loss_estimator=k3 or k3+, or engine.type=fsdp2",
        )  # fmt: skip


@_relates("trainer.mini_batches_per_step", "trainer.prompts_per_step")
def _mini_batches(config: RunConfig) -> Iterator[Problem]:
    """trainer.mini_batches_per_step divides trainer.prompts_per_step."""
    trainer = config.trainer
    if trainer.prompts_per_step % trainer.mini_batches_per_step:
        yield Problem(
            "trainer.mini_batches_per_step", trainer.mini_batches_per_step,
            f"does not divide trainer.prompts_per_step={trainer.prompts_per_step}",
            f"choose one of {_divisors(trainer.prompts_per_step)}",
        )  # fmt: skip


@_relates(
    "trainer.num_devices", "trainer.prompts_per_step", "trainer.mini_batches_per_step", "algo.group_size", "algo.type"
)
def _sequence_a_device(config: RunConfig) -> Iterator[Problem]:
    """Every one of trainer.num_devices gets at least one sequence of a mini-batch, which has
    trainer.prompts_per_step * algo.group_size / trainer.mini_batches_per_step of them."""
    trainer = config.trainer
    ranks = trainer.num_devices
    group = 1 if isinstance(config.algo, SftConfig) else config.algo.group_size
    sequences = trainer.prompts_per_step * group // trainer.mini_batches_per_step
    if ranks is not None and sequences < ranks:
        yield Problem(
            "trainer.num_devices", ranks,
            f"is more than the {sequences} sequences of one mini-batch",
            f"use at most {sequences} devices or raise trainer.prompts_per_step",
        )  # fmt: skip


@_relates("trainer.prompts_per_step", "data.num_train", "data.type")
def _enough_problems(config: RunConfig) -> Iterator[Problem]:
    """trainer.prompts_per_step is at most data.num_train where data.type=arithmetic."""
    prompts = config.trainer.prompts_per_step
    if isinstance(config.data, ArithmeticData) and prompts > config.data.num_train:
        yield Problem(
            "trainer.prompts_per_step", prompts,
            f"is more than the {config.data.num_train} training problems of data.num_train",
            f"use at most {config.data.num_train} or raise data.num_train",
        )  # fmt: skip


@_relates("warm_start.mini_batches_per_step", "warm_start.rows_per_step")
def _warm_start_batches(config: RunConfig) -> Iterator[Problem]:
    """warm_start.mini_batches_per_step divides warm_start.rows_per_step."""
    warm = config.warm_start
    if warm is not None and warm.rows_per_step % warm.mini_batches_per_step:
        yield Problem(
            "warm_start.mini_batches_per_step", warm.mini_batches_per_step,
            f"does not divide warm_start.rows_per_step={warm.rows_per_step}",
            f"choose one of {_divisors(warm.rows_per_step)}",
        )  # fmt: skip


@_relates("warm_start.optim.warmup_steps", "warm_start.num_steps", "warm_start.mini_batches_per_step")
def _warm_start_schedule(config: RunConfig) -> Iterator[Problem]:
    """warm_start.optim.warmup_steps is at most the warm start's optimizer steps, warm_start.num_steps *
    warm_start.mini_batches_per_step."""
    warm = config.warm_start
    if warm is None:
        return
    updates = warm.num_steps * warm.mini_batches_per_step
    if warm.optim.warmup_steps > updates:
        yield Problem(
            "warm_start.optim.warmup_steps", warm.optim.warmup_steps,
            f"is longer than the warm start's {updates} optimizer steps", f"use at most {updates}",
        )  # fmt: skip


@_relates("engine.max_tokens_per_micro_batch", "data.max_prompt_tokens", "rollout.max_response_tokens")
def _micro_batch(config: RunConfig) -> Iterator[Problem]:
    """engine.max_tokens_per_micro_batch holds at least one sequence of data.max_prompt_tokens +
    rollout.max_response_tokens."""
    budget = config.engine.max_tokens_per_micro_batch
    longest = config.data.max_prompt_tokens + config.rollout.max_response_tokens
    if budget is not None and budget < longest:
        yield Problem(
            "engine.max_tokens_per_micro_batch", budget,
            f"cannot hold one sequence of {longest} tokens (data.max_prompt_tokens + rollout.max_response_tokens)",
            f"set it to {longest} or more, or leave it unset",
        )  # fmt: skip


@_relates("data.min_operand", "data.max_operand")
def _operands(config: RunConfig) -> Iterator[Problem]:
    """data.min_operand is at most data.max_operand."""
    data = config.data
    if isinstance(data, ArithmeticData) and data.min_operand > data.max_operand:
        yield Problem(
            "data.min_operand", data.min_operand,
            f"is more than data.max_operand={data.max_operand}",
            f"use at most {data.max_operand} or raise data.max_operand",
        )  # fmt: skip


@_relates("reward", "algo.type")
def _scored(config: RunConfig) -> Iterator[Problem]:
    """A reward is set for every algo.type but sft."""
    if config.reward is None and not isinstance(config.algo, SftConfig):
        yield Problem(
            "reward", None, f"is missing: algo.type={config.algo.type!r} needs one",
            "set reward.type (arithmetic, gsm8k, math, sum) or reward.path=FILE.py:FUNCTION",
        )  # fmt: skip


@_relates("reward.type", "data.type")
def _answer_form(config: RunConfig) -> Iterator[Problem]:
    """reward.type=gsm8k and math look for an answer form that data.type=arithmetic does not have."""
    reward = config.reward
    if isinstance(config.data, ArithmeticData) and reward is not None and reward.type in ("gsm8k", "math"):
        yield Problem(
            "reward.type", reward.type,
            "looks for an answer form that data.type='arithmetic' never shows", "set reward.type=arithmetic",
        )  # fmt: skip


@_relates("warm_start", "algo.type")
def _one_supervision(config: RunConfig) -> Iterator[Problem]:
    """warm_start is left out where algo.type=sft, which is supervised itself."""
    if isinstance(config.algo, SftConfig) and config.warm_start is not None:
        yield Problem(
            "warm_start", "set", "is itself supervised, as algo.type='sft' is", "remove the warm_start section"
        )


@_relates("algo.overlong_buffer_tokens", "rollout.max_response_tokens")
def _overlong_buffer(config: RunConfig) -> Iterator[Problem]:
    """algo.overlong_buffer_tokens is at most rollout.max_response_tokens."""
    algo, longest = config.algo, config.rollout.max_response_tokens
    if isinstance(algo, DapoConfig) and (algo.overlong_buffer_tokens or 0) > longest:
        yield Problem(
            "algo.overlong_buffer_tokens", algo.overlong_buffer_tokens,
            f"is more than rollout.max_response_tokens={longest}", f"use at most {longest}",
        )  # fmt: skip


@_relates("algo.parts", "algo.kl_in_reward", "algo.type")
def _reward_parts(config: RunConfig) -> Iterator[Problem]:
    """With algo.type=gdpo, algo.parts names what to learn from, and algo.kl_in_reward is left out: it changes the
    score and none of its parts."""
    algo = config.algo
    if not isinstance(algo, GdpoConfig):
        return
    if not algo.parts:
        yield Problem(
            "algo.parts", {}, "names no part of the reward to learn from",
            "give parts a weight each, as in algo.parts={math=1.0, form=0.5}, by their names in `reward/<part>`",
        )  # fmt: skip
    if algo.kl_in_reward is not None:
        yield Problem(
            "algo.kl_in_reward", "set", "has no effect with algo.type='gdpo', which learns from the reward's parts",
            "remove the algo.kl_in_reward section, or set algo.kl_loss_coef",
        )  # fmt: skip


@_relates("algo.task_coef", "algo.group_size", "algo.kl_in_reward", "algo.type")
def _taught_task(config: RunConfig) -> Iterator[Problem]:
    """With algo.type=distill, algo.task_coef above 0 needs algo.group_size of at least 2, and algo.kl_in_reward needs
    algo.task_coef above 0."""
    algo = config.algo
    if not isinstance(algo, DistillConfig):
        return
    if algo.task_coef > 0 and algo.group_size < 2:
        yield Problem(
            "algo.group_size", algo.group_size,
            f"gives a response nothing to be compared with, as algo.task_coef={algo.task_coef:g} asks",
            "set algo.group_size to 2 or more, or algo.task_coef=0",
        )  # fmt: skip
    if algo.task_coef == 0 and algo.kl_in_reward is not None:
        yield Problem(
            "algo.kl_in_reward", "set", "has no effect with algo.task_coef=0, which leaves the reward out",
            "remove the algo.kl_in_reward section, or set algo.kl_loss_coef",
        )  # fmt: skip


@_relates("algo.min_accuracy", "algo.max_accuracy", "algo.type")
def _accuracies(config: RunConfig) -> Iterator[Problem]:
    """With algo.type=prime, algo.min_accuracy is at most algo.max_accuracy."""
    algo = config.algo
    if isinstance(algo, PrimeConfig) and algo.min_accuracy > algo.max_accuracy:
        yield Problem(
            "algo.min_accuracy", algo.min_accuracy,
            f"is more than algo.max_accuracy={algo.max_accuracy:g}", f"use at most {algo.max_accuracy:g}",
        )  # fmt: skip


@_relates("algo.correction.mode", "algo.type")
def _squares_of_the_trainer(config: RunConfig) -> Iterator[Problem]:
    """algo.type=otb needs algo.correction.mode=decoupled, as its baseline reads the trainer's probabilities."""
    algo = config.algo
    if isinstance(algo, OtbConfig) and algo.correction is not None and algo.correction.mode == "bypass":
        yield Problem(
            "algo.correction.mode", "bypass",
            "leaves out the trainer's probabilities, which algo.type='otb' reads", "set algo.correction.mode=decoupled",
        )  # fmt: skip


@_relates("algo.aggregation_norm", "algo.aggregation")
def _aggregation_norm(config: RunConfig) -> Iterator[Problem]:
    """algo.aggregation_norm is unset unless algo.aggregation=seq-mean-token-sum-norm."""
    algo = config.algo
    if isinstance(algo, SftConfig):
        return
    if algo.aggregation_norm is not None and algo.aggregation != "seq-mean-token-sum-norm":
        yield Problem(
            "algo.aggregation_norm", algo.aggregation_norm,
            f"has no effect with algo.aggregation={algo.aggregation!r}",
            "unset it, or set algo.aggregation=seq-mean-token-sum-norm",
        )  # fmt: skip


@_relates("algo.correction", "algo.correction.weights", "algo.correction.rejections", "algo.correction.veto")
def _corrects_something(config: RunConfig) -> Iterator[Problem]:
    """algo.correction has algo.correction.weights, algo.correction.rejections or algo.correction.veto, unless its
    mode is bypass."""
    made = None if isinstance(config.algo, SftConfig) else config.algo.correction
    if made is None or made.mode == "bypass" or made.weights or made.rejections or made.veto is not None:
        return
    yield Problem(
        "algo.correction", "set", "corrects nothing",
        "set algo.correction.weights.level=token, or remove the algo.correction section: its metrics come anyway",
    )  # fmt: skip


@_relates("algo.correction.weights", "algo.correction.mode", "algo.loss.type")
def _bypass_weights(config: RunConfig) -> Iterator[Problem]:
    """With algo.correction.mode=bypass, algo.correction.weights goes with algo.loss.type=gpg only: other losses hold a
    ratio to the rollout engine already."""
    algo = config.algo
    made = None if isinstance(algo, SftConfig) else algo.correction
    if isinstance(algo, SftConfig) or made is None or made.mode != "bypass" or made.weights is None:
        return
    if algo.loss.type != "gpg":
        yield Problem(
            "algo.correction.weights", "set",
            f"weighs a loss that has the same ratio in it: algo.loss.type={algo.loss.type!r} with mode='bypass'",
            "set algo.loss.type=gpg, or remove the algo.correction.weights section",
        )  # fmt: skip


@_relates("algo.correction.weights.normalize", "algo.correction.mode")
def _bypass_mean(config: RunConfig) -> Iterator[Problem]:
    """algo.correction.weights.normalize needs algo.correction.mode=decoupled, which knows the whole batch before the
    update."""
    made = None if isinstance(config.algo, SftConfig) else config.algo.correction
    if made is not None and made.mode == "bypass" and made.weights is not None and made.weights.normalize:
        yield Problem(
            "algo.correction.weights.normalize", True,
            "needs the weights of the whole batch, which algo.correction.mode='bypass' never sees at once",
            "unset it, or set algo.correction.mode=decoupled",
        )  # fmt: skip


@_relates("algo.correction", "algo.type")
def _whole_responses(config: RunConfig) -> Iterator[Problem]:
    """algo.correction is left out with algo.type=spin and sppo, whose losses are of whole responses: it weighs and
    masks tokens."""
    algo = config.algo
    if isinstance(algo, (SpinConfig, SppoConfig)) and algo.correction is not None:
        yield Problem(
            "algo.correction", "set",
            f"weighs or masks tokens, but algo.type={algo.type!r} learns from whole responses",
            "remove the algo.correction section",
        )  # fmt: skip


@_relates("algo.refresh_every_steps", "model.lora")
def _moving_reference(config: RunConfig) -> Iterator[Problem]:
    """algo.refresh_every_steps is 0 with model.lora, where the model without its adapters is the reference."""
    algo = config.algo
    if isinstance(algo, SpinConfig) and algo.refresh_every_steps and config.model.lora is not None:
        yield Problem(
            "algo.refresh_every_steps", algo.refresh_every_steps,
            "asks for another reference than the model without its adapters, which model.lora makes it",
            "set it to 0, or remove the model.lora section",
        )  # fmt: skip


@_relates("rollout.num_devices", "trainer.num_devices", "placement")
def _placement(config: RunConfig) -> Iterator[Problem]:
    """rollout.num_devices equals trainer.num_devices where both are set and placement=colocated."""
    trainer, rollout = config.trainer.num_devices, config.rollout.num_devices
    if config.placement == "colocated" and None not in (trainer, rollout) and trainer != rollout:
        yield Problem(
            "rollout.num_devices", rollout,
            f"differs from trainer.num_devices={trainer}, but placement='colocated' puts both on the same devices",
            "unset one of them, make them equal, or set placement=split",
        )  # fmt: skip


@_relates("rollout.tensor_parallel", "rollout.num_devices")
def _whole_engines(config: RunConfig) -> Iterator[Problem]:
    """rollout.tensor_parallel divides rollout.num_devices where both are set."""
    rollout = config.rollout
    if not isinstance(rollout, VllmRollout):
        return
    size, devices = rollout.tensor_parallel, rollout.num_devices
    if size is not None and devices is not None and devices % size:
        yield Problem(
            "rollout.tensor_parallel", size,
            f"does not divide rollout.num_devices={devices}", f"choose one of {_divisors(devices)}",
        )  # fmt: skip


@_relates("rollout.engine_args", "rollout.tensor_parallel")
def _one_split(config: RunConfig) -> Iterator[Problem]:
    """rollout.engine_args leaves tensor_parallel_size to rollout.tensor_parallel."""
    rollout = config.rollout
    if isinstance(rollout, VllmRollout) and "tensor_parallel_size" in rollout.engine_args:
        yield Problem(
            "rollout.engine_args", rollout.engine_args,
            "splits the model behind the planner's back", "remove tensor_parallel_size and set rollout.tensor_parallel",
        )  # fmt: skip


@_relates("trainer.optim.warmup_steps", "trainer.num_steps", "trainer.mini_batches_per_step", "trainer.epochs_per_step")
def _schedule(config: RunConfig) -> Iterator[Problem]:
    """trainer.optim.warmup_steps is at most the run's optimizer steps, trainer.num_steps *
    trainer.mini_batches_per_step * trainer.epochs_per_step."""
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


@_relates("launch.save_before_s", "launch.time_limit")
def _time_to_save(config: RunConfig) -> Iterator[Problem]:
    """On Slurm launch.save_before_s is less than launch.time_limit."""
    launch = config.launch
    if isinstance(launch, SlurmLaunch) and (limit := launch.time_limit_s) is not None and limit <= launch.save_before_s:
        yield Problem(
            "launch.save_before_s", launch.save_before_s,
            f"leaves nothing of launch.time_limit={launch.time_limit} ({limit} s) to work in",
            "raise launch.time_limit, or lower launch.save_before_s to a little more than a step takes",
        )  # fmt: skip


@_relates("ray.address", "launch.type")
def _one_cluster(config: RunConfig) -> Iterator[Problem]:
    """On Slurm the job starts a Ray cluster of its own, and ray.address is unset."""
    if isinstance(config.launch, SlurmLaunch) and config.ray.address is not None:
        yield Problem(
            "ray.address", config.ray.address,
            "names a cluster, but with launch.type=slurm the job starts its own",
            "unset ray.address with null, or launch with --local or --ray",
        )  # fmt: skip


RELATIONS = (
    _head_size, _key_value_heads, _reach, _adapters, _whole_distributions, _mini_batches, _sequence_a_device,
    _enough_problems,
    _warm_start_batches, _warm_start_schedule, _micro_batch, _operands, _scored, _answer_form, _one_supervision,
    _overlong_buffer, _reward_parts, _taught_task, _accuracies, _squares_of_the_trainer, _aggregation_norm,
    _corrects_something, _bypass_weights, _bypass_mean, _whole_responses,
    _moving_reference, _placement, _whole_engines, _one_split, _schedule, _time_to_save, _one_cluster,
)  # fmt: skip
