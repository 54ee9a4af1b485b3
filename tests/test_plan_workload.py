"""From a run's configuration to the planner's words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rlctl_hw.types import Pins

from rlctl.workload import shape_of, workload_from_config
from rlctl_train.algos.objective import WholeBatchLoss
from rlctl_train.config import RunConfig
from rlctl_train.config.errors import UserError
from rlctl_train.config.losses import PolicyLoss
from rlctl_train.config.vocab import VOCAB
from rlctl_train.registry import LOSSES, load


def run(**changes: Any) -> RunConfig:
    usual = {"model": {"type": "random"}, "data": {"type": "arithmetic"}, "reward": {"type": "arithmetic"}}
    return RunConfig.model_validate(usual | changes)


def pretrained(path: str) -> RunConfig:
    return run(model={"type": "pretrained", "path": path})


def test_a_random_model_is_counted_as_it_is_made(tiny_model: Path):
    from transformers import AutoModelForCausalLM

    sizes = {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "intermediate_size": 64}
    shape = shape_of(run(model={"type": "random", **sizes}))
    assert shape.num_params == AutoModelForCausalLM.from_pretrained(tiny_model).num_parameters()
    assert shape == shape_of(pretrained(str(tiny_model)))
    assert shape.vocab_size == len(VOCAB)


def test_a_built_in_model_needs_no_files():
    assert shape_of(pretrained("Qwen/Qwen2.5-0.5B-Instruct")).num_params == 494_032_768


@pytest.mark.parametrize("text", [None, "{", "[]", json.dumps({"model_type": "bert"}), b"\xff\xfe"])
def test_a_folder_that_is_no_model_is_told(tmp_path: Path, text: str | bytes | None):
    if text is not None:
        (tmp_path / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=r"model\.path") as caught:
        shape_of(pretrained(str(tmp_path)))
    assert caught.value.remedy


def test_a_folder_that_does_not_exist_is_not_looked_for_on_the_hub():
    with pytest.raises(UserError, match="no such folder"):
        shape_of(pretrained("/no/such/folder"))


def test_a_model_out_of_reach_names_the_built_in_ones():
    with pytest.raises(UserError, match=r"config\.json") as caught:
        shape_of(pretrained("nobody/nothing"))
    assert "Qwen/Qwen2.5-0.5B-Instruct" in caught.value.remedy


def test_what_is_unset_is_not_pinned():
    config = run()
    asked = workload_from_config(config, shape_of(config))
    assert asked.pins == Pins()
    assert (asked.roles, asked.group_size, asked.rollout) == (("actor",), 8, "hf")


def test_what_is_set_becomes_a_pin():
    config = run(
        engine={"type": "fsdp2", "compute_dtype": "bfloat16", "max_tokens_per_micro_batch": 3000},
        rollout={"type": "vllm", "gpu_memory_share": 0.4, "num_devices": 2, "dtype": "float32", "max_concurrent": 7},
        trainer={"num_devices": 2, "threads_per_worker": 1},
        ray={"object_store_gib": 1.5},
    )
    expected = Pins("bfloat16", "float32", 2, 2, 1, 3000, 7, 0.4, 1.5)
    assert workload_from_config(config, shape_of(config)).pins == expected


def test_a_whole_kl_brings_its_distributions_where_it_is_in_the_loss():
    algo = {"type": "grpo", "kl_loss_estimator": "full", "group_size": 8}
    config = run(algo=algo | {"kl_loss_coef": 0.1}, rollout={"type": "hf", "max_response_tokens": 5})
    asked = workload_from_config(config, shape_of(config))
    assert asked.distribution_bytes == 4 * len(VOCAB) * 5 * 8 * config.trainer.prompts_per_step
    unused = run(algo=algo)
    assert workload_from_config(unused, shape_of(unused)).distribution_bytes == 0


def test_algorithms_bring_their_roles_and_group_sizes():
    ppo = run(algo={"type": "ppo", "kl_loss_coef": 0.1, "group_size": 3})
    asked = workload_from_config(ppo, shape_of(ppo))
    assert (set(asked.roles), asked.group_size) == ({"actor", "critic", "reference"}, 3)
    sft = run(algo={"type": "sft"}, reward=None)
    assert workload_from_config(sft, shape_of(sft)).group_size == 1


@pytest.mark.parametrize(
    ("algo", "trainer", "needed"),
    [
        ({"type": "grpo"}, {}, False),
        ({"type": "grpo"}, {"mini_batches_per_step": 2}, True),
        ({"type": "grpo", "kl_in_reward": {"type": "fixed"}}, {}, True),
        ({"type": "grpo", "correction": {}}, {}, True),
        ({"type": "grpo", "correction": {"mode": "bypass"}}, {"mini_batches_per_step": 2}, False),
        ({"type": "otb"}, {}, True),
        ({"type": "sft"}, {"mini_batches_per_step": 2}, False),
    ],
    ids=str,
)
def test_the_plan_knows_when_the_policy_is_read_before_the_update(algo: dict, trainer: dict, needed: bool) -> None:
    config = run(algo=algo, trainer=trainer, **({"reward": None} if algo["type"] == "sft" else {}))
    assert workload_from_config(config, shape_of(config)).old_logprobs_needed == needed


def test_the_plan_knows_what_an_algorithm_asks_beside_the_usual() -> None:
    def asked(**algo: Any) -> tuple[bool, int, int]:
        config = run(algo=algo)
        made = workload_from_config(config, shape_of(config))
        return made.reads_ahead, made.greedy_responses, made.max_rounds

    assert asked(type="grpo") == (False, 0, 1)
    assert asked(type="grpo", loss={"type": "kl_cov"})[0] and asked(type="spin")[0]
    assert asked(type="remax")[1] == 1
    assert asked(type="dapo", max_rounds=3)[2] == asked(type="prime", max_rounds=3)[2] == 3


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_that_reads_ahead_says_so(name: str) -> None:
    (config,) = [kind for kind in _kinds(PolicyLoss) if kind.model_fields["type"].default == name]
    assert config.reads_ahead == issubclass(load(LOSSES, name), WholeBatchLoss)


def _kinds(kind: type[PolicyLoss]) -> list[type[PolicyLoss]]:
    return [made for made in kind.__subclasses__() if "type" in made.model_fields]


@pytest.mark.parametrize(
    ("algo", "checkpoint", "copied"),
    [
        ({"type": "grpo"}, {}, ("actor",)),
        ({"type": "ppo"}, {}, ("actor", "critic")),
        ({"type": "spin"}, {}, ("actor", "reference")),
        ({"type": "spin", "refresh_every_steps": 0}, {}, ("actor",)),
        ({"type": "grpo"}, {"asynchronous": False}, ()),
        ({"type": "grpo"}, {"every_steps": 0}, ()),
    ],
)
def test_what_is_saved_beside_training_is_copied(
    algo: dict[str, Any], checkpoint: dict[str, Any], copied: tuple[str, ...]
):
    config = run(algo=algo, checkpoint=checkpoint)
    assert workload_from_config(config, shape_of(config)).copied_roles == copied
