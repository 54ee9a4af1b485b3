"""The loader: every row once an epoch, an order the seed decides, a position that survives a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from rlctl_train.config.data import ParquetData
from rlctl_train.config.errors import PREFLIGHT, UserError
from rlctl_train.data.loader import PromptLoader, PromptRow, supervised_rows

NUM_ROWS = 10


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny_model)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [row(f"{i}+1=", str(i + 1)) for i in range(NUM_ROWS)]
    return write(tmp_path_factory.mktemp("rows") / "train.parquet", rows)


def row(prompt: Any, answer: str | None = "1", **more: Any) -> dict[str, Any]:
    return {
        "data_source": "sums",
        "prompt": prompt,
        "reward_model": {"ground_truth": answer},
        "response": answer,
        **more,
    }


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def loader(
    file: Path, tokenizer: PreTrainedTokenizerBase, seed: int = 0, needs: Any = None, **data: Any
) -> PromptLoader:
    return PromptLoader(file, tokenizer, ParquetData(train=str(file), **data), seed, needs)


def prompts(rows: list[PromptRow]) -> list[str]:
    return [row.record["prompt"][0]["content"] for row in rows]


def test_a_row_is_the_templated_prompt_and_its_record(file: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    [first] = loader(file, tokenizer, shuffle=False).next_batch(1)
    expected = tokenizer.apply_chat_template([{"role": "user", "content": "0+1="}], add_generation_prompt=True)
    assert first.prompt_ids == expected["input_ids"]  # pyright: ignore[reportArgumentType, reportCallIssue]
    assert first.record == {
        "data_source": "sums", "prompt": [{"role": "user", "content": "0+1="}], "ground_truth": "1",
        "extra_info": {}, "response": "1",
    }  # fmt: skip


def test_each_epoch_visits_every_row_in_a_new_order(file: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    both = prompts(loader(file, tokenizer).next_batch(2 * NUM_ROWS))
    first, second = both[:NUM_ROWS], both[NUM_ROWS:]
    assert sorted(first) == sorted(second) and first != second
    assert prompts(loader(file, tokenizer).next_batch(NUM_ROWS)) == first
    assert prompts(loader(file, tokenizer, seed=1).next_batch(NUM_ROWS)) != first


@given(st.lists(st.integers(1, 25), max_size=4), st.integers(1, 30))
def test_a_loaded_position_continues_exactly(
    file: Path, tokenizer: PreTrainedTokenizerBase, before: list[int], after: int
) -> None:
    original, resumed = loader(file, tokenizer), loader(file, tokenizer)
    for count in before:
        original.next_batch(count)
    resumed.load_state(original.state())
    assert resumed.next_batch(after) == original.next_batch(after)


def test_a_position_in_other_data_is_refused(tmp_path: Path, file: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    other = loader(write(tmp_path / "other.parquet", [row("1+1=")]), tokenizer)
    with pytest.raises(UserError, match=r"has 1 usable rows, but had 10"):
        other.load_state(loader(file, tokenizer).state())


def test_a_folder_is_read_whole(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    write(tmp_path / "b.parquet", [row("2+1=")])
    write(tmp_path / "a.parquet", [row([{"role": "user", "content": "1+1="}])])
    with pytest.raises(UserError, match="different columns"):
        loader(tmp_path, tokenizer)
    write(tmp_path / "a.parquet", [row("1+1="), row("3+1=")])
    assert prompts(loader(tmp_path, tokenizer, shuffle=False).next_batch(3)) == ["1+1=", "3+1=", "2+1="]


def test_overlong_prompts_stop_or_are_dropped(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, caplog: pytest.LogCaptureFixture
) -> None:
    file = write(tmp_path / "long.parquet", [row("1+1="), row("1" * 50)])
    with pytest.raises(UserError, match=r"1 of 2 prompts.*row 1 with 53 tokens") as caught:
        loader(file, tokenizer, max_prompt_tokens=20)
    assert "raise data.max_prompt_tokens to 53" in caught.value.remedy
    assert len(loader(file, tokenizer, max_prompt_tokens=20, overlong_prompts="drop")) == 1
    assert "left out" in caplog.text
    with pytest.raises(UserError, match="2 of 2"):
        loader(file, tokenizer, max_prompt_tokens=2, overlong_prompts="drop")


@pytest.mark.parametrize(
    ("rows", "problem"),
    [
        ([{"text": "x"}], "has no column 'prompt', only text"),
        ([row(""), row("1"), row("  ")], "row 0: 'prompt' is empty; row 2"),
        ([row(7)], "neither text nor a list"), ([row([{"role": "pope", "content": "x"}])], "whose role is not one of"),
        ([row([{"role": "user", "content": None}])], "a message without text"),
        ([row(None)], "row 0: 'prompt' is empty"),
    ],
)  # fmt: skip
def test_bad_rows_are_named(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, rows: list[dict[str, Any]], problem: str
) -> None:
    with pytest.raises(UserError, match=problem) as caught:
        loader(write(tmp_path / "bad.parquet", rows), tokenizer)
    assert caught.value.exit_code == PREFLIGHT and "bad.parquet" in caught.value.what


def test_files_that_are_no_parquet_are_named(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    (tmp_path / "x.jsonl").write_text("{}\n")
    (tmp_path / "x.parquet").write_bytes(b"PAR1 but no more")
    pq.write_table(pa.Table.from_pylist([], schema=pa.schema([("prompt", pa.string())])), tmp_path / "empty.parquet")
    for name, problem in (("x.jsonl", "not readable"), ("x.parquet", "not readable"), ("empty.parquet", "no rows")):
        with pytest.raises(UserError, match=problem) as caught:
            loader(tmp_path / name, tokenizer)
        assert caught.value.exit_code == PREFLIGHT
    with pytest.raises(UserError, match="no such file"):
        loader(tmp_path / "nowhere.parquet", tokenizer)


def test_what_a_run_needs_must_be_in_every_row(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    file = write(tmp_path / "gaps.parquet", [row("1"), row("2", None)])
    assert len(loader(file, tokenizer)) == 2
    for needs in ("ground_truth", "response"):
        with pytest.raises(UserError, match=f"row 1: no {needs}"):
            loader(file, tokenizer, needs=needs)
    bare = write(tmp_path / "bare.parquet", [{"prompt": "1"}])
    with pytest.raises(UserError, match="has no column 'reward_model'"):
        loader(bare, tokenizer, needs="ground_truth")


def test_a_tokenizer_without_chat_template_is_refused(file: Path, tiny_model: Path) -> None:
    plain = AutoTokenizer.from_pretrained(tiny_model)
    plain.chat_template = None
    with pytest.raises(UserError, match="has no chat template"):
        loader(file, plain)


def test_supervised_rows_train_on_the_response_and_its_end(file: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    rows = loader(file, tokenizer, shuffle=False).next_batch(NUM_ROWS)
    batch = supervised_rows(rows, tokenizer, 40)
    for i, (given_row, length) in enumerate(zip(rows, batch["response_len"].tolist(), strict=True)):
        response = batch["response_ids"][i, :length].tolist()
        assert response[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(response[:-1]) == given_row.record["response"]
        assert batch["response_mask"][i].sum() == length
        assert batch["prompt_ids"][i, : batch["prompt_len"][i]].tolist() == given_row.prompt_ids


def test_a_long_completion_is_cut_and_marked(file: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    rows = loader(file, tokenizer, shuffle=False).next_batch(NUM_ROWS)
    batch = supervised_rows(rows, tokenizer, len(rows[0].prompt_ids) + 1)
    assert batch["response_ids"].shape == (NUM_ROWS, 1)
    assert batch["truncated"].tolist() == [1.0] * NUM_ROWS
    with pytest.raises(UserError, match="leaves no room"):
        supervised_rows(rows, tokenizer, len(rows[0].prompt_ids))


def test_a_conversation_trains_on_what_the_assistant_says(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    said = [("user", "1+1="), ("assistant", "2"), ("user", "2+2="), ("assistant", "4"), ("user", "3")]
    messages = [{"role": role, "content": content} for role, content in said]
    rows = loader(write(tmp_path / "chat.parquet", [{"messages": messages}]), tokenizer, needs="response").next_batch(1)
    batch = supervised_rows(rows, tokenizer, 60)
    whole = tokenizer.decode(rows[0].prompt_ids + batch["response_ids"][0].tolist())
    assert whole == tokenizer.apply_chat_template(messages[:4], tokenize=False)
    learned = batch["response_ids"][0][batch["response_mask"][0].bool()].tolist()
    assert tokenizer.decode(learned) == f"2{tokenizer.eos_token}4{tokenizer.eos_token}"


def test_a_row_without_a_response_cannot_be_learned(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    rows = loader(write(tmp_path / "x.parquet", [{"prompt": "1"}]), tokenizer).next_batch(1)
    with pytest.raises(UserError, match="no response to learn from"):
        supervised_rows(rows, tokenizer, 40)
