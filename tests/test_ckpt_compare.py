"""Comparing checkpoints: bits, numbers, NaN, names, whatever pieces they lie in."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rlctl_train.checkpoint.compare import Comparison, compare, is_equal
from tests.stored_checkpoints import in_files


def compared(tmp_path: Path, a: dict[str, Tensor], b: dict[str, Tensor], **tolerance: float) -> Comparison:
    return compare(in_files(tmp_path / "a", a, 2), in_files(tmp_path / "b", b, 3), **tolerance)


def test_equal_tensors_are_bit_equal_however_they_are_cut(tmp_path: Path) -> None:
    tensor = torch.randn(999, 701)
    tensor[5, 5] = math.nan
    found = compared(tmp_path, {"x": tensor}, {"x": tensor})
    assert found.tensors[0].bit_equal and found.within


def test_differences_are_those_of_whole_tensors(tmp_path: Path) -> None:
    a, b = torch.randn(700, 700, dtype=torch.float64), torch.randn(700, 700, dtype=torch.float64)
    (one,) = compared(tmp_path, {"x": a}, {"x": b}, atol=0.5).tensors
    apart = (a - b).abs()
    assert one.max_abs == float(apart.max()) and one.mean_abs == pytest.approx(float(apart.mean()))
    assert one.max_rel == pytest.approx(float((apart / torch.maximum(a.abs(), b.abs())).max()))
    assert one.num_beyond == int((apart > 0.5).sum()) and not one.bit_equal


def test_the_worst_come_first_and_shapes_before_all(tmp_path: Path) -> None:
    a = {"equal": torch.ones(2), "near": torch.ones(2), "far": torch.ones(2), "shape": torch.ones(2)}
    b = a | {"near": torch.ones(2) + 0.1, "far": torch.ones(2) + 5, "shape": torch.ones(3)}
    found = compared(tmp_path, a, b)
    assert [one.name for one in found.tensors] == ["shape", "far", "near", "equal"] and not found.within


def test_names_of_one_side_alone_are_told(tmp_path: Path) -> None:
    found = compared(tmp_path, {"x": torch.ones(1), "a": torch.ones(1)}, {"x": torch.ones(1), "b": torch.ones(1)})
    assert (found.only_a, found.only_b) == (("a",), ("b",)) and not found.within


@pytest.mark.parametrize(
    ("x", "y", "apart"),
    [
        (math.nan, math.nan, 0.0), (math.nan, 1.0, math.inf), (1.0, math.nan, math.inf), (math.inf, math.inf, 0.0),
        (math.inf, -math.inf, math.inf), (1.0, math.inf, math.inf), (0.0, -0.0, 0.0), (1.0, 3.0, 2.0),
    ],
)  # fmt: skip
def test_strange_numbers_count_as_they_should(tmp_path: Path, x: float, y: float, apart: float) -> None:
    found = compared(tmp_path, {"x": torch.tensor([0.5, x])}, {"x": torch.tensor([0.5, y])}, rtol=0.1)
    assert found.tensors[0].max_abs == apart and found.within == (apart == 0)


def test_zeros_of_either_sign_are_not_bit_equal(tmp_path: Path) -> None:
    assert not compared(tmp_path, {"x": torch.zeros(2)}, {"x": -torch.zeros(2)}).tensors[0].bit_equal


def test_a_tolerance_decides_and_lets_dtypes_differ(tmp_path: Path) -> None:
    a, b = {"x": torch.tensor([1.0, 100.0])}, {"x": torch.tensor([1.0, 100.0]).bfloat16()}
    assert not compared(tmp_path, a, b).within
    assert compared(tmp_path, a, b, atol=1e-6).within
    c = {"x": torch.tensor([1.0, 101.0])}
    assert compared(tmp_path, a, c, rtol=0.01).within and not compared(tmp_path, a, c, rtol=0.009).within


def test_equality_stops_at_dtype_and_shape(tmp_path: Path) -> None:
    stored = in_files(tmp_path, {"a": torch.zeros(4), "b": torch.zeros(2, 2), "c": torch.zeros(4).int()})
    assert is_equal(stored["a"], stored["a"])
    assert not is_equal(stored["a"], stored["b"]) and not is_equal(stored["a"], stored["c"])


def test_integers_numbers_and_empty_tensors_compare(tmp_path: Path) -> None:
    a = {
        "int": torch.tensor([1, 2]),
        "number": torch.tensor(3.0),
        "empty": torch.empty(0, 4),
        "flag": torch.ones(2) > 0,
    }
    assert compared(tmp_path, a, a).within
    assert compared(tmp_path, a, a | {"int": torch.tensor([1, 4])}).tensors[0].max_abs == 2
