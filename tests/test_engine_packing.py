"""Packing: every token once, prompts shared, budgets kept, and attention that sees sequences and nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from rlctl_train.batch import Batch, length_mask, pad_rows
from rlctl_train.engines import attention, fsdp2
from rlctl_train.engines.packing import Slots, cut, lay_out
from tests.engine_support import gradients, make_batch, make_engine, make_model, policy_objective, reference

HOST = torch.device("cpu")
CLOSE = {"rtol": 1e-4, "atol": 2e-6}


def rows(*pairs: tuple[list[int], list[int]]) -> Batch:
    """A batch of (prompt, response) rows with every response token predicted."""
    prompts, responses = zip(*pairs, strict=True)
    response_len = torch.tensor([len(r) for r in responses])
    response_ids = pad_rows(responses, dtype=torch.long)
    return Batch(
        {
            "prompt_ids": pad_rows(prompts, dtype=torch.long),
            "prompt_len": torch.tensor([len(p) for p in prompts]),
            "response_ids": response_ids,
            "response_len": response_len,
            "response_mask": length_mask(response_len, response_ids.shape[1]),
        }
    )


def test_a_shared_prompt_is_read_once_and_last_tokens_not_at_all() -> None:
    batch = rows(([1, 2], [10, 11, 12]), ([1, 2], [20]), ([3], [30, 31]))
    asked = lay_out(batch, packed=True, dense_slots=False, device=HOST)
    assert asked.tokens.tolist() == [1, 2, 3, 10, 11, 30]
    assert asked.positions.tolist() == [0, 1, 0, 2, 3, 1]
    assert asked.predictors.tolist() == [1, 3, 4, 1, 2, 5]
    assert asked.targets.tolist() == [10, 11, 12, 20, 30, 31]
    assert asked.places.tolist() == [0, 1, 2, 3, 6, 7]


def test_padded_rows_are_read_as_they_lie() -> None:
    batch = rows(([1, 2], [10, 11]), ([3], [30]))
    asked = lay_out(batch, packed=False, dense_slots=True, device=HOST)
    assert asked.tokens.view(2, 3)[0].tolist() == [1, 2, 10]
    assert asked.slots.spread is None and asked.slots.bounds is None
    assert asked.predictors.tolist() == [1, 2, 3]


def test_dense_slots_hold_each_sequence_end_to_end() -> None:
    batch = rows(([1, 2], [10, 11]), ([1, 2], [20]), ([3], [30]))
    slots = lay_out(batch, packed=True, dense_slots=True, device=HOST).slots
    assert slots.bounds is not None and slots.bounds.tolist() == [0, 3, 5, 6]
    assert slots.spread is not None and slots.spread.tolist() == [0, 1, 3, 0, 1, 2]
    assert slots.collect is not None and slots.collect.tolist() == [0, 1, 5, 2]


def test_one_sequence_needs_no_slots_of_its_own() -> None:
    slots = lay_out(rows(([1, 2], [3, 4])), packed=True, dense_slots=True, device=HOST).slots
    assert slots.spread is None and slots.collect is None


def test_responses_to_one_prompt_travel_together() -> None:
    batch = rows(*(([prompt], [5, 6, 7]) for prompt in (1, 2, 1, 2)))
    parts = cut(batch, 6, 1, packed=True, workload=float)
    assert sorted(map(sorted, parts)) == [[0, 2], [1, 3]]


RESPONSES = st.lists(st.integers(4, 9), min_size=1, max_size=9)
PAIRS = st.lists(st.tuples(st.sampled_from([[1], [2, 2], [3, 3, 3]]), RESPONSES), min_size=1)


@given(PAIRS, st.integers(12, 40), st.integers(1, 4), st.booleans())
def test_every_row_is_in_one_pass_within_the_budget(
    pairs: list[tuple[list[int], list[int]]], budget: int, min_parts: int, packed: bool
) -> None:
    batch = rows(*pairs)
    parts = cut(batch, budget, min_parts, packed=packed, workload=float)
    assert len(parts) >= min_parts
    assert sorted(i for part in parts for i in part) == list(range(len(batch)))
    for part in parts:
        if part:
            asked = lay_out(batch.rows(part), packed=packed, dense_slots=False, device=HOST)
            assert len(asked.tokens) <= budget


def _sequence_by_sequence(
    query: Tensor, key: Tensor, value: Tensor, slots: Slots, scale: float | None, window: int | None
) -> Tensor:
    """What attention over dense slots computes, without a GPU."""
    assert slots.bounds is not None and window is None
    sizes = slots.bounds.diff().tolist()
    parts = zip(*(tensor.transpose(0, 1).split(sizes, 1) for tensor in (query, key, value)), strict=True)
    outs = [scaled_dot_product_attention(*part, is_causal=True, scale=scale, enable_gqa=True) for part in parts]
    return torch.cat(outs, 1).transpose(0, 1)


def test_dense_slots_give_the_same_gradients(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, batch = make_model(tmp_path), make_batch()
    monkeypatch.setattr(attention, "_attend_dense", _sequence_by_sequence)
    monkeypatch.setattr(fsdp2, "has_varlen_attention", lambda *_: True)
    engine = make_engine(path, max_tokens_per_micro_batch=50)
    engine.forward_backward(batch, policy_objective)
    torch.testing.assert_close(gradients(engine), reference(path, batch, 1.0)[3], **CLOSE)


@pytest.mark.parametrize("fused", [True, False])
def test_a_sliding_window_is_the_one_of_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fused: bool
) -> None:
    path, batch = make_model(tmp_path), make_batch()
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"sliding_window": 3, "use_sliding_window": True, "layer_types": ["full_attention", "sliding_attention"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    if not fused:
        monkeypatch.setattr("rlctl_train.engines.models.fuse", lambda lm: None)
    engine = make_engine(path)
    engine.forward_backward(batch, policy_objective)
    torch.testing.assert_close(gradients(engine), reference(path, batch, 1.0)[3], **CLOSE)
