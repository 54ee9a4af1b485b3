"""Presets: what they say of themselves, their settings for one device, and their measured records."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rlctl_hw.model_catalogue import known_models, known_shape

from rlctl import app, catalog, evidence, planning, resolve
from rlctl.evidence import PLANNED, Verified, read_verified
from rlctl.workload import shape_of
from rlctl_train.config.algo import GrpoConfig, SftConfig
from rlctl_train.config.errors import DOES_NOT_FIT, USAGE, UserError
from rlctl_train.config.model import PretrainedModel
from rlctl_train.config.run import RunConfig
from rlctl_train.registry import ALGOS, LOSSES

PLANNED_ONLY = ("llama-3.2", "llama-3.1-405b", "mixtral")
OF_A_PAPER = ("qwen2.5-7b-base", "qwen2.5-32b-base", "qwen2.5-math")
MODELS = [name for name in known_models() if not name.startswith((*PLANNED_ONLY, *OF_A_PAPER))]
MINIMAL = '[preset]\ntitle = "t"\nextends = "quickstart"\n'
PINNED = f'{MINIMAL}[hardware.h100-80gb]\nreason = "a measured need"\ntrainer.num_steps = 7\n'
RECORD = {
    "date": "2026-11-20",
    "commit": "0123abc",
    "hardware": "cpu:2",
    "command": "rlctl launch quickstart",
    "versions": {"torch": "2.13.0"},
    "numbers": {"run_s": 163},
}


def write(folder: Path, text: str) -> Path:
    file = folder / "mine.toml"
    file.write_text(text, encoding="utf-8")
    return file


def test_settings_for_a_device_hold_on_that_device_alone(tmp_path: Path) -> None:
    file = write(tmp_path, PINNED)
    here = resolve.build(str(file), device="h100-80gb")
    assert here.config.trainer.num_steps == 7
    assert here.origins["trainer.num_steps"].source == f"file {file} [hardware.h100-80gb]"
    for device in (None, "h200-141gb"):
        assert resolve.build(str(file), device=device).config.trainer.num_steps == 100


def test_the_reason_for_a_device_s_settings_is_told(tmp_path: Path) -> None:
    file = write(tmp_path, PINNED)
    assert resolve.build(str(file), device="h100-80gb").notes == (f"file {file} [hardware.h100-80gb]: a measured need",)


def test_files_on_top_override_a_device_s_settings(tmp_path: Path) -> None:
    on_top = tmp_path / "top.toml"
    on_top.write_text("trainer.num_steps = 9\n", encoding="utf-8")
    resolved = resolve.build(str(write(tmp_path, PINNED)), files=[on_top], device="h100-80gb")
    assert resolved.config.trainer.num_steps == 9


def test_a_wrong_key_among_a_device_s_settings_is_found_on_that_device(tmp_path: Path) -> None:
    file = write(tmp_path, PINNED.replace("num_steps", "num_stps"))
    with pytest.raises(UserError, match="num_stps"):
        resolve.build(str(file), device="h100-80gb")


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ('[hardware.h100-90gb]\nreason = "r"\n', "nearest: .*h100-80gb"),
        ('[hardware.h100]\nreason = "r"\n', "is a nickname"),
        ("[hardware.h100-80gb]\nseed = 1\n", "gives no reason"),
        ('[hardware.h100-80gb]\nreason = ""\n', "gives no reason"),
        ("[hardware]\nseed = 1\n", "is not a table of tables"),
    ],
)
def test_a_device_table_must_name_a_device_and_a_reason(tmp_path: Path, table: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        catalog.load_file(write(tmp_path, MINIMAL + table))


def test_the_device_at_hand_is_the_one_that_all_accelerators_are() -> None:
    assert planning.device_key(planning.hardware_named("mi300x:8x4")) == "mi300x-192gb"
    assert planning.device_key(planning.hardware_named("cpu:2")) is None


def test_a_plan_for_a_machine_elsewhere_reads_that_machine_s_settings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path, PINNED.replace("num_steps", "num_stps"))
    assert app.run(["plan", str(file), "--hw", "h100-80gb:1"]) == USAGE
    assert "[hardware.h100-80gb]" in capsys.readouterr().err


def test_a_record_is_read_and_summed_up() -> None:
    records = read_verified([{**RECORD, "date": "2026-12-01"}, RECORD], "x.toml")
    assert [record.date for record in records] == ["2026-11-20", "2026-12-01"]
    assert isinstance(records[0], Verified)
    assert evidence.status(records) == "verified on cpu:2, 2026-12-01"
    assert evidence.status(()) == PLANNED


@pytest.mark.parametrize("name", catalog.names())
def test_every_preset_fits_its_model_and_can_be_planned_without_network(name: str) -> None:
    config = resolve.build(name).config
    shape = shape_of(config)
    assert shape.exact
    assert shape.max_position is not None
    assert config.data.max_prompt_tokens + config.rollout.max_response_tokens <= shape.max_position
    if isinstance(config.model, PretrainedModel):
        assert known_shape(config.model.path) is not None


@pytest.mark.parametrize("name", catalog.names())
def test_every_preset_is_valid_on_the_devices_it_names(name: str) -> None:
    for pins in catalog.load_preset(name).pins:
        assert resolve.build(name, device=pins.device).notes[-1].endswith(pins.reason)


@pytest.mark.parametrize("model", MODELS)
def test_every_model_has_a_preset_with_grpo(model: str) -> None:
    algo = resolve.build(f"{model}-grpo").config.algo
    assert isinstance(algo, GrpoConfig)


def test_every_algorithm_and_policy_loss_has_a_preset_of_a_published_model() -> None:
    """But for supervised fine-tuning, and for DRO and IPO, whose papers set nothing for such a model."""
    algos = [config.algo for config in map(published, catalog.names()) if config is not None]
    assert set(ALGOS) <= {algo.type for algo in algos} | {"sft"}
    losses = {algo.loss.type for algo in algos if not isinstance(algo, SftConfig)}
    assert set(LOSSES) <= losses | {"dro", "ipo"}


def published(name: str) -> RunConfig | None:
    config = resolve.build(name).config
    return config if isinstance(config.model, PretrainedModel) else None


@pytest.mark.parametrize(
    ("name", "mini_batches", "loss"),
    [
        ("qwen3-30b-a3b-gspo", 4, {"clip_low": 3e-4, "clip_high": 4e-4}),
        ("qwen3-30b-a3b-sapo", 4, {"tau_pos": 1.0, "tau_neg": 1.05}),
        ("qwen3-30b-a3b-dppo", 8, {"threshold_low": 0.15, "threshold_high": 0.15}),
        ("qwen2.5-32b-cispo", 16, {"clip_low": 1.0}),
        ("qwen2.5-7b-kl-cov", 8, {"token_share": 2e-3, "coef": 1.0}),
        ("qwen2.5-32b-kl-cov", 8, {"token_share": 2e-4, "coef": 1.0}),
        ("qwen2.5-32b-clip-cov", 8, {"clip_low": 1.0, "clip_high": 1.0, "token_share": 2e-4}),
        ("qwen2.5-math-7b-gmpo", 8, {"clip_low": 0.4, "clip_high": 0.4}),
        ("qwen2.5-32b-vapo", 16, {"clip_low": 0.2, "clip_high": 0.28}),
    ],
)
def test_a_preset_of_a_paper_has_the_paper_s_clips_and_mini_batches(
    name: str, mini_batches: int, loss: dict[str, float]
) -> None:
    resolved = resolve.build(name)
    assert resolved.config.trainer.mini_batches_per_step == mini_batches
    assert {key: resolved.origins[f"algo.loss.{key}"].value for key in loss} == loss


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"commit": None}, "lacks 'commit'"),
        ({"date": "yesterday"}, "not YYYY-MM-DD"),
        ({"numbers": {}}, "lacks 'numbers'"),
        ({"numbers": {"run_s": "fast"}}, "lacks 'numbers'"),
        ({"versions": {"torch": 2}}, "lacks 'versions'"),
        ({"speed": 1}, "unknown key 'speed'"),
    ],
)
def test_a_record_must_be_whole(change: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_verified([{**RECORD, **change}], "x.toml")


def test_records_must_be_a_list_of_tables() -> None:
    with pytest.raises(UserError, match="not a list of tables"):
        read_verified(RECORD, "x.toml")


def test_the_list_shows_which_presets_were_measured(capsys: pytest.CaptureFixture[str]) -> None:
    app.run(["preset", "ls", "-o", "json"])
    presets = {entry["name"]: entry for entry in json.loads(capsys.readouterr().out)["presets"]}
    assert presets["quickstart"]["status"].startswith("verified on cpu:2")
    assert presets["qwen2.5-7b-grpo"]["status"] == PLANNED
    assert presets["quickstart"]["verified"][0]["numbers"]["accuracy_after"] > 0.9


def test_a_preset_says_whether_it_was_measured(capsys: pytest.CaptureFixture[str]) -> None:
    assert app.run(["preset", "quickstart"]) == 0
    assert "quickstart: verified on cpu:2" in capsys.readouterr().err


def test_a_host_without_accelerators_is_told_what_would_do(capsys: pytest.CaptureFixture[str]) -> None:
    assert app.run(["preset", "qwen2.5-7b-grpo", "--hw", "cpu:2"]) == DOES_NOT_FIT
    assert "h100-80gb:8 would do, and --hw h100-80gb:8 plans for it" in capsys.readouterr().err


def test_a_preset_can_be_shown_for_a_machine_elsewhere(capsys: pytest.CaptureFixture[str]) -> None:
    assert app.run(["preset", "qwen2.5-7b-grpo", "--hw", "h100-80gb:8", "-o", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["plan"]["trainer_devices"] == 8
