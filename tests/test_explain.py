"""`config explain`: origin, rule, alternatives and consequence of every leaf of a resolved run."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from rlctl_hw.timing import step_seconds

from rlctl import app, planning, resolve, schema
from rlctl.explaining.answer import UNCOUNTED, Explanation, absent, explanation
from rlctl.explaining.effects import Effect, Planned, planned
from rlctl.explaining.leaves import default_of, meanings
from rlctl.explaining.rules import relation_words, type_words
from rlctl.overrides import parse_arguments

Cli = Callable[..., tuple[int, str, str]]
H100 = ("qwen2.5-7b-grpo", "h100-80gb:8")
RUNS = [
    ("quickstart-ppo", "cpu:2"), ("quickstart-sft", "cpu:2"), ("qwen2.5-7b-ppo", "h100-80gb:8"),
    ("qwen2.5-7b-grpo-lora", "rtx4090:1"), ("qwen2.5-7b-grpo", "a100-80gb:1"),
]  # fmt: skip
RANKS = {"default", "settings", "preset", "hardware table", "file", "environment", "command line", "planner"}


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    monkeypatch.setenv("RLCTL_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)

    def call(*words: str) -> tuple[int, str, str]:
        code = app.run(words)
        done = capsys.readouterr()
        return code, done.out, done.err

    return call


@cache
def run_of(name: str, hw: str, *words: str) -> Planned:
    hardware = planning.hardware_named(hw)
    changes = parse_arguments(words).overrides
    return planned(resolve.build(name, overrides=changes, device=planning.device_key(hardware)), hardware)


@cache
def explained(key: str, name: str, hw: str, *words: str) -> Explanation:
    found = explanation(run_of(name, hw, *words), key)
    assert found is not None
    return found


def effects(found: Explanation) -> dict[str, Effect]:
    return {json.dumps(other.value): does for other, does in found.others}


@pytest.mark.parametrize(("name", "hw"), RUNS)
def test_every_leaf_of_a_run_has_origin_rule_alternatives_and_consequence(name: str, hw: str) -> None:
    run = run_of(name, hw)
    for key in run.resolved.origins:
        found = explained(key, name, hw)
        free = found.leaf.node.is_text or found.leaf.node.is_free or found.leaf.node.is_list
        assert found.setter.set_by in RANKS, key
        assert found.rules[0] and found.consequence.endswith("."), key
        assert found.others or free or found.setter.value is None, key
        assert all(does.text for _, does in found.others), key
        assert json.loads(json.dumps(found.to_json())), key


@pytest.mark.parametrize(("name", "hw"), RUNS)
def test_numbers_and_switches_are_only_offered_where_they_are_valid(name: str, hw: str) -> None:
    for key in run_of(name, hw).resolved.origins:
        found = explained(key, name, hw)
        numbers = [does for other, does in found.others if isinstance(other.value, (int, float))]
        assert all(does.kind != "invalid" for does in numbers), key


def test_what_the_planner_fills_in_is_its_own_with_reason_and_mark() -> None:
    run = run_of(*H100)
    assert run.plan is not None
    for choice in run.plan.choices:
        setter = explained(choice.key, *H100).setter
        assert (setter.value, setter.set_by, setter.reason) == (choice.value, "planner", choice.reason)
        assert setter.mark == choice.origin


def test_a_value_that_is_set_names_the_ranks_it_beat() -> None:
    setter = explained("trainer.num_steps", "quickstart", "cpu:2", "trainer.num_steps=7").setter
    assert (setter.value, setter.set_by) == (7, "command line")
    assert [origin.source for origin in setter.beat] == ["preset quickstart", "default"]


def test_a_hardware_table_is_a_rank_with_a_reason(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    pin = '[hardware.h100-80gb]\nreason = "it is wide"\nrollout.max_concurrent = 64'
    file.write_text(f'[preset]\nextends = "qwen2.5-7b-grpo"\n{pin}')
    found = explained("rollout.max_concurrent", str(file), "h100-80gb:8")
    assert (found.setter.set_by, found.setter.reason) == ("hardware table", "it is wide")
    assert "hardware table: it is wide" in found.rules


def test_an_alternative_shows_what_planning_with_it_gives() -> None:
    does = effects(explained("algo.group_size", *H100))["10"]
    then, now = run_of(*H100, "algo.group_size=10").plan, run_of(*H100).plan
    assert then is not None and now is not None and does.peak is not None and does.step_s is not None
    assert does.peak.value == max(band.gib for band in then.bands)
    assert does.step_s.value == (step_seconds(then) or (0.0,))[0]
    assert does.step_s.by == pytest.approx(does.step_s.value - (step_seconds(now) or (0.0,))[0])


def test_an_alternative_names_the_other_choices_that_change() -> None:
    does = effects(explained("trainer.num_devices", *H100))["4"]
    assert ("rollout.num_devices", 4, 8) in does.choices
    assert "rollout.num_devices=4 (now 8)" in does.text
    assert "trainer.num_devices" not in {key for key, _, _ in does.choices}


def test_an_alternative_beyond_the_machine_does_not_fit() -> None:
    does = effects(explained("trainer.num_devices", *H100))["16"]
    assert (does.kind, "there are 8 cuda devices" in does.text) == ("does not fit", True)


def test_what_would_make_a_run_fit_is_said() -> None:
    found = explained("model.lora", "qwen2.5-7b-grpo", "a100-80gb:1")
    assert found.consequence.startswith("This run does not fit here: ")
    assert effects(found)["{}"].text.startswith("fits: peak ")


def test_keys_that_no_plan_reads_say_so() -> None:
    for key in ("seed", "trainer.optim.lr", "trainer.optim.betas", "telemetry.project", "data.train", "ray.address"):
        assert explained(key, *H100).consequence.startswith("Memory and step time of this run do not depend on it"), key


@pytest.mark.parametrize(
    "key", ["model.path", "model.revision", "trainer.prompts_per_step", "rollout.max_response_tokens"]
)
def test_keys_that_a_plan_reads_never_claim_otherwise(key: str) -> None:
    assert explained(key, *H100).consequence == "Memory or step time depend on it."


@pytest.mark.parametrize("key", UNCOUNTED)
def test_what_the_planner_does_not_count_is_told_and_still_true(key: str) -> None:
    name = "qwen2.5-7b-grpo-lora" if key.startswith("model.lora") else "qwen2.5-7b-dapo"
    assert explained(key, name, "h100-80gb:8").consequence.startswith("The planner does not count it")


def test_without_predicted_times_no_step_time_is_spoken_of() -> None:
    assert "No step time is predicted" in explained("algo.group_size", "quickstart", "cpu:2").consequence
    assert effects(explained("algo.group_size", "quickstart", "cpu:2"))["16"].step_s is None


def test_a_choice_that_needs_more_says_what() -> None:
    does = effects(explained("reward.type", "quickstart", "cpu:2"))
    assert does['"custom"'].text.startswith("not valid: reward.path is missing")


def test_the_default_is_that_of_the_run_s_own_variant() -> None:
    assert explained("algo.loss.clip_high", "quickstart-dapo", "cpu:2").leaf.default == 0.28
    assert explained("algo.critic_optim.lr", "quickstart-ppo", "cpu:2").leaf.default == 1e-5
    assert explained("algo.type", "quickstart-ppo", "cpu:2").leaf.default == "grpo"
    assert explained("reward.type", "quickstart", "cpu:2").setter.beat == ()


def test_entries_of_a_free_table_are_leaves_too() -> None:
    found = explained("rollout.engine_args.swap_space", *H100, "rollout.engine_args.swap_space=4")
    assert (found.setter.value, found.setter.set_by, found.rules[0]) == (4, "command line", "table")


@pytest.mark.parametrize(
    ("key", "words", "why"),
    [
        ("algo.gamma", (), "it goes with algo.type=reinforce_pp or ppo or vapo, which is grpo"),
        ("model.lora.rank", (), "model.lora is unset; setting model.lora.rank sets it"),
        (
            "algo.kl_in_reward.target",
            ("algo.kl_in_reward.type=fixed",),
            "algo.kl_in_reward.type=adaptive, which is fixed",
        ),
    ],
)
def test_a_key_of_another_variant_is_no_part_of_the_run(key: str, words: tuple[str, ...], why: str) -> None:
    node = schema.find(tuple(key.split(".")))
    assert node is not None and explanation(run_of("quickstart", "cpu:2", *words), key) is None
    assert why in absent(run_of("quickstart", "cpu:2", *words), node)


def test_every_choice_of_every_enumeration_has_a_meaning() -> None:
    for leaf in schema.leaves():
        if leaf.path[-1] != "type":
            assert set(leaf.choices) == set(meanings(leaf)), leaf.key


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("trainer.num_steps", "whole number, at least 1"),
        ("rollout.gpu_memory_share", "number, above 0 and below 1 (may be unset)"),
        ("trainer.optim.betas", "list of 2: number, each at least 0 and below 1"),
        ("model.lora.target_modules", "list of text, at least 1 of them"),
        ("algo.group_size", "whole number, at least 2 or at least 1 or at least 2 and at most 2 by variant"),
        ("warm_start", "section (may be unset)"),
        ("data.shuffle", "true or false"),
    ],
)
def test_types_are_told_with_their_bounds(key: str, words: str) -> None:
    node = schema.find(tuple(key.split(".")))
    assert node is not None and type_words(node) == words


def test_explain_without_a_run_shows_choices_and_rules(cli: Cli) -> None:
    _, out, _ = cli("config", "explain", "placement", "-o", "json")
    found = json.loads(out)
    assert set(found["choices"]) == {"colocated", "split"}
    assert found["rule"] == relation_words("placement")
    node = schema.find(("algo", "critic_optim", "lr"))
    assert node is not None and default_of(node) == 1e-5


def test_explain_with_a_run_shows_all_four_parts(cli: Cli) -> None:
    words = ("config", "explain", "rollout.tensor-parallel", "qwen2.5-7b-grpo", "--hw", "h100-80gb:8")
    found: dict[str, Any] = json.loads(cli(*words, "-o", "json")[1])
    assert found["origin"]["set_by"] == "planner" and found["hardware"] == "h100-80gb:8"
    assert found["rule"] and found["consequence"]
    assert {"value", "consequence", "peak", "step_s", "choices"} <= set(found["alternatives"][0])
    _, out, _ = cli(*words)
    assert all(word in out for word in ("planner (formula)", "alternative", "what follows", "GiB"))


def test_explain_of_a_run_lists_its_leaves_and_what_the_planner_filled_in(cli: Cli) -> None:
    _, out, _ = cli("config", "explain", "quickstart", "--hw", "cpu:2", "-o", "json")
    lines = {line["key"]: line for line in json.loads(out)["keys"]}
    assert list(lines) == list(run_of("quickstart", "cpu:2").resolved.origins)
    assert lines["trainer.num_devices"]["source"] == "planner (assumed)" and lines["trainer.num_devices"]["reason"]


def test_explain_of_a_run_that_does_not_fit_lists_it_and_says_so(cli: Cli) -> None:
    code, out, err = cli("config", "explain", "trainer", "qwen2.5-7b-grpo", "--hw", "l4:1")
    assert code == 0 and "trainer.num_steps" in out
    assert "the planner fills nothing in" in err


def test_explain_wants_a_run_for_a_machine_and_knows_misspelt_presets(cli: Cli) -> None:
    assert cli("config", "explain", "seed", "--hw", "h100-80gb:8")[0] == 2
    code, _, err = cli("config", "explain", "quikstart")
    assert (code, "did you mean quickstart?" in err) == (2, True)
