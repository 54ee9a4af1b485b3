"""`rlctl plan` and its verbs as a user meets them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from rlctl import app
from rlctl.commands._plan_view import bar
from rlctl_train.config.errors import DOES_NOT_FIT, PREFLIGHT, USAGE

Cli = Callable[..., tuple[int, str, str]]
NAME, ON_EIGHT = "qwen2.5-7b-grpo", ("--hw", "h100-80gb:8")
TOO_MUCH = "engine.max_tokens_per_micro_batch=200000"


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cli:
    monkeypatch.setenv("RLCTL_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.chdir(tmp_path)

    def call(*words: str) -> tuple[int, str, str]:
        code = app.run(words)
        done = capsys.readouterr()
        return code, done.out, done.err

    return call


def test_a_plan_shows_layout_memory_time_and_price(cli: Cli) -> None:
    code, out, _ = cli("plan", NAME, *ON_EIGHT, "--price", "2.5@2026-11-01")
    assert code == 0
    assert "fsdp2 dp8" in out
    assert "|wwww" in out, "a bar of memory"
    assert "a step takes about" in out
    assert "(price of 2026-11-01)" in out


def test_a_plan_as_json_is_deterministic_and_has_everything(cli: Cli) -> None:
    first, second = (cli("plan", NAME, *ON_EIGHT, "-o", "json")[1] for _ in range(2))
    assert first == second
    made = json.loads(first)["plan"]
    assert {"mesh", "savings", "memory", "bands", "host_memory", "times", "choices"} <= made.keys()
    for band in made["bands"]:
        parts = [part["gib"] for part in made["memory"] if part["phase"] == band["phase"]]
        assert sum(parts) == pytest.approx(band["gib"])


def test_a_price_that_is_none_is_told(cli: Cli) -> None:
    code, _, err = cli("plan", NAME, *ON_EIGHT, "--price", "cheap")
    assert code == USAGE
    assert "--price cheap" in err


def test_what_does_not_fit_ends_with_its_exit_code_phase_part_and_remedies(cli: Cli) -> None:
    code, _, err = cli("plan", NAME, *ON_EIGHT, TOO_MUCH)
    assert code == DOES_NOT_FIT
    assert "actor_update needs" in err and "activations" in err
    assert err.count("; or ") >= 2


def test_a_fix_is_a_diff_with_what_it_saves_and_applies(cli: Cli) -> None:
    code, out, _ = cli("plan", NAME, *ON_EIGHT, TOO_MUCH, "--fix", "--write", "fix.toml")
    assert code == 0
    assert out.startswith("-engine.max_tokens_per_micro_batch = 200000\n+engine.max_tokens_per_micro_batch = null\n")
    assert "saves" in out and "GiB in actor_update" in out
    Path("big.toml").write_text("engine.max_tokens_per_micro_batch = 200000\n")
    assert cli("plan", NAME, *ON_EIGHT, "-c", "big.toml")[0] == DOES_NOT_FIT
    assert cli("plan", NAME, *ON_EIGHT, "-c", "big.toml", "-c", "fix.toml")[0] == 0


def test_a_change_of_meaning_is_offered_where_nothing_less_helps(cli: Cli) -> None:
    code, out, _ = cli("plan", NAME, "--hw", "rtx4090:1", "--fix", "--write", "fix.toml")
    assert code == 0
    assert "+model.lora.rank" in out
    assert cli("plan", NAME, "--hw", "rtx4090:1", "-c", "fix.toml")[0] == 0


def test_nothing_to_fix_is_said(cli: Cli) -> None:
    assert "nothing to fix" in cli("plan", "quickstart", "--hw", "cpu:2", "--fix")[2]
    assert cli("plan", "quickstart", "--write", "x.toml")[0] == USAGE


def test_solve_answers_and_says_what_limits(cli: Cli) -> None:
    code, out, _ = cli("plan", "solve", "gpus", NAME, *ON_EIGHT)
    assert code == 0
    assert out.startswith("gpus = 2")
    document = json.loads(cli("plan", "solve", "seq_len", NAME, *ON_EIGHT, "-o", "json")[1])
    assert document["value"] > 1536
    code, _, err = cli("plan", "solve", "gpus", "quickstart", "--hw", "cpu:2")
    assert code == DOES_NOT_FIT and "no accelerators" in err


def test_search_ranks_and_says_why_losers_lost(cli: Cli) -> None:
    code, out, err = cli("plan", "search", NAME, *ON_EIGHT)
    assert code == 0
    assert "slower" in out
    assert "ways fit" in err
    ranked = json.loads(cli("plan", "search", NAME, *ON_EIGHT, "-o", "json")[1])["ranked"]
    assert ranked[0]["lost"] == "" and all(row["lost"] for row in ranked[1:])


def test_search_of_what_fits_nowhere_ends_with_its_exit_code(cli: Cli) -> None:
    code, _, err = cli("plan", "search", NAME, "--hw", "t4:1")
    assert code == DOES_NOT_FIT
    assert "--fix" in err


def test_compare_sets_machines_and_runs_side_by_side(cli: Cli) -> None:
    code, out, _ = cli("plan", "compare", NAME, *ON_EIGHT, "--hw", "rtx4090:1", "--price", "2")
    assert code == 0
    assert "h100-80gb:8" in out and "rtx4090:1" in out and "false" in out
    plans = json.loads(cli("plan", "compare", NAME, "quickstart", *ON_EIGHT, "-o", "json")[1])["plans"]
    assert list(plans) == [f"{NAME} on h100-80gb:8", "quickstart on h100-80gb:8"]


def test_megatron_is_planned_and_not_launched(cli: Cli) -> None:
    code, out, _ = cli("plan", NAME, *ON_EIGHT, "engine.type=megatron")
    assert code == 0 and "megatron" in out
    code, _, err = cli("launch", NAME, "engine.type=megatron", "--dry-run")
    assert code == PREFLIGHT
    assert "plans for megatron and trains with fsdp2" in err


def test_a_bar_is_as_long_as_the_device_whatever_it_holds() -> None:
    assert bar(("weights", "logits"), (2.0, 2.0), 8.0) == f"|{'w' * 11}{'l' * 11}{'.' * 22}|"
    assert len(bar(("weights",), (20.0,), 8.0)) == len(bar((), (), 8.0)) == 46
