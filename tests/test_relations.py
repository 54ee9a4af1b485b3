"""Relations between settings: each violated one is named with its key and a way out; valid configs have none."""

import re
from typing import Any

import pytest

from rlctl import schema
from rlctl_train.config import RunConfig, relation_problems
from rlctl_train.config.relations import RELATIONS, Relation, relations_of

BASE: dict[str, Any] = {
    "model": {"type": "random"},
    "data": {"type": "arithmetic", "max_prompt_tokens": 32},
    "reward": {"type": "arithmetic"},
    "rollout": {"type": "hf", "max_response_tokens": 16},
}

NORMALISED_BYPASS = {
    "type": "grpo",
    "loss": {"type": "gpg"},
    "correction": {"mode": "bypass", "weights": {"normalize": True}},
}
WHOLE_KL = {"type": "grpo", "kl_loss_coef": 0.1, "kl_loss_estimator": "full"}


def problems(**sections: dict[str, Any] | None) -> list[str]:
    merged = {**BASE}
    for name, section in sections.items():
        merged[name] = {**(merged.get(name) or {}), **section} if isinstance(section, dict) else section
    return [problem.key for problem in relation_problems(RunConfig.model_validate(merged))]


def test_a_sound_config_has_no_problems() -> None:
    assert problems() == []


@pytest.mark.parametrize(
    ("key", "sections"),
    [
        ("model.num_heads", {"model": {"num_heads": 3, "num_kv_heads": 3}}),
        ("model.num_kv_heads", {"model": {"num_kv_heads": 3}}),
        ("rollout.max_response_tokens", {"model": {"max_position": 40}}),
        ("model.lora", {"model": {"lora": {}}, "engine": {"type": "megatron"}}),
        ("algo.kl_loss_estimator", {"algo": WHOLE_KL, "engine": {"type": "megatron"}}),
        ("trainer.mini_batches_per_step", {"trainer": {"mini_batches_per_step": 3}}),
        ("trainer.num_devices", {"trainer": {"num_devices": 8, "prompts_per_step": 1}, "algo": {"type": "ppo"}}),
        ("trainer.prompts_per_step", {"data": {"num_train": 8}}),
        ("engine.max_tokens_per_micro_batch", {"engine": {"type": "fsdp2", "max_tokens_per_micro_batch": 20}}),
        ("warm_start.mini_batches_per_step", {"warm_start": {"rows_per_step": 64, "mini_batches_per_step": 3}}),
        ("warm_start.optim.warmup_steps", {"warm_start": {"num_steps": 5, "optim": {"warmup_steps": 6}}}),
        ("data.min_operand", {"data": {"min_operand": 100}}),
        ("launch.save_before_s", {"launch": {"type": "slurm", "time_limit": "0:02:00"}}),
        ("ray.address", {"launch": {"type": "slurm"}, "ray": {"address": "head:6379"}}),
        ("reward", {"reward": None}),
        ("reward.type", {"reward": {"type": "gsm8k"}}),
        ("algo.aggregation_norm", {"algo": {"type": "grpo", "aggregation_norm": 5}}),
        ("algo.correction", {"algo": {"type": "grpo", "correction": {}}}),
        ("algo.correction.weights", {"algo": {"type": "grpo", "correction": {"mode": "bypass", "weights": {}}}}),
        ("algo.correction.weights.normalize", {"algo": NORMALISED_BYPASS}),
        ("algo.correction", {"algo": {"type": "sppo", "correction": {"veto": 1e-4}}}),
        ("algo.refresh_every_steps", {"algo": {"type": "spin"}, "model": {"lora": {}}}),
        ("algo.overlong_buffer_tokens", {"algo": {"type": "dapo", "overlong_buffer_tokens": 17}}),
        ("warm_start", {"warm_start": {}, "algo": {"type": "sft"}}),
        ("rollout.num_devices", {"trainer": {"num_devices": 1}, "rollout": {"num_devices": 2}}),
        ("rollout.tensor_parallel", {"rollout": {"type": "vllm", "tensor_parallel": 2, "num_devices": 3}}),
        ("rollout.engine_args", {"rollout": {"type": "vllm", "engine_args": {"tensor_parallel_size": 2}}}),
        ("trainer.optim.warmup_steps", {"trainer": {"optim": {"warmup_steps": 101}}}),
    ],
)
def test_a_broken_relation_names_its_key(key: str, sections: dict[str, Any]) -> None:
    assert problems(**sections) == [key]


def test_every_problem_says_a_way_out() -> None:
    config = RunConfig.model_validate({**BASE, "reward": None, "model": {"type": "random", "num_heads": 3}})
    found = relation_problems(config)
    assert len(found) >= 2 and all(problem.remedy and problem.what for problem in found)


@pytest.mark.parametrize("relation", RELATIONS, ids=lambda relation: relation.keys[0])
def test_a_relation_names_real_keys_and_all_that_its_rule_speaks_of(relation: Relation) -> None:
    assert all(schema.find(tuple(key.split("."))) for key in relation.keys)
    spoken_of = {word for word in re.findall(r"[a-z_]+(?:\.[a-z_]+)+", relation.rule) if word in schema.all_keys()}
    assert relation.rule.endswith(".") and spoken_of <= set(relation.keys)


def test_relations_are_found_by_key_and_by_the_section_that_holds_it() -> None:
    assert "data.min_operand is at most data.max_operand." in [r.rule for r in relations_of("data.max_operand")]
    assert relations_of("model.lora.rank") == relations_of("model.lora")
    assert relations_of("telemetry.project") == ()
