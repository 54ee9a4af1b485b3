"""Prompts for a run, in an order the seed decides and a checkpoint can take up again; rows for supervised steps."""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from rlctl_train.batch import Batch, pad_rows
from rlctl_train.config.data import DataConfig
from rlctl_train.config.errors import PREFLIGHT, UserError
from rlctl_train.data.jsonl import listed
from rlctl_train.data.rows import CHUNK_ROWS, RowError, RowFile
from rlctl_train.data.template import render, require_chat_template, token_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PromptRow:
    """One prompt as tokens, with its record (see `data.rows`)."""

    prompt_ids: list[int]
    record: dict[str, Any]


class PromptLoader:
    """Reads a prompt file and hands out its rows, epoch after epoch, each in a new order.

    `needs` names what every row must have for the run to make sense: `ground_truth` for a reward that
    compares, `response` for supervised training.
    """

    def __init__(
        self,
        path: str | Path,
        tokenizer: PreTrainedTokenizerBase,
        data: DataConfig,
        seed: int,
        needs: Literal["ground_truth", "response"] | None = None,
    ) -> None:
        require_chat_template(tokenizer)
        self._tokenizer, self._shuffle, self._seed = tokenizer, data.shuffle, seed
        self._file = RowFile(Path(path))
        if needs == "ground_truth":
            self._file.require("reward_model")
        elif needs == "response" and not self._file.has("messages"):
            self._file.require("response")
        self._rows = self._usable_rows(data, needs)
        self._epoch, self._position = 0, 0
        self._order = self._epoch_order()

    def __len__(self) -> int:
        """Return the number of usable rows."""
        return len(self._rows)

    def next_batch(self, num_rows: int) -> list[PromptRow]:
        """Return the next rows; past the last one a new epoch begins."""
        chosen: list[int] = []
        while len(chosen) < num_rows:
            if self._position == len(self._order):
                self._epoch, self._position = self._epoch + 1, 0
                self._order = self._epoch_order()
            part = self._order[self._position : self._position + num_rows - len(chosen)]
            self._position += len(part)
            chosen += part
        records = [self._file.record(row) for row in chosen]
        prompts = token_ids(self._tokenizer, [render(self._tokenizer, record["prompt"]) for record in records])
        return [PromptRow(ids, record) for ids, record in zip(prompts, records, strict=True)]

    def state(self) -> dict[str, int]:
        """Return the position, for a checkpoint."""
        return {"epoch": self._epoch, "position": self._position, "num_rows": len(self)}

    def load_state(self, state: dict[str, int]) -> None:
        """Take up a position again: what follows is what would have followed."""
        if state["num_rows"] != len(self):
            raise UserError(
                f"{self._file.path} has {len(self)} usable rows, but had {state['num_rows']} when the run was saved",
                "put the same data back, or start a new run",
                exit_code=PREFLIGHT,
            )
        self._epoch, self._position = state["epoch"], state["position"]
        self._order = self._epoch_order()

    def _epoch_order(self) -> list[int]:
        if not self._shuffle:
            return self._rows
        order = self._rows.copy()
        random.Random(f"{self._seed}/{self._epoch}").shuffle(order)
        return order

    def _usable_rows(self, data: DataConfig, needs: str | None) -> list[int]:
        problems: list[str] = []
        prompts: dict[int, str] = {}
        for row, record in self._file.records():
            try:
                if isinstance(record, RowError):
                    raise record
                if needs is not None and record[needs] in (None, ""):
                    raise RowError(f"no {needs}")
                prompts[row] = render(self._tokenizer, record["prompt"])
            except RowError as error:
                problems.append(f"row {row}: {error}")
        if problems:
            raise UserError(
                f"{self._file.path}: {listed(problems)}",
                "mend or remove these rows; `rlctl data check` lists them all",
                exit_code=PREFLIGHT,
            )
        return self._short_enough(self._lengths(prompts), data)

    def _lengths(self, prompts: dict[int, str]) -> dict[int, int]:
        """Return tokens per prompt, by row."""
        rows, lengths = list(prompts), {}
        for start in range(0, len(rows), CHUNK_ROWS):
            chunk = rows[start : start + CHUNK_ROWS]
            ids = token_ids(self._tokenizer, [prompts[row] for row in chunk])
            lengths |= {row: len(prompt) for row, prompt in zip(chunk, ids, strict=True)}
        return lengths

    def _short_enough(self, lengths: dict[int, int], data: DataConfig) -> list[int]:
        limit = data.max_prompt_tokens
        long = {row: length for row, length in lengths.items() if length > limit}
        if not long:
            return list(lengths)
        row, longest = max(long.items(), key=lambda item: item[1])
        what = (
            f"{self._file.path}: {len(long)} of {len(lengths)} prompts are longer than "
            f"data.max_prompt_tokens={limit}; the longest is row {row} with {longest} tokens"
        )
        if data.overlong_prompts == "error":
            remedy = f"raise data.max_prompt_tokens to {longest}, or leave them out: data.overlong_prompts=drop"
            raise UserError(what, remedy, exit_code=PREFLIGHT)
        if len(long) == len(lengths):
            raise UserError(what, f"raise data.max_prompt_tokens, to {longest} for all", exit_code=PREFLIGHT)
        log.warning("%s; they are left out (data.overlong_prompts=drop)", what)
        return [row for row in lengths if row not in long]


