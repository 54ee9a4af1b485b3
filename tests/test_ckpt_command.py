"""`rlctl ckpt` as a user meets it: names of runs, tables and documents, questions, exit codes."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from rlctl import app, render
from rlctl_train.checkpoint import hub, kinds
from rlctl_train.checkpoint.store import CheckpointStore
from rlctl_train.checkpoint.stored import Checkpoint
from rlctl_train.config.errors import DOES_NOT_FIT, FAILED, OK, PREFLIGHT, USAGE, UserError
from rlctl_train.config.layout import write_json
from tests import runs
from tests.stored_checkpoints import in_files, read_folder, save_model

Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def own_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLCTL_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("RLCTL_RUNS_DIR", str(tmp_path / "runs"))
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(kinds, "read", read_folder)
    monkeypatch.setattr(kinds, "recognise", recognise)


def recognise(path: Path) -> tuple[str, str]:
    if not list(path.glob("*.safetensors")):
        raise UserError(f"{path} is no checkpoint of a known kind", "look inside")
    return "huggingface", "it has safetensors files"


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Cli:
    def call(*words: str | Path) -> tuple[int, str, str]:
        code = app.run(["ckpt", *map(str, words)])
        done = capsys.readouterr()
        return code, done.out, done.err

    return call


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with checkpoints of steps 2, 4 and 6, of which 4 is the best and 6 damaged."""
    files = runs.make_run(tmp_path / "runs" / "mine")
    write_json(files.status, {"schema_version": 1, "state": "done", "phase": "ended", "step": 6})
    store = CheckpointStore(files.checkpoints, 9)
    for step in (2, 4, 6):
        with store.writing(step) as folder:
            save_model(folder, "LlamaForCausalLM", seed=step)
    (files.checkpoints / "step_000006" / "config.json").unlink()
    accuracies = {2: 0.1, 4: 0.7, 6: 0.3}
    rows = [
        {"step": step, "phase": "validation", "time": step, "val-core/x/acc/mean@1": value}
        for step, value in accuracies.items()
    ]
    files.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return files.root


def test_help_comes_without_torch() -> None:
    import subprocess

    script = "import sys; from rlctl import app; app.run(['ckpt', '--help']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, check=False).returncode == 0


def test_ls_marks_the_best_the_last_and_what_is_damaged(cli: Cli, run: Path) -> None:
    code, out, _ = cli("ls", "-o", "json")
    found = {one["step"]: one for one in json.loads(out)["checkpoints"]}
    assert code == OK and json.loads(out)["schema_version"] == 1
    assert {step: (one["complete"], one["best"], one["last"]) for step, one in found.items()} == {
        2: (True, False, False), 4: (True, True, True), 6: (False, False, False),
    }  # fmt: skip
    assert found[2]["kind"] == "huggingface" and found[2]["num_bytes"] > 80_000 and found[2]["run"] == "mine"
    assert "best last" in cli("ls", "mine")[1] and cli("ls", run / "checkpoints")[0] == OK


def test_inspect_takes_a_runs_newest_complete_checkpoint_or_the_step_named(cli: Cli, run: Path) -> None:
    content = json.loads(cli("inspect", "mine", "-o", "json")[1])
    assert content["path"].endswith("step_000004") and content["totals"]["tensors"] == len(content["tensors"]) == 21
    assert content["tensors"]["model.norm.weight"] == {"dtype": "float32", "shape": [32], "bytes": 128}
    assert json.loads(cli("inspect", "mine", "--step", "2", "-o", "json")[1])["path"].endswith("step_000002")
    code, _, err = cli("inspect", "mine", "--step", "3")
    assert code == USAGE and "it has: 2, 4, 6" in err


def test_inspect_shows_tensors_by_pattern(cli: Cli, run: Path) -> None:
    out = cli("inspect", "mine")[1]
    assert "model.layers.*.mlp.up_proj.weight" in out and "64x32" in out and "layers.0" not in out
    assert "huggingface (it has safetensors files)" in out


