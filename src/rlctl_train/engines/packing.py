"""Lay rows of a batch out for one pass of the model, and cut a batch into passes under a token budget.

Letters: S rows (sequences), T padded response length, N tokens of the pass, L longest row, M attention slots,
R predicted tokens.

A pass holds every token once: no padding, responses to the same prompt share its tokens, and tokens after the last
predicted one are left out, for nothing depends on them. Only attention sees sequences; `Slots` says where their
tokens are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rlctl_train.batch import Batch
from rlctl_train.data.balance import micro_batches

SLOT_STEP = 16
"""Padded slots are a multiple of this long: attention kernels on CPU take half the time of the length before it."""


@dataclass(frozen=True)
class Slots:
    """Sequences as attention takes them: one slot per token of each sequence, so a shared token has several."""

    num_sequences: int
    longest: int
    """L, in tokens."""
    bounds: Tensor | None
    """[S + 1] first slot of each sequence, int32; None where slots are padded on the right to [S, L]."""
    spread: Tensor | None
    """[M] the token in each slot (any, where the slot is padding); None where slots and tokens are the same."""
    collect: Tensor | None
    """[N] a slot of each token; None where slots and tokens are the same."""


@dataclass(frozen=True)
class Pass:
    """What the model reads in one pass, and what it is asked."""

    tokens: Tensor
    """[N] token ids."""
    positions: Tensor
    """[N] position of each token in its sequence."""
    slots: Slots
    predictors: Tensor
    """[R] the token from whose output each answer is read."""
    targets: Tensor
    """[R] token ids that are predicted."""
    places: Tensor
    """[R] where each answer belongs in a flattened [S, T]."""
    ref_full_logp: Tensor | None = None
    """[R, V] what a reference says of every token of the vocabulary, on the host; None where nobody compares."""


def lay_out(batch: Batch, *, packed: bool, dense_slots: bool, device: torch.device) -> Pass:
    """Lay all rows of `batch` out for one pass.

    `packed` holds every token once; otherwise rows are padded to the longest and nothing is shared. `dense_slots`
    gives attention slots without padding (packed passes only).
    """
    predicted = batch["response_mask"] > 0
    lengths = batch["prompt_len"] + _read_len(predicted)
    grid = _packed_grid(batch, lengths) if packed else _padded_grid(lengths)
    held = grid >= 0
    num_tokens = int(grid.max()) + 1
    tokens, positions = torch.zeros(num_tokens, dtype=torch.long), torch.zeros(num_tokens, dtype=torch.long)
    tokens[grid[held]] = _ids(batch, grid.shape[1])[held]
    positions[grid[held]] = torch.arange(grid.shape[1]).expand_as(grid)[held]
    row, step = predicted.nonzero(as_tuple=True)
    predictors = grid[row, batch["prompt_len"][row] + step - 1]
    return Pass(
        tokens=tokens.to(device),
        positions=positions.to(device),
        slots=_slots(grid, lengths, dense=dense_slots and packed, device=device),
        predictors=predictors.to(device),
        targets=batch["response_ids"][predicted].to(device),
        places=predicted.flatten().nonzero().squeeze(1).to(device),
    )


def cut(
    batch: Batch, budget_tokens: int, min_parts: int, *, packed: bool, workload: Callable[[int], float]
) -> list[list[int]]:
    """Cut rows into passes of at most `budget_tokens` tokens each (a longer row goes alone), evenly loaded.

    Packed, rows with the same prompt stay together where they fit; padded, rows of similar length do. `workload`
    gives the operations of a row from its length in tokens. Returns at least `min_parts` lists, some may be empty.
    """
    lengths = (batch["prompt_len"] + _read_len(batch["response_mask"] > 0)).tolist()
    if not packed:
        parts = _cut_padded(lengths, budget_tokens)
        return parts + [[]] * (min_parts - len(parts))
    units = _units(batch, lengths, budget_tokens)
    prompt_len = batch["prompt_len"].tolist()
    tokens = [prompt_len[unit[0]] + sum(lengths[i] - prompt_len[i] for i in unit) for unit in units]
    loads = [sum(workload(lengths[i]) for i in unit) for unit in units]
    parts = micro_batches(tokens, budget_tokens, min_parts, loads)
    return [[i for unit in part for i in units[unit]] for part in parts]


def _read_len(predicted: Tensor) -> Tensor:
    """Return [S] how many response tokens the model reads: those before the last predicted one."""
    column = torch.arange(predicted.shape[1])
    return torch.where(predicted, column, 0).amax(1)


def _packed_grid(batch: Batch, lengths: Tensor) -> Tensor:
    """Return [S, L] the token at each place of each row, -1 on padding: distinct prompts first, then responses."""
    prompt_len, (prompt_of_row, first_rows) = batch["prompt_len"], _distinct_prompts(batch)
    distinct_len = prompt_len[first_rows]
    prompt_start = (distinct_len.cumsum(0) - distinct_len)[prompt_of_row]
    read_len = lengths - prompt_len
    response_start = distinct_len.sum() + read_len.cumsum(0) - read_len
    column = torch.arange(math.ceil(int(lengths.max()) / SLOT_STEP) * SLOT_STEP)
    in_prompt = column < prompt_len[:, None]
    token = torch.where(in_prompt, prompt_start[:, None], (response_start - prompt_len)[:, None]) + column
    return torch.where(column < lengths[:, None], token, -1)


def _padded_grid(lengths: Tensor) -> Tensor:
    """Return [S, L] row after row; tokens of the padding are read like any other and answer nothing."""
    longest = int(lengths.max())
    return torch.arange(len(lengths) * longest).view(len(lengths), longest)


def _ids(batch: Batch, longest: int) -> Tensor:
    """Return [S, L] token ids: the prompt, then the response, then whatever pads it."""
    prompt_len, width = batch["prompt_len"][:, None], batch["prompt_ids"].shape[1]
    column = torch.arange(longest).expand(len(batch), longest)
    source = torch.where(column < prompt_len, column, column - prompt_len + width)
    joined = torch.cat([batch["prompt_ids"], batch["response_ids"]], 1)
    return joined.gather(1, source.clamp(max=joined.shape[1] - 1))


def _slots(grid: Tensor, lengths: Tensor, *, dense: bool, device: torch.device) -> Slots:
    num_rows, longest = grid.shape
    bounds = None
    if dense:
        token_of_slot = grid[grid >= 0]
        bounds = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(device, torch.int32)
    else:
        token_of_slot = grid.flatten()
    num_slots, num_tokens = len(token_of_slot), int(grid.max()) + 1
    if torch.equal(token_of_slot, torch.arange(num_tokens)):
        return Slots(num_rows, longest, bounds, None, None)
    held = token_of_slot >= 0
    slot_of_token = torch.zeros(num_tokens, dtype=torch.long).scatter_reduce_(
        0, token_of_slot[held], torch.arange(num_slots)[held], "amin", include_self=False
    )
    return Slots(num_rows, longest, bounds, token_of_slot.clamp(min=0).to(device), slot_of_token.to(device))


def _distinct_prompts(batch: Batch) -> tuple[list[int], list[int]]:
    """Return each row's prompt among the distinct ones [S], and the first row of each distinct prompt."""
    number: dict[bytes, int] = {}
    prompt_of_row, first_rows = [], []
    for i, (ids, length) in enumerate(zip(batch["prompt_ids"].numpy(), batch["prompt_len"].tolist(), strict=True)):
        key = ids[:length].tobytes()
        if key not in number:
            number[key] = len(number)
            first_rows.append(i)
        prompt_of_row.append(number[key])
    return prompt_of_row, first_rows


def _units(batch: Batch, lengths: Sequence[int], budget_tokens: int) -> list[list[int]]:
    """Group rows by prompt, and begin a new unit where the budget is full."""
    prompt_of_row, _ = _distinct_prompts(batch)
    prompt_len = batch["prompt_len"].tolist()
    units: list[list[int]] = []
    open_unit: dict[int, tuple[list[int], int]] = {}
    for i, prompt in enumerate(prompt_of_row):
        unit, used = open_unit.get(prompt, ([], 0))
        extra = lengths[i] - prompt_len[i]
        if not unit or used + extra > budget_tokens:
            unit, used = [], prompt_len[i]
            units.append(unit)
        unit.append(i)
        open_unit[prompt] = unit, used + extra
    return units


def _cut_padded(lengths: Sequence[int], budget_tokens: int) -> list[list[int]]:
    parts: list[list[int]] = []
    longest = 0
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if not parts or (len(parts[-1]) + 1) * longest > budget_tokens:
            parts.append([])
            longest = lengths[i]
        parts[-1].append(i)
    return parts