def supervised_rows(rows: Sequence[PromptRow], tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> Batch:
    """Return rows with their own responses, S rows of at most `max_tokens` (prompt and completion together).

    `response_ids` [S, T] is the completion with its end-of-sequence token; a longer one is cut and marked in
    `truncated` [S]. `response_mask` [S, T] is 1 on what the assistant says: in a conversation of several turns
    the other side's words lie in between with 0.
    """
    completions = [_completion(row, tokenizer) for row in rows]
    room = [max_tokens - len(row.prompt_ids) for row in rows]
    if min(room) < 1:
        raise UserError(
            f"a prompt of {max_tokens - min(room)} tokens leaves no room for its response in {max_tokens}",
            "raise rollout.max_response_tokens or lower data.max_prompt_tokens",
            exit_code=PREFLIGHT,
        )
    ids = [completion[0][:width] for completion, width in zip(completions, room, strict=True)]
    mask = [completion[1][:width] for completion, width in zip(completions, room, strict=True)]
    columns = {
        "prompt_ids": pad_rows([row.prompt_ids for row in rows], dtype=torch.long),
        "prompt_len": torch.tensor([len(row.prompt_ids) for row in rows]),
        "response_ids": pad_rows(ids, dtype=torch.long),
        "response_len": torch.tensor([len(row) for row in ids]),
        "response_mask": pad_rows(mask, dtype=torch.float32),
        "truncated": torch.tensor([len(c[0]) > w for c, w in zip(completions, room, strict=True)]).float(),
    }
    return Batch(columns, tuple(row.record for row in rows))


def _completion(row: PromptRow, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Return the tokens after the prompt and, for each, whether the assistant wrote it."""
    end = tokenizer.eos_token_id
    if not isinstance(end, int):
        raise UserError(
            f"the tokenizer of {tokenizer.name_or_path} has no end-of-sequence token",
            "set eos_token in its tokenizer_config.json, or set model.tokenizer to one that has it",
            exit_code=PREFLIGHT,
        )
    ids: list[int] = []
    mask: list[int] = []
    for text, is_assistant in _turns(row.record, tokenizer):
        turn = token_ids(tokenizer, [text])[0]
        if is_assistant:
            turn = [*turn, end]
        ids += turn
        mask += [int(is_assistant)] * len(turn)
    return ids, mask


def _turns(record: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, bool]]:
    """Return what follows the prompt as texts by turns: the assistant's words, and what the template puts between."""
    if record["response"] is None:
        raise UserError(
            "a training row has no response to learn from",
            "give the file a 'response' or 'messages' column",
            exit_code=PREFLIGHT,
        )
    messages = record.get("messages", [])
    turns = [(record["response"], True)]
    so_far = render(tokenizer, record["prompt"]) + record["response"]
    for i in range(len(record["prompt"]) + 1, len(messages)):
        if messages[i]["role"] != "assistant":
            continue
        text = render(tokenizer, messages[:i])
        if not text.startswith(so_far):
            raise UserError(
                f"the chat template of {tokenizer.name_or_path} rewrites an earlier turn of a conversation",
                "keep one assistant message in each row's 'messages'",
                exit_code=PREFLIGHT,
            )
        between = text[len(so_far) :].removeprefix(str(tokenizer.eos_token))
        turns += [(between, False), (messages[i]["content"], True)]
        so_far = text + messages[i]["content"]
    return turns
