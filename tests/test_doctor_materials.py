"""The doctor on what a run reads: model, data, reward functions, tokens."""

from __future__ import annotations

import urllib.error
from pathlib import Path
from typing import Any

import pytest

from rlctl.doctor import credentials, materials, tools
from rlctl.doctor.finding import Finding
from tests import doctor_support as given

HUB_ID = "Qwen/Qwen2.5-0.5B"
SECRET = "hf_verysecretvalue"


def reached(answer: int | str, *, env: dict[str, str] | None = None, **model: Any) -> Finding:
    config = given.config(model={"type": "pretrained", "path": HUB_ID, **model})
    found_tools = given.tools(http=lambda url, token, limit_s: answer)
    return materials.model(given.case(config=config, env={"HOME": "/nowhere"} | (env or {}), tools=found_tools))


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (401, "the hub refuses it (status 401)"),
        (403, "gated, private or misspelt"),
        (404, "no such model or revision"),
        (503, "status 503"),
        ("timed out", "the hub cannot be reached: timed out"),
    ],
)
def test_a_model_that_the_hub_does_not_give_fails(answer: int | str, words: str) -> None:
    found = reached(answer, env={"HF_HOME": "/nowhere"})
    assert found.status == "fail" and words in found.what and found.remedy


def test_a_model_within_the_hubs_reach_is_ok() -> None:
    assert reached(200, env={"HF_HOME": "/nowhere"}).status == "ok"


def test_the_remedy_for_a_gated_model_depends_on_whether_a_token_is_set() -> None:
    assert "set HF_TOKEN" in reached(401, env={"HF_HOME": "/nowhere"}).remedy
    with_token = reached(401, env={"HF_HOME": "/nowhere", "HF_TOKEN": SECRET})
    assert "accept its licence" in with_token.remedy and SECRET not in with_token.what + with_token.remedy


def test_the_hub_is_asked_for_the_revision_with_the_token(tmp_path: Path) -> None:
    asked = []

    def http(url: str, token: str | None, limit_s: float) -> int:
        asked.append((url, token))
        return 200

    (tmp_path / "token").write_text(f"{SECRET}\n")
    config = given.config(model={"type": "pretrained", "path": HUB_ID, "revision": "a/b"})
    env = {"HF_HOME": str(tmp_path), "HF_ENDPOINT": "https://mirror.example/"}
    materials.model(given.case(config=config, env=env, tools=given.tools(http=http)))
    assert asked == [(f"https://mirror.example/{HUB_ID}/resolve/a%2Fb/config.json", SECRET)]


