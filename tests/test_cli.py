"""The command as a user meets it: help, exit codes, two lines of error, documents, pipes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from rlctl import app, catalog, render
from rlctl.commands.env import shown_variables
from rlctl_train.config.errors import PREFLIGHT, UserError

Cli = Callable[..., tuple[int, str, str]]
HEAVY = ("torch", "ray", "transformers", "vllm", "pyarrow", "numpy", "pydantic_settings")


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RLCTL_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("RLCTL_RUNS_DIR", str(tmp_path / "runs"))
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Cli:
    def call(*words: str) -> tuple[int, str, str]:
        code = app.run(words)
        done = capsys.readouterr()
        return code, done.out, done.err

    return call


def in_a_process(*words: str, tail: str = "") -> subprocess.CompletedProcess[str]:
    script = f"import sys; from rlctl import app; code = app.run({list(words)!r}); {tail}; sys.exit(code)"
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("words", [["--help"], ["preset", "ls"], ["preset", "show", "quickstart"], ["--version"]])
def test_light_commands_import_nothing_heavy(words: list[str]) -> None:
    done = in_a_process(*words, tail=f"print([m for m in {HEAVY!r} if m in sys.modules], file=sys.stderr)")
    assert done.returncode == 0
    assert done.stdout
    assert done.stderr.strip() == "[]"


@pytest.mark.parametrize("words", [["preset", "quickstart"], ["plan", "quickstart"], ["config", "check", "quickstart"]])
def test_deciding_commands_import_neither_torch_nor_ray(words: list[str]) -> None:
    done = in_a_process(*words, tail="print([m for m in ('torch', 'ray', 'transformers') if m in sys.modules])")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("[]")


def test_help_costs_no_more_modules_than_typer_and_rich() -> None:
    """Start-up time is modules: the help must not need pydantic."""
    done = in_a_process("--help", tail="print('pydantic' in sys.modules, file=sys.stderr)")
    assert done.stderr.strip() == "False"


def test_the_help_lists_exactly_the_commands_of_the_table() -> None:
    listed = [name for verbs in app.HELP.values() for name in verbs]
    assert sorted(listed) == sorted(app.COMMANDS)


@pytest.mark.parametrize("name", list(app.COMMANDS))
def test_every_command_answers_to_help(name: str, cli: Cli) -> None:
    code, out, _ = cli(name, "--help")
    assert (code, out.startswith(f"Usage: rlctl {name}")) == (0, True)


@pytest.mark.parametrize("name", ["runs", "config", "preset"])
def test_a_group_alone_shows_its_help(name: str, cli: Cli) -> None:
    code, out, _ = cli(name)
    assert (code, "Commands:" in out) == (0, True)


@pytest.mark.parametrize(
    ("words", "what", "remedy"),
    [
        (["launc"], "No such command 'launc'. Did you mean 'launch'", "see `rlctl --help`"),
        (["preset", "quikstart"], "there is no preset 'quikstart'", "did you mean quickstart?"),
        (
            ["launch", "quickstart", "--detatch"],
            "--detatch is neither an option nor a setting",
            "did you mean --detach?",
        ),
        (["launch"], "the name of a preset or file is missing", "give the name"),
        (
            ["launch", "quickstart", "quickstart-ppo"],
            "unexpected argument 'quickstart-ppo'",
            "an override has the form",
        ),
        (["launch", "quickstart", "seed="], 'seed="" (from command line) is not a whole number', "give a whole number"),
        (["launch", "quickstart", "--name", "../x"], "'../x' cannot be a run's name", "use letters"),
        (["config", "explain", "trainer.num_step"], "there is no setting", "did you mean trainer.num_steps?"),
        (["plan", "quickstart", "--hw", "h1000:8"], "--hw", "name it like"),
        (["runs", "show", "no"], "there is no run 'no'", "there are none yet"),
        (["preset", "ls", "-o", "xml"], "xml", "see `rlctl preset ls --help`"),
    ],
)
def test_wrong_usage_is_two_lines_and_code_2(words: list[str], what: str, remedy: str, cli: Cli) -> None:
    code, out, err = cli(*words)
    first, second = err.splitlines()
    assert (code, out) == (2, "")
    assert first.startswith("error: ") and what in first
    assert second.startswith("  -> ") and remedy in second


def test_all_problems_of_a_config_are_shown(cli: Cli) -> None:
    code, _, err = cli("config", "check", "quickstart", "trainr.num_steps=1", "seed=x", "placement=y")
    assert code == 2
    assert [line[:7] for line in err.splitlines()] == ["error: ", "  -> di", "error: ", "  -> gi", "error: ", "  -> ch"]


def test_what_does_not_fit_ends_with_code_3_after_showing_the_values(cli: Cli) -> None:
    words = ("preset", "qwen2.5-7b-grpo", "trainer.num_devices=1000", "rollout.num_devices=1000")
    code, out, err = cli(*words)
    assert code == 3
    assert "trainer.num_devices" in out and "command line" in out
    assert err.count("error: ") == 1
    code, out, _ = cli(*words, "-o", "json")
    assert (code, json.loads(out)["plan"]) == (3, None)


def fail_with(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def names() -> list[str]:
        raise error

    monkeypatch.setattr(catalog, "names", names)


def test_debug_shows_the_traceback_and_nothing_else_does(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fail_with(monkeypatch, UserError("bad", "mend it", exit_code=PREFLIGHT))
    for words, shown in (
        (["preset", "ls"], False),
        (["--debug", "preset", "ls"], True),
        (["preset", "ls", "--debug"], True),
    ):
        with pytest.raises(SystemExit) as left:
            app.main(words)
        err = capsys.readouterr().err
        assert left.value.code == PREFLIGHT
        assert ("Traceback" in err) == shown
        assert err.endswith("error: bad\n  -> mend it\n")


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (KeyboardInterrupt(), 130),
        (RuntimeError("x"), 1),
        (OSError(28, "No space left on device"), 4),
        (OSError(13, "no"), 1),
    ],
)
def test_other_failures_have_their_codes(error: BaseException, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_with(monkeypatch, error)
    assert app.run(["preset", "ls"]) == code


@pytest.mark.parametrize(
    "words",
    [
        ["preset", "ls"], ["preset", "quickstart"], ["preset", "diff", "quickstart", "quickstart-ppo"], ["runs", "ls"],
        ["config", "check", "quickstart"], ["config", "explain", "seed", "quickstart"], ["config", "explain"], ["hw"],
        ["env"], ["plan", "quickstart", "--hw", "h100-80gb:8"], ["launch", "quickstart", "--dry-run"],
    ],
)  # fmt: skip
def test_reading_commands_give_json_and_yaml_with_a_schema_version(words: list[str], cli: Cli) -> None:
    code, out, _ = cli(*words, "-o", "json")
    assert (code, json.loads(out)["schema_version"]) == (0, render.SCHEMA_VERSION)
    code, out, _ = cli(*words, "-o", "yaml")
    assert (code, yaml.safe_load(out)["schema_version"]) == (0, render.SCHEMA_VERSION)


def test_tables_in_a_pipe_are_neither_cut_nor_coloured(cli: Cli) -> None:
    _, out, _ = cli("config", "explain")
    assert "\x1b" not in out
    assert "multiple of the advantage; unset turns it off." in out
    assert all(line == line.rstrip() for line in out.splitlines())


def test_a_closed_pipe_is_no_error() -> None:
    script = f'{sys.executable} -c \'from rlctl.app import main; main(["config", "explain"])\' | head -1'
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False)
    assert (done.stdout.startswith("key"), done.stderr) == (True, "")


def test_explain_shows_meaning_default_value_origin_and_lower_ranks(cli: Cli) -> None:
    _, out, _ = cli("config", "explain", "trainer.num-steps", "quickstart", "--trainer.num-steps", "7", "-o", "json")
    found = json.loads(out)
    assert (found["default"], found["value"], found["source"]) == (100, 7, "command line")
    assert [rank["source"] for rank in found["ranks"]] == ["preset quickstart", "command line"]
    _, out, _ = cli("config", "explain", "algo.gamma")
    assert "algo.type=reinforce_pp or ppo or vapo" in out


def test_schema_is_a_json_schema(cli: Cli) -> None:
    _, out, _ = cli("config", "schema")
    assert json.loads(out)["properties"]["trainer"]


def test_cp_writes_a_file_that_launches_and_refuses_to_overwrite(cli: Cli) -> None:
    assert cli("preset", "cp", "quickstart-ppo", "my.toml")[0] == 0
    assert cli("config", "check", "my.toml")[0] == 0
    code, _, err = cli("preset", "cp", "quickstart", "my.toml")
    assert (code, "--force" in err) == (2, True)


def test_settings_rank_above_defaults_and_below_presets(own_home: Path, cli: Cli) -> None:
    (own_home / "home").mkdir()
    file = own_home / "home" / "settings.toml"
    file.write_text('trackers = ["wandb"]\nproject = "mine"\n')
    _, out, _ = cli("preset", "quickstart", "--telemetry.project", "p", "-o", "json")
    values = json.loads(out)["values"]
    assert values["telemetry.trackers"] == {"value": ["wandb"], "source": "settings"}
    assert values["telemetry.project"] == {"value": "p", "source": "command line"}
    file.write_text("trakcers = []\n")
    code, _, err = cli("runs", "ls")
    assert (code, "did you mean trackers?" in err) == (2, True)


def test_a_misspelt_variable_is_found(monkeypatch: pytest.MonkeyPatch, cli: Cli) -> None:
    monkeypatch.setenv("RLCTL_TRAINER__NUM_STEP", "3")
    code, _, err = cli("config", "check", "quickstart")
    assert code == 2
    assert "environment RLCTL_TRAINER__NUM_STEP" in err and "did you mean trainer.num_steps?" in err


def test_env_removes_secrets() -> None:
    environ = {"HF_TOKEN": "s3cret", "WANDB_API_KEY": "s3cret", "RAY_ADDRESS": "ray://me:s3cret@host:1", "PATH": "/bin"}
    shown = shown_variables(environ)
    assert "s3cret" not in str(shown)
    assert set(shown) == {"HF_TOKEN", "WANDB_API_KEY", "RAY_ADDRESS"}