def test_a_merge_of_a_run_loads(cli: Cli, run: Path) -> None:
    code, out, err = cli("merge", "mine", "--out", "merged", "--dtype", "bfloat16", "-o", "json")
    assert code == OK and json.loads(out)["written"] and "wrote 21 tensors" in err
    assert AutoModelForCausalLM.from_pretrained("merged").dtype == torch.bfloat16
    code, _, err = cli("merge", "mine", "--out", "merged")
    assert code == USAGE and "exists already" in err and "--overwrite" in err
    assert cli("merge", "mine", "--out", "merged", "--overwrite")[0] == OK


def test_every_problem_of_a_merge_is_told_and_nothing_written(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model(tmp_path / "in", "LlamaForCausalLM")
    tensors = in_files(tmp_path / "raw", {"stray": torch.ones(2)})
    monkeypatch.setattr(kinds, "read", lambda path, kind: Checkpoint("rlctl", path, tensors, path))
    code, _, err = cli("merge", "in", "--out", "merged")
    assert code == USAGE and "21 tensors are missing" in err and "stray" in err
    assert not list(tmp_path.glob("*merged*"))


def test_a_dry_run_writes_nothing(cli: Cli, run: Path, tmp_path: Path) -> None:
    code, out, err = cli("merge", "mine", "--out", "merged", "--dry-run", "-o", "yaml")
    assert code == OK and "would write 21 tensors" in err and "written: false" in out
    assert not list(tmp_path.glob("*merged*"))


def test_convert_writes_the_kinds_it_knows(cli: Cli, run: Path, tmp_path: Path) -> None:
    assert cli("convert", "mine", "--to", "huggingface", "--out", "merged")[0] == OK
    assert (tmp_path / "merged" / "model.safetensors").is_file()
    code, _, err = cli("convert", "mine", "--to", "hugginface", "--out", "other")
    assert code == USAGE and "did you mean huggingface?" in err
    code, _, err = cli("convert", "mine", "--to", "peft", "--out", "other")
    assert code == USAGE and "has no adapter" in err


def test_verify_names_a_flipped_bit_and_leaves_with_three(cli: Cli, run: Path, tmp_path: Path) -> None:
    cli("merge", "mine", "--out", "merged")
    assert cli("verify", "merged")[0] == OK
    file = tmp_path / "merged" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    code, out, err = cli("verify", "merged")
    assert code == DOES_NOT_FIT and "changed" in out and "damaged" in err
    assert len(json.loads(cli("verify", "merged", "-o", "json")[1])["findings"]) == 1


def test_verify_against_another_compares(cli: Cli, run: Path) -> None:
    cli("merge", "mine", "--out", "merged")
    assert cli("verify", "merged", "--against", run / "checkpoints" / "step_000004")[0] == OK
    assert cli("verify", "merged", "--against", run / "checkpoints" / "step_000002")[0] == DOES_NOT_FIT


def test_verify_generates_and_holds_against_the_recording(cli: Cli, run: Path, tmp_path: Path) -> None:
    cli("merge", "mine", "--out", "merged")
    code, _, err = cli("verify", "merged", "--generate")
    assert code == USAGE and "no probe.json" in err
    model = AutoModelForCausalLM.from_pretrained("merged")
    with torch.no_grad():
        logp = torch.log_softmax(model(torch.tensor([[3, 4, 5]])).logits[0, 1], dim=-1)
    sequence = {"prompt_ids": [3, 4], "response_ids": [5], "logp": [float(logp[5])]}
    probe = {"schema_version": 1, "temperature": 1.0, "sequences": [sequence]}
    (tmp_path / "probe.json").write_text(json.dumps(probe))
    code, out, _ = cli("verify", "merged", "--generate", "-o", "json")
    assert code == OK and json.loads(out)["generate"]["within"]
    sequence["logp"] = [0.0]
    (tmp_path / "other.json").write_text(json.dumps(probe))
    assert cli("verify", "merged", "--probe", "other.json")[0] == DOES_NOT_FIT


def test_diff_leaves_with_one_where_they_differ(cli: Cli, run: Path) -> None:
    places = [run / "checkpoints" / f"step_00000{step}" for step in (2, 4)]
    assert cli("diff", places[0], places[0])[0] == OK
    code, out, err = cli("diff", *places)
    assert code == FAILED and "MAX ABS" in out and "21 differ" in err and "1 more" in err
    content = json.loads(cli("diff", *places, "-o", "json")[1])
    assert not content["within"] and len(content["tensors"]) == 21
    assert cli("diff", *places, "--atol", "5")[0] == OK


def test_prune_keeps_the_newest_complete_ones_and_those_named(cli: Cli, run: Path) -> None:
    folder = run / "checkpoints"
    code, _, err = cli("prune", "mine", "--keep-last", "0")
    assert code == USAGE and "steps 2, 6" in err and len(list(folder.iterdir())) == 3
    assert cli("prune", "mine", "--keep-last", "0", "--keep", "2", "-y")[0] == OK
    assert sorted(path.name for path in folder.iterdir()) == ["step_000002", "step_000004"]
    out = cli("prune", folder, "--keep-last", "1", "-y", "-o", "json")[1]
    assert json.loads(out)["removed"] == [2] and json.loads(out)["kept"] == [4]


def test_prune_asks_on_a_terminal(cli: Cli, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(render, "ask", lambda question, costs: not costs)
    assert cli("prune", "mine", "--keep-last", "1")[0] == OK
    assert len(list((run / "checkpoints").iterdir())) == 3


def test_prune_refuses_where_nothing_is_complete_or_a_step_is_not_there(cli: Cli, run: Path) -> None:
    assert "no checkpoint of step 5" in cli("prune", "mine", "--keep-last", "1", "--keep", "5", "-y")[2]
    for step in (2, 4):
        (run / "checkpoints" / f"step_00000{step}" / "config.json").unlink()
    code, _, err = cli("prune", "mine", "--keep-last", "1", "-y")
    assert code == USAGE and "nothing is removed" in err and len(list((run / "checkpoints").iterdir())) == 3


def test_a_name_that_is_neither_run_nor_folder_is_told(cli: Cli, run: Path) -> None:
    code, _, err = cli("inspect", "mune")
    assert code == USAGE and "did you mean mine?" in err


def test_an_unknown_kind_is_told(cli: Cli, run: Path) -> None:
    assert "did you mean megatron?" in cli("inspect", "mine", "--kind", "megatorn")[2]


def test_a_push_is_asked_for_before_the_work_and_private(
    cli: Cli, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pushed: list[Any] = []
    monkeypatch.setattr(hub, "check", lambda repo: "me")
    monkeypatch.setattr(hub, "push", lambda folder, repo, private: pushed.append((repo, private)) or "there")
    code, _, err = cli("merge", "mine", "--out", "merged", "--push", "me/model")
    assert code == USAGE and "Push to me/model as me, private?" in err and not (tmp_path / "merged").exists()
    assert cli("merge", "mine", "--out", "merged", "--push", "me/model", "-y")[0] == OK
    assert pushed == [("me/model", True)]


@pytest.mark.skipif(importlib.util.find_spec("huggingface_hub") is None, reason="the hub's library is not installed")
def test_a_push_without_token_or_network_is_told_with_a_way_out(
    cli: Cli, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.HfApi.whoami", refuse_offline)
    code, _, err = cli("merge", "mine", "--out", "merged", "--push", "me/model", "-y")
    assert code == PREFLIGHT and "HF_ENDPOINT" in err and not (tmp_path / "merged").exists()


def refuse_offline(*arguments: object) -> None:
    raise ConnectionError("no route to the hub")


def test_progress_off_a_terminal_is_a_line_at_times(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter([0.0, 1.0, 6.0, 7.0, 12.0])
    monkeypatch.setattr(render.time, "monotonic", lambda: next(clock))
    with render.progress("merging") as tell:
        for done in (0, 600, 700, 1200):
            tell(done * 10**6, 2400 * 10**6)
    assert capsys.readouterr().err.splitlines() == [
        "merging: 600 MB of 2.4 GB, 100 MB/s, 18 s left", "merging: 1.2 GB of 2.4 GB, 100 MB/s, 12 s left",
    ]  # fmt: skip
