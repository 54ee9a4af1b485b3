"""`rlctl data` and `rlctl reward` as a person types them: output, exit codes, messages."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from rlctl.app import run


@pytest.fixture
def data(tmp_path: Path) -> Path:
    assert run(["data", "prep", "arithmetic", "--out", str(tmp_path), "--num-train", "30", "--num-val", "5"]) == 0
    return tmp_path


def write_lines(path: Path, *objects: object) -> Path:
    path.write_text("".join(f"{json.dumps(item)}\n" for item in objects))
    return path


def test_prep_says_what_it_wrote(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "data",
        "prep",
        "arithmetic",
        "--out",
        str(tmp_path),
        "--num-train",
        "30",
        "--num-val",
        "5",
        "-o",
        "json",
    ]
    assert run(arguments) == 0
    answer = json.loads(capsys.readouterr().out)
    assert [(Path(file["path"]).name, file["rows"]) for file in answer["files"]] == [
        ("train.parquet", 30),
        ("val.parquet", 5),
    ]
    assert run(arguments) == 2
    assert "overwrite with --force" in capsys.readouterr().err
    assert run([*arguments, "--force"]) == 0


def test_prep_refuses_more_problems_than_there_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["data", "prep", "arithmetic", "--out", str(tmp_path / "x"), "--max-operand", "3"]) == 2
    error = capsys.readouterr().err
    assert "2304 problems" in error and "16 distinct" in error
    assert not (tmp_path / "x").exists()


def test_prep_jsonl_notes_the_lines_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_lines(tmp_path / "my.jsonl", {"prompt": "a", "answer": 1}, {"prompt": "b", "answer": None})
    assert run(["data", "prep", "jsonl", "--source", str(source), "--out", str(tmp_path / "out")]) == 0
    assert "train: left out row 2: 'answer' is empty" in capsys.readouterr().err


def test_check_exits_0_when_clean_and_2_when_not(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train, val = str(data / "train.parquet"), str(data / "val.parquet")
    assert run(["data", "check", train, "--val", val, "--reward", "arithmetic"]) == 0
    assert run(["data", "check", train, "--val", train, "-o", "json"]) == 2
    answer = json.loads(capsys.readouterr().out.partition("{\n")[2].join(["{\n", ""]))
    assert answer["clean"] is False and answer["findings"][0]["kind"] == "overlap"


def test_check_shows_lengths_for_people(data: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["data", "check", str(data / "train.parquet"), "--model", str(tiny_model)]
    assert run([*arguments, "--max-prompt-tokens", "5"]) == 2
    output = capsys.readouterr().out
    assert "prompt tokens: min" in output and "too_long" in output and "###" in output


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["data", "check", "nowhere.parquet"], 4, "no such file or folder: nowhere.parquet"),
        (["data", "check", "nowhere.parquet", "--max-prompt-tokens", "5"], 2, "name it with --model"),
        (["data", "prep", "gsm8k", "--source", "nowhere", "--out", "x"], 4, "no such file or folder: nowhere"),
        (["data", "prep", "arithmetic", "--operators", "/", "--out", "x"], 2, "--operators '/' is not made of"),
        (["reward", "score", "--reward", "gsm8k", "--data", "nowhere.jsonl"], 4, "no such file: nowhere.jsonl"),
        (["reward", "score", "--reward", "gsmk8", "--data", "x"], 2, "did you mean gsm8k?"),
        (["reward", "score", "--reward", "math", "--method", "strict", "--data", "x"], 2, "--method does not apply"),
    ],
)
def test_mistakes_get_a_line_a_way_out_and_an_exit_code(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    code: int,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(arguments) == code
    captured = capsys.readouterr()
    assert message in captured.err and "  -> " in captured.err and captured.out == ""
    assert list(tmp_path.iterdir()) == []


def test_a_model_folder_without_tokenizer_is_a_preflight_failure(
    data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["data", "check", str(data / "train.parquet"), "--model", str(data)]) == 4
    assert "has no tokenizer that loads" in capsys.readouterr().err


def test_score_gives_one_json_line_per_input_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [{"response": f"#### {i}", "ground_truth": answer} for i, answer in enumerate(["0", "7", "no number"])]
    file = write_lines(tmp_path / "x.jsonl", *lines)
    assert run(["reward", "score", "--reward", "gsm8k", "--data", str(file), "-o", "json"]) == 0
    captured = capsys.readouterr()
    results = [json.loads(line) for line in captured.out.splitlines()]
    assert [result["score"] for result in results] == [1.0, 0.0, 0.0]
    assert [result["error"] for result in results] == [None, None, "the ground truth 'no number' is not a number"]
    assert {"score", "reason", "parts", "error"} <= results[0].keys()
    assert "1 could not be graded" in captured.err


def test_score_names_every_bad_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = {"response": "1", "ground_truth": "1"}
    file = write_lines(tmp_path / "x.jsonl", good, {"response": "1"}, [1], good)
    assert run(["reward", "score", "--reward", "arithmetic", "--data", str(file), "-o", "json"]) == 2
    captured = capsys.readouterr()
    assert "line 2: no 'ground_truth', only 'response'; line 3: a JSON array" in captured.err and captured.out == ""


def test_score_survives_what_a_users_function_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "my.py").write_text(
        "import os\ndef f(response, ground_truth, bonus):\n    return bonus or os._exit(1)\n"
    )
    lines = [{"response": "", "ground_truth": "", "bonus": bonus} for bonus in (2, 0, 3)]
    file = write_lines(tmp_path / "x.jsonl", *lines)
    arguments = [
        "reward",
        "score",
        "--reward",
        f"{tmp_path}/my.py:f",
        "--data",
        str(file),
        "--time-limit",
        "5",
        "-o",
        "json",
    ]
    assert run(arguments) == 0
    results = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [result["score"] for result in results] == [2.0, 0.0, 3.0]
    assert "exit code 1" in results[1]["error"]


def test_a_reward_that_takes_anything_fails_its_trial(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train = str(data / "train.parquet")
    assert run(["reward", "test", "--reward", "arithmetic", "--data", train]) == 0
    assert run(["reward", "test", "--reward", "gsm8k", "--data", train]) == 3
    (data / "kind.py").write_text("def score(response, ground_truth): return 1.0\n")
    assert run(["reward", "test", "--reward", f"{data}/kind.py:score", "--data", train]) == 3
    assert "row 0, a right answer, got 0" in capsys.readouterr().err


def test_ls_lists_the_rewards_and_their_settings(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["reward", "ls", "-o", "json"]) == 0
    rewards = {entry["name"]: entry["settings"] for entry in json.loads(capsys.readouterr().out)["rewards"]}
    assert rewards["gsm8k"] == {"weight": 1.0, "method": "strict", "format_score": 0.0}


def test_the_commands_import_nothing_heavy() -> None:
    heavy = ["torch", "transformers", "ray", "pyarrow", "datasets"]
    code = f"import sys, rlctl.commands.data, rlctl.commands.reward; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
