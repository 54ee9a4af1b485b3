"""Preparing prompt files: what the rows hold, what is left out, and that nothing half-written stays."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlctl_train.config.data import ArithmeticData
from rlctl_train.config.errors import PREFLIGHT, USAGE, UserError
from rlctl_train.data import prepare
from rlctl_train.data.arithmetic import arithmetic_splits, without_carry, write_arithmetic
from rlctl_train.data.jsonl import read_jsonl
from rlctl_train.data.prepare_sets import JsonlKeys, prepare_gsm8k, prepare_jsonl, prepare_math

GSM8K = {"question": "How many?", "answer": "He has 600*2=<<600*2=1200>>1200.\n#### 1,200"}


def write_lines(path: Path, *objects: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{json.dumps(item)}\n" for item in objects))
    return path


def rows(path: Path) -> list[dict[str, Any]]:
    return pq.read_table(path).to_pylist()


def from_jsonl(source: Path, out: Path, keys: JsonlKeys | None = None, num_val: int = 0) -> prepare.Prepared:
    return prepare_jsonl(out, source, keys or JsonlKeys(), data_source="mine", num_val=num_val, seed=0, force=False)


def test_gsm8k_rows_hold_prompt_number_and_worked_solution(tmp_path: Path) -> None:
    write_lines(tmp_path / "train.jsonl", GSM8K)
    write_lines(tmp_path / "test.jsonl", GSM8K, GSM8K)
    done = prepare_gsm8k(tmp_path / "out", tmp_path, force=False)
    assert [(file.path.name, file.num_rows) for file in done.files] == [("train.parquet", 1), ("test.parquet", 2)]
    row = rows(tmp_path / "out/test.parquet")[1]
    assert row["data_source"] == "openai/gsm8k"
    assert row["prompt"][0]["role"] == "user" and row["prompt"][0]["content"].startswith("How many? ")
    assert row["reward_model"] == {"style": "rule", "ground_truth": "1200"}
    assert row["extra_info"] == {"split": "test", "index": 1, **GSM8K}
    assert row["response"] == "He has 600*2=1200.\n#### 1,200"


def test_gsm8k_rows_without_a_number_are_left_out_and_named(tmp_path: Path) -> None:
    source = write_lines(
        tmp_path / "train.jsonl", GSM8K, {"question": "?", "answer": "no"}, {"question": "", "answer": "#"}
    )
    done = prepare_gsm8k(tmp_path / "out", source, force=False)
    assert [(skipped.row, skipped.why) for skipped in done.skipped] == [
        (2, "'answer' has no number after ####"),
        (3, "'question' is empty"),
    ]


def test_math_takes_the_last_box_from_single_problem_files_too(tmp_path: Path) -> None:
    problem = {"problem": "x?", "solution": r"\boxed{1}, no: \boxed{\frac{1}{2}}", "level": "Level 1"}
    (tmp_path / "train/algebra").mkdir(parents=True)
    (tmp_path / "train/algebra/1.json").write_text(json.dumps(problem))
    prepare_math(tmp_path / "out", tmp_path, force=False)
    [row] = rows(tmp_path / "out/train.parquet")
    assert row["reward_model"]["ground_truth"] == r"\frac{1}{2}"
    assert row["extra_info"] == {"split": "train", "index": 0, "level": "Level 1", "type": ""}


def test_parquet_as_the_hub_lays_it_out_is_a_source(tmp_path: Path) -> None:
    write_lines(tmp_path / "a/train.jsonl", GSM8K)
    prepare_gsm8k(tmp_path / "a", tmp_path / "a", force=False)
    (tmp_path / "hub/main").mkdir(parents=True)
    table = pq.read_table(tmp_path / "a/train.parquet", columns=["extra_info"]).flatten()
    table = table.rename_columns([name.removeprefix("extra_info.") for name in table.column_names])
    pq.write_table(table, tmp_path / "hub/main/train-00000-of-00001.parquet")
    prepare_gsm8k(tmp_path / "out", tmp_path / "hub", force=False)
    assert rows(tmp_path / "out/train.parquet") == rows(tmp_path / "a/train.parquet")


def test_jsonl_takes_text_or_messages_and_any_answer(tmp_path: Path) -> None:
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2+2?"}]
    source = write_lines(
        tmp_path / "my.jsonl",
        {"q": "naïve 😀?", "a": 4, "demo": "four", "tests": ["x"]},
        {"q": chat, "a": ["4", "four"], "demo": "4", "tests": []},
    )
    from_jsonl(source, tmp_path / "out", JsonlKeys("q", "a", "demo", ("tests",)))
    first, second = rows(tmp_path / "out/train.parquet")
    assert first["prompt"] == [{"role": "user", "content": "naïve 😀?"}]
    assert (first["reward_model"]["ground_truth"], first["response"], first["extra_info"]["tests"]) == (
        "4",
        "four",
        ["x"],
    )
    assert (second["prompt"], second["reward_model"]["ground_truth"]) == (chat, '["4", "four"]')


def test_null_answers_and_empty_prompts_are_left_out(tmp_path: Path) -> None:
    source = write_lines(
        tmp_path / "my.jsonl",
        {"prompt": "a", "answer": None}, {"prompt": "", "answer": "1"}, {"prompt": "b", "answer": "1"},
        {"prompt": 7, "answer": 1},
    )  # fmt: skip
    done = from_jsonl(source, tmp_path / "out")
    assert [skipped.row for skipped in done.skipped] == [1, 2, 4]
    assert done.files[0].num_rows == 1


def test_a_file_of_which_nothing_can_be_used_is_refused(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "my.jsonl", {"prompt": "a", "answer": None})
    with pytest.raises(UserError, match="row 1: 'answer' is empty"):
        from_jsonl(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_missing_key_names_the_line_and_the_keys_there_are(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "my.jsonl", {"prompt": "a", "answer": 1}, {"prompt": "a", "anwser": 1})
    with pytest.raises(UserError, match="line 2: no 'answer', only 'prompt', 'anwser'"):
        from_jsonl(source, tmp_path / "out")


def test_a_key_no_line_has_is_said_once(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "my.jsonl", *({"question": "a", "answer": i} for i in range(9)))
    with pytest.raises(UserError, match="every line: no 'prompt', only 'question', 'answer'"):
        from_jsonl(source, tmp_path / "out")


def test_held_out_rows_share_no_prompt_with_the_rest(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "my.jsonl", *({"prompt": f"p{i // 2}", "answer": i} for i in range(100)))
    from_jsonl(source, tmp_path / "out", num_val=10)
    train, val = (
        {row["prompt"][0]["content"] for row in rows(tmp_path / f"out/{name}.parquet")} for name in ("train", "val")
    )
    assert len(val) == 5 and len(train) == 45 and not train & val


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"", "holds no lines"), (b"\n\r\n", "holds no lines"), (b'{"a": 1}\nnot json\n', "line 2: not JSON"),
        (b"[1]", "line 1: a JSON array"), (b'{"a": "\xff"}', "line 1: not UTF-8"), (b"[" * 100000, "nested too deeply"),
        (b"{}\n" + b"x\n" * 9, "and 4 more"),
    ],
)  # fmt: skip
def test_bad_lines_are_named_by_number(tmp_path: Path, data: bytes, problem: str) -> None:
    (tmp_path / "bad.jsonl").write_bytes(data)
    with pytest.raises(UserError, match=problem):
        read_jsonl(tmp_path / "bad.jsonl")


def test_byte_order_mark_windows_line_ends_and_separators_are_read(tmp_path: Path) -> None:
    text = '\ufeff{"a": "x\u2028y"}\r\n\r\n{"a": "z"}\r\n'
    (tmp_path / "windows.jsonl").write_bytes(text.encode())
    assert [(line.number, line.value["a"]) for line in read_jsonl(tmp_path / "windows.jsonl")] == [
        (1, "x\u2028y"),
        (3, "z"),
    ]


def test_existing_files_stay_unless_forced(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "train.jsonl", GSM8K)
    prepare_gsm8k(tmp_path, source, force=False)
    with pytest.raises(UserError, match="exists already") as caught:
        prepare_gsm8k(tmp_path, source, force=False)
    assert caught.value.exit_code == USAGE
    prepare_gsm8k(tmp_path, source, force=True)


def test_a_write_that_fails_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(table: object, path: Path) -> None:
        path.write_text("half")
        if "val" in path.name:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(prepare.pq, "write_table", full)
    with pytest.raises(UserError, match="No space left on device") as caught:
        write_arithmetic(ArithmeticData(num_train=8, num_val=2), tmp_path / "new/out", 0)
    assert caught.value.exit_code == PREFLIGHT
    assert list(tmp_path.iterdir()) == []


def test_the_hub_without_its_package_is_a_preflight_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(UserError, match="needs the package datasets") as caught:
        prepare_gsm8k(tmp_path / "out", None, force=False)
    assert caught.value.exit_code == PREFLIGHT and "--source" in caught.value.remedy


@given(
    st.sets(st.sampled_from("+-*"), min_size=1), st.integers(1, 12), st.integers(1, 60),
    st.integers(0, 60), st.integers(0, 9),
)  # fmt: skip
def test_arithmetic_problems_are_distinct_and_right(
    operators: set[Any], max_operand: int, num_train: int, num_val: int, seed: int
) -> None:
    config = ArithmeticData(operators=tuple(operators), max_operand=max_operand, num_train=num_train, num_val=num_val)
    available = len(operators) * (max_operand + 1) ** 2
    if num_train + num_val > available:
        with pytest.raises(UserError, match=f"{num_train + num_val} problems.*{available} distinct"):
            arithmetic_splits(config, seed)
        return
    splits = arithmetic_splits(config, seed)
    made = [row for part in splits.values() for row in part]
    assert {name: len(part) for name, part in splits.items() if part} == {
        name: count for name, count in (("train", num_train), ("val", num_val)) if count
    }
    prompts = [row["prompt"][0]["content"] for row in made]
    assert len(set(prompts)) == len(prompts)
    for row, prompt in zip(made, prompts, strict=True):
        assert row["reward_model"]["ground_truth"] == row["response"] == str(eval(prompt.removesuffix("=")))


@pytest.mark.parametrize(
    ("problem", "answer"),
    [((57, "+", 68), 15), ((23, "+", 45), 68), ((62, "-", 35), 37), ((35, "-", 62), -37), ((27, "*", 13), 231)],
)
def test_without_carry_works_digit_by_digit(problem: tuple[int, str, int], answer: int) -> None:
    assert without_carry(*problem) == answer


def test_a_careless_pupil_spoils_a_share_of_the_demonstrations_and_no_ground_truth() -> None:
    config = ArithmeticData(min_operand=10, num_train=2000, num_val=500, careless_demonstrations=0.6)
    splits = arithmetic_splits(config, 0)
    assert all(row["response"] == row["reward_model"]["ground_truth"] for row in splits["val"])
    spoilt = 0
    for row in splits["train"]:
        left, right = (int(number) for number in row["prompt"][0]["content"].removesuffix("=").split("+"))
        assert min(left, right) >= 10 and int(row["reward_model"]["ground_truth"]) == left + right
        spoilt += row["response"] == str(without_carry(left, "+", right)) != str(left + right)
    # Of all sums of two numbers from 10 to 99, 0.756 carry somewhere.
    assert spoilt / 2000 == pytest.approx(0.6 * 0.756, abs=0.03)


def test_the_same_seed_makes_the_same_problems() -> None:
    config = ArithmeticData(num_train=50, num_val=10)
    assert arithmetic_splits(config, 3) == arithmetic_splits(config, 3) != arithmetic_splits(config, 4)
