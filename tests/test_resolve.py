"""Resolving a configuration: ranks, origins, notes, and every problem at once."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlctl import catalog, resolve, schema
from rlctl.overrides import Assignment, parse_arguments
from rlctl.problems import InvalidConfig
from rlctl_train.config.algo import PpoConfig
from rlctl_train.config.errors import UserError
from rlctl_train.config.optim import OptimConfig
from rlctl_train.config.trainer import WarmStartConfig


def build(
    name: str | None = "quickstart",
    *words: str,
    files: Iterable[Path] = (),
    environ: Mapping[str, str] | None = None,
    settings: Iterable[Assignment] = (),
) -> resolve.Resolved:
    overrides = parse_arguments(words).overrides
    return resolve.build(name, files=list(files), overrides=overrides, environ=environ, settings=settings)


def findings(*words: str, name: str | None = "quickstart", **more: object) -> dict[str, tuple[str, str]]:
    with pytest.raises(InvalidConfig) as caught:
        build(name, *words, **more)  # type: ignore[arg-type]
    return {finding.key: (finding.line, finding.remedy) for finding in caught.value.findings}


def test_each_rank_wins_over_the_one_below(tmp_path: Path) -> None:
    low, high = tmp_path / "low.toml", tmp_path / "high.json"
    low.write_text("[trainer]\nnum_steps = 11\nprompts_per_step = 16\n")
    high.write_text(json.dumps({"trainer": {"prompts_per_step": 8}}))
    user = [Assignment(("telemetry", "project"), "mine", "settings"), Assignment(("seed",), 5, "settings")]
    environ = {"RLCTL_TRAINER__OPTIM__LR": "2e-5", "rlctl_seed": "9", "HOME": "/"}
    found = build("quickstart", "trainer.optim.lr=3e-5", files=[low, high], environ=environ, settings=user).origins
    assert found["telemetry.project"] == resolve.Origin("mine", "settings")
    assert found["model.hidden_size"].source == "preset quickstart"
    assert found["trainer.num_steps"] == resolve.Origin(11, f"file {low}")
    assert found["trainer.prompts_per_step"] == resolve.Origin(8, f"file {high}")
    assert found["seed"] == resolve.Origin(9, "environment rlctl_seed")
    assert found["trainer.optim.lr"] == resolve.Origin(3e-5, "command line")
    assert found["trainer.optim.eps"] == resolve.Origin(1e-8, "default")


def test_every_value_of_the_configuration_has_an_origin() -> None:
    resolved = build()
    assert resolved.origins.keys() == resolve.flat(resolved.config.model_dump(mode="json")).keys()


def test_history_keeps_the_lower_ranks() -> None:
    values = [origin.source for origin in build("quickstart-ppo", "trainer.num_steps=50").history["trainer.num_steps"]]
    assert values == ["preset quickstart", "command line"]


@pytest.mark.parametrize(
    "words",
    [
        ["trainer.num_steps=7"],
        ["--trainer.num-steps", "7"],
        ["--trainer.num_steps=7"],
        ["--set", "trainer.num-steps=7"],
        ["trainer={num_steps=7}"],
        ['trainer={"num-steps": 7}'],
    ],
)
def test_every_form_of_override_means_the_same(words: list[str]) -> None:
    assert build("quickstart", *words).config.trainer.num_steps == 7


def test_a_name_may_stand_after_the_overrides() -> None:
    assert parse_arguments(["--seed", "3", "a.b=c", "quickstart"]).names == ("quickstart",)


@pytest.mark.parametrize("text", ["tensorboard,wandb", "[tensorboard, wandb]", '["tensorboard", "wandb"]'])
def test_lists_are_read_with_and_without_quotes(text: str) -> None:
    assert build("quickstart", f"telemetry.trackers={text}").config.telemetry.trackers == ("tensorboard", "wandb")


def test_text_stays_text_where_the_key_takes_text() -> None:
    assert build("quickstart", "telemetry.project=123").config.telemetry.project == "123"


def test_null_unsets_a_section_and_a_value() -> None:
    config = build("quickstart", "warm_start=null", "trainer.num_steps=none").config
    assert config.warm_start is None
    assert config.trainer.num_steps == type(config.trainer)().num_steps


def test_a_section_set_again_after_null_starts_fresh() -> None:
    warm = build("quickstart", "warm_start=null", "warm_start.num_steps=5").config.warm_start
    assert warm is not None
    assert (warm.num_steps, warm.rows_per_step) == (5, type(warm)().rows_per_step)


def test_a_new_type_drops_lower_keys_it_does_not_have_and_says_so(tmp_path: Path) -> None:
    resolved = build("quickstart-ppo", "algo.type=grpo")
    assert resolved.config.algo.type == "grpo"
    assert "algo.critic_warmup_steps" not in resolved.origins
    assert any("algo.critic_warmup_steps=5 (from preset quickstart-ppo) is left out" in note for note in resolved.notes)


def test_a_new_type_keeps_keys_it_shares() -> None:
    assert build("quickstart-ppo", "algo.type=grpo").origins["algo.group_size"].source == "preset quickstart-ppo"


def test_a_key_of_another_variant_is_refused_when_nothing_dropped_it() -> None:
    line, remedy = findings("algo.gamma=0.9")["algo.gamma"]
    assert "belongs to algo.type=reinforce_pp or ppo or vapo, but that is grpo (from preset quickstart)" in line
    assert remedy.startswith("set algo.type=reinforce_pp")


def test_reward_path_alone_means_a_custom_reward() -> None:
    resolved = build("quickstart", "reward.path=my.py:score")
    assert resolved.config.reward is not None
    assert resolved.config.reward.type == "custom"
    assert resolved.origins["reward.type"].source == "command line"


def test_all_problems_come_at_once_with_value_origin_and_way_out() -> None:
    found = findings(
        "trainer.num_steps=-3", "rollout.max_respons_tokens=8", "placement=colocatd", "engine.packing=maybe",
        environ={"RLCTL_SEED": "x"},
    )  # fmt: skip
    assert len(found) == 5
    assert found["trainer.num_steps"] == (
        "trainer.num_steps=-3 (from command line) must be above 0", "give a value above 0",
    )  # fmt: skip
    assert found["rollout.max_respons_tokens"][1] == "did you mean rollout.max_response_tokens?"
    assert found["placement"][1].startswith("did you mean colocated?")
    assert found["engine.packing"][1] == "give true or false"
    assert found["seed"][0] == "seed=x (from environment RLCTL_SEED) is not a whole number"


def test_nearest_spelling_looks_into_other_sections() -> None:
    assert findings("lr=1")["lr"][1] == "did you mean trainer.optim.lr?"
    assert findings("trainr.num_steps=1")["trainr.num_steps"][1] == "did you mean trainer.num_steps?"


def test_union_tags_never_show_in_a_key() -> None:
    found = findings('reward={"type": "sum", "parts": [{"type": "gsm8k", "weigth": 2}, {"type": "nope"}]}')
    assert set(found) == {"reward.parts[0].weigth", "reward.parts[1].type"}
    assert found["reward.parts[0].weigth"][1] == "did you mean weight?"


def test_missing_sections_say_what_to_set() -> None:
    found = findings(name=None)
    assert found["model"][1] == "set model.type to one of pretrained, random"
    assert found["data"][1] == "set data.type to one of parquet, arithmetic"


def test_relations_are_checked_with_the_origin_of_the_value() -> None:
    line, _ = findings("model.num_heads=3")["model.num_heads"]
    assert line.startswith("model.num_heads=3 (from command line) does not divide")


def test_a_boolean_is_no_number_and_text_is_no_number(tmp_path: Path) -> None:
    file = tmp_path / "a.toml"
    file.write_text('[trainer]\nnum_steps = true\nprompts_per_step = "8"\n')
    assert set(findings(files=[file])) == {"trainer.num_steps", "trainer.prompts_per_step"}


@pytest.mark.parametrize(
    ("text", "what"),
    [("[trainer\n", "is not valid TOML"), ("[preset]\ntitel = 'x'\n", "unknown key 'titel'"), ("\xff", "")],
)
def test_a_broken_file_is_a_clear_error(tmp_path: Path, text: str, what: str) -> None:
    file = tmp_path / "a.toml"
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError) as caught:
        build("quickstart", files=[file])
    assert what in caught.value.what
    assert str(file) in caught.value.what


def test_a_missing_file_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no file"):
        build("quickstart", files=[tmp_path / "no.toml"])


def test_an_unknown_preset_shows_the_nearest_one() -> None:
    with pytest.raises(UserError) as caught:
        build("quikstart")
    assert caught.value.remedy == "did you mean quickstart?"


@pytest.mark.parametrize("name", catalog.names())
def test_every_preset_is_valid_and_describes_itself(name: str) -> None:
    resolved = build(name)
    assert resolved.notes == () or catalog.load_preset(name).header["extends"]
    assert {"title", "hardware", "evidence"} <= catalog.load_preset(name).header.keys()


def test_extends_in_a_circle_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalog, "folder", lambda: tmp_path)
    for name, other in (("a", "b"), ("b", "a")):
        (tmp_path / f"{name}.toml").write_text(f"[preset]\nextends = '{other}'\n")
    with pytest.raises(UserError, match="extends itself"):
        build("a")


def test_every_leaf_says_its_type_and_meaning() -> None:
    for leaf in schema.leaves():
        assert leaf.type_text()
        assert leaf.description or leaf.path[-1] == "type", leaf.key


KEYS = st.one_of(
    st.sampled_from(schema.all_keys()), st.text(max_size=12), st.from_regex(r"[a-z_]{1,8}(\.[a-z_]{1,8}){0,3}")
)
NUMBERS = st.one_of(st.integers(), st.integers(-(10**400), 10**400), st.floats(), st.integers(1, 4096))
JUNK = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, st.text(max_size=10)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(KEYS, inner, max_size=3)),
    max_leaves=8,
)


def test_the_heading_of_a_section_alone_sets_it_with_its_defaults(tmp_path: Path) -> None:
    file = tmp_path / "lora.toml"
    file.write_text("[model.lora]\n")
    resolved = resolve.build("qwen2.5-7b-grpo", files=[file])
    assert resolved.config.model.lora is not None
    assert resolved.origins["model.lora.rank"] == resolve.Origin(32, "default")
    kept = resolve.build("qwen2.5-7b-grpo", files=[file], overrides=parse_arguments(["model.lora.rank=4"]).overrides)
    assert kept.origins["model.lora.rank"].value == 4
    assert resolve.build("qwen2.5-7b-grpo-lora", files=[file]).origins["model.lora.rank"].source != "default"


def test_a_section_keeps_what_its_owner_sets_otherwise() -> None:
    words = ["algo.type=ppo", "algo.critic_optim.eps=1e-7"]
    origins = resolve.build("quickstart", overrides=parse_arguments(words).overrides).origins
    assert origins["algo.critic_optim.lr"] == resolve.Origin(1e-5, "default")


def test_a_varied_run_is_the_run_with_one_more_override() -> None:
    change = Assignment(("algo", "type"), "ppo", "alternative")
    base = resolve.build("quickstart-dapo")
    assert resolve.vary(base, []).config == base.config
    assert resolve.vary(base, [change]).config == resolve.build("quickstart-dapo", overrides=[change]).config


@settings(max_examples=800)
@given(st.sampled_from(catalog.names()), st.lists(st.tuples(KEYS, JUNK), max_size=4))
def test_no_assignment_gives_anything_but_a_result_or_a_user_error(name: str, pairs: list[tuple[str, object]]) -> None:
    layer = [Assignment(tuple(key.split(".")), value, "file x") for key, value in pairs]
    try:
        resolve.build(name, overrides=layer)
    except UserError as error:
        assert error.what and error.remedy


WORDS = st.one_of(
    st.builds("{}={}".format, KEYS, st.one_of(st.text(max_size=12), JUNK.map(str), JUNK.map(json.dumps))),
    st.builds("--{}={}".format, KEYS, st.text(max_size=12)),
    st.text(max_size=12),
    st.sampled_from(["--", "-", "--set", "=", "a.=1", ".=", "seed=\udcff"]),
)


@settings(max_examples=800)
@given(st.lists(WORDS, max_size=4))
def test_no_command_line_gives_anything_but_a_result_or_a_user_error(words: list[str]) -> None:
    try:
        resolve.build("quickstart", overrides=parse_arguments(words).overrides)
    except UserError as error:
        assert error.what and error.remedy


@settings(max_examples=300)
@given(tree=st.dictionaries(KEYS, JUNK, max_size=4), text=st.text(max_size=30))
def test_no_file_gives_anything_but_a_result_or_a_user_error(
    tmp_path_factory: pytest.TempPathFactory, tree: object, text: str
) -> None:
    file = tmp_path_factory.getbasetemp() / "fuzz.json"
    for content in (json.dumps(tree), text):
        file.write_text(content, encoding="utf-8")
        try:
            resolve.build("quickstart", files=[file])
        except UserError as error:
            assert error.what and error.remedy


@pytest.mark.parametrize(
    ("words", "section"),
    [
        (("warm_start=null", "warm_start.optim.weight_decay=0.3"), "warm_start.optim"),
        (("algo.type=ppo", "algo.critic_optim.weight_decay=0.3"), "algo.critic_optim"),
    ],
)
def test_one_key_of_a_section_leaves_what_its_owner_sets_otherwise(words: tuple[str, ...], section: str) -> None:
    config: Any = build("qwen2.5-7b-grpo", *words).config
    for name in section.split("."):
        config = getattr(config, name)
    default = {"warm_start.optim": WarmStartConfig().optim, "algo.critic_optim": PpoConfig().critic_optim}[section]
    assert config == default.model_copy(update={"weight_decay": 0.3}) and config.lr != OptimConfig().lr