def test_offline_only_the_cache_counts(tmp_path: Path) -> None:
    env = {"HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    assert "HF_HUB_OFFLINE forbids" in reached(200, env=env).what
    snapshot = tmp_path / f"models--{HUB_ID.replace('/', '--')}" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").touch()
    assert reached(200, env=env).status == "fail"
    (snapshot / "model.safetensors").touch()
    assert reached("never asked", env=env).status == "ok"


def test_an_unreachable_address_is_a_reason_and_not_an_exception(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any, **options: Any) -> None:
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(tools.urllib.request, "urlopen", refuse)
    assert tools.http_status("https://hub.example/x", SECRET, 1.0) == "Name or service not known"
    assert isinstance(tools.http_status("no address", None, 1.0), str)


def folder(root: Path, *names: str) -> Finding:
    root.mkdir(exist_ok=True)
    for name in names:
        (root / name).touch()
    config = given.config(model={"type": "pretrained", "path": str(root)})
    return materials.model(given.case(config=config))


def test_a_model_folder_must_be_whole(tmp_path: Path) -> None:
    assert folder(tmp_path / "good", "config.json", "a.safetensors", "tokenizer.json").status == "ok"
    everything = folder(tmp_path / "empty")
    assert [p.status for p in everything.problems] == ["fail"] * 3
    assert "no config.json" in everything.what and "no tokenizer" in everything.what
    missing = given.config(model={"type": "pretrained", "path": "./none"})
    assert "there is no such folder" in materials.model(given.case(config=missing)).what


def parquet(root: Path, **files: str) -> Finding:
    config = given.config(data={"type": "parquet", **{name: str(root / file) for name, file in files.items()}})
    return materials.data(given.case(config=config))


def test_data_files_must_be_there_and_whole(tmp_path: Path) -> None:
    (tmp_path / "good.parquet").write_bytes(b"PAR1 rows PAR1")
    (tmp_path / "cut.parquet").write_bytes(b"PAR1 rows")
    (tmp_path / "none").mkdir()
    assert parquet(tmp_path, train="good.parquet", val="good.parquet").status == "ok"
    both = parquet(tmp_path, train="cut.parquet", val="no.parquet")
    assert both.status == "fail" and len(both.problems) == 2 and "not a whole parquet file" in both.what
    assert "holds no parquet file" in parquet(tmp_path, train="none").what


def rewarded(root: Path, text: str, *, limit_s: float | None = None) -> Finding:
    (root / "mine.py").write_text(text)
    config = given.config(reward={"type": "custom", "path": f"{root}/mine.py:score"})
    return materials.reward(given.case(config=config, tools=given.tools(python=tools.run_python)))


def test_a_reward_function_must_load(tmp_path: Path) -> None:
    assert rewarded(tmp_path, "def score(response, ground_truth): return 1").status == "ok"
    assert "ValueError: oh" in rewarded(tmp_path, "raise ValueError('oh')").what
    assert "is not a function" in rewarded(tmp_path, "score = 3").what


def test_a_reward_function_that_hangs_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(materials, "IMPORT_LIMIT_S", 0.01)
    found = rewarded(tmp_path, "import threading; threading.Event().wait()")
    assert found.status == "fail" and "does not import within 0.01 s" in found.what


def test_runs_that_make_their_own_material_have_nothing_to_look_for() -> None:
    case = given.case(config=given.config())
    assert {check(case).status for check in (materials.model, materials.data, materials.reward)} == {"skip"}
    assert materials.model(given.case()).status == "skip"


def tokens(*trackers: str, env: dict[str, str] | None = None, **sections: Any) -> Finding:
    config = given.config(telemetry={"trackers": trackers}, **sections)
    return credentials.check(given.case(config=config, env={"HOME": "/nowhere"} | (env or {})))


@pytest.mark.parametrize(("tracker", "variable"), [("wandb", "WANDB_API_KEY"), ("swanlab", "SWANLAB_API_KEY")])
def test_a_tracker_needs_its_key_unless_it_is_offline(tracker: str, variable: str) -> None:
    found = tokens(tracker)
    assert found.status == "fail" and variable in found.remedy
    assert tokens(tracker, env={variable: SECRET}).status == "ok"
    assert tokens(tracker, env={variable.replace("API_KEY", "MODE"): "offline"}).status == "ok"


def test_a_login_that_left_a_file_counts(tmp_path: Path) -> None:
    (tmp_path / ".netrc").write_text(f"machine api.wandb.ai login user password {SECRET}\n")
    (tmp_path / ".swanlab").mkdir()
    (tmp_path / ".swanlab" / ".netrc").touch()
    found = tokens("wandb", "swanlab", env={"HOME": str(tmp_path)})
    assert found.status == "ok" and SECRET not in found.what
    (tmp_path / ".netrc").write_text("machine machine \0 {")
    assert tokens("wandb", env={"HOME": str(tmp_path)}).status == "fail"


def test_mlflow_without_a_server_warns() -> None:
    assert tokens("mlflow").status == "warn"
    assert tokens("mlflow", env={"MLFLOW_TRACKING_URI": "http://here"}).status == "ok"


def test_a_cluster_with_tokens_needs_one(tmp_path: Path) -> None:
    cluster = {"address": "head:6379"}
    assert tokens(ray=cluster).status == "ok"
    found = tokens(ray=cluster, env={"RAY_AUTH_MODE": "token"})
    assert found.status == "fail" and "RAY_AUTH_TOKEN" in found.remedy
    assert tokens(ray=cluster, env={"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": SECRET}).status == "ok"
    (tmp_path / "t").write_text(SECRET)
    assert (
        tokens(ray=cluster, env={"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(tmp_path / "t")}).status == "ok"
    )
