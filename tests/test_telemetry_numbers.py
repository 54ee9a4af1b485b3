"""Metrics of a batch, and the glossary that knows every name."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import torch

from rlctl_train.batch import Batch
from rlctl_train.telemetry.batch_metrics import batch_metrics
from rlctl_train.telemetry.glossary import GLOSSARY, describe

SOURCE = Path(__file__).parent.parent / "src" / "rlctl_train"
ROOMS = "actor|critic|health|perf|prompt_length|response_length|reward|timing_s|train|training|val|val-core"
METRIC_NAME = re.compile(rf"(?:{ROOMS})/[\w@{{}}/-]+")


def sample_batch() -> Batch:
    return Batch(
        {
            "response_mask": torch.tensor([[1.0, 1.0], [1.0, 0.0]]),
            "score": torch.tensor([1.0, 0.0]),
            "rewards": torch.tensor([[0.5, 0.5], [-1.0, 99.0]]),
            "advantages": torch.tensor([[1.0, 2.0], [-3.0, 99.0]]),
            "returns": torch.tensor([[1.0, 2.0], [3.0, 99.0]]),
            "values": torch.tensor([[1.0, 2.0], [4.0, -99.0]]),
            "prompt_len": torch.tensor([3, 5]),
            "response_len": torch.tensor([2, 1]),
            "truncated": torch.tensor([1, 0]),
        }
    )


def test_batch_metrics_read_response_tokens_and_nothing_else() -> None:
    metrics = batch_metrics(sample_batch())
    assert metrics["critic/rewards/max"] == 1.0 and metrics["critic/rewards/min"] == -1.0
    assert metrics["critic/advantages/mean"] == 0.0 and metrics["critic/advantages/min"] == -3.0
    assert metrics["critic/values/max"] == 4.0
    assert metrics["prompt_length/mean"] == 4.0
    assert metrics["response_length/clip_ratio"] == 0.5
    assert metrics["critic/score/mean"] == 0.5


def test_explained_variance_is_one_minus_the_unexplained_share() -> None:
    returns, values = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 2.0, 4.0])
    expected = 1 - (returns - values).var(correction=0) / returns.var(correction=0)
    assert batch_metrics(sample_batch())["critic/vf_explained_var"] == pytest.approx(float(expected))


def test_equal_returns_give_a_finite_explained_variance() -> None:
    batch = sample_batch().with_columns(returns=torch.ones(2, 2))
    assert batch_metrics(batch)["critic/vf_explained_var"] == 0.0


@pytest.mark.parametrize(
    ("seconds", "share"), [([1.0] * 19 + [4.0], 0.75), ([2.0, 2.0], 0.0), ([1.0, 4.0], 0.0), ([0.0], None)]
)
def test_the_tail_is_the_time_in_which_at_most_a_twentieth_of_the_sequences_go_on(
    seconds: list[float], share: float | None
) -> None:
    assert batch_metrics(Batch({"seconds": torch.tensor(seconds)})).get("perf/tail_share") == share


def test_only_columns_that_are_there_are_reported() -> None:
    batch = Batch({"score": torch.tensor([2.0])})
    assert batch_metrics(batch) == {f"critic/score/{how}": 2.0 for how in ("mean", "max", "min")}


def test_a_batch_without_response_tokens_gives_no_token_metrics() -> None:
    batch = Batch({"response_mask": torch.zeros(1, 2), "values": torch.ones(1, 2), "returns": torch.ones(1, 2)})
    assert batch_metrics(batch) == {"critic/vf_explained_var": 0.0}


def test_the_glossary_knows_every_batch_metric() -> None:
    for name in batch_metrics(sample_batch()):
        assert describe(name).text


def test_describe_understands_placeholders_alternatives_and_the_warm_start() -> None:
    assert describe("val-core/openai/acc/mean@8").unit == "ratio"
    assert describe("warm_start/train/loss") is describe("train/loss")
    for name in ("critic/score/median", "val-core/a/b/acc/mean@1", "actor/lr2"):
        with pytest.raises(KeyError, match=name):
            describe(name)


def test_every_metric_name_written_in_the_library_is_in_the_glossary() -> None:
    names = {name for file in SOURCE.rglob("*.py") for name in metric_names(file)}
    unknown = sorted(name for name in names if not known(name))
    assert len(names) > 20
    assert not unknown


def test_no_name_stands_in_the_glossary_twice() -> None:
    names = [entry.name for entry in GLOSSARY]
    assert len(names) == len(set(names))


def metric_names(file: Path) -> list[str]:
    """Return the metric names among a file's strings; the variable parts of f-strings become `{}`."""
    found = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.JoinedStr):
            parts = [part.value if isinstance(part, ast.Constant) else "{}" for part in node.values]
            found.append("".join(map(str, parts)))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append(node.value)
    return [text for text in found if METRIC_NAME.fullmatch(text) and not text.endswith("/")]


def known(name: str) -> bool:
    """Return whether the glossary has the name (any word in place of its variable parts), or a family of that name."""
    pattern = re.compile(re.escape(name).replace(r"\{\}", r"[^ ]+") + r"(?:/\{.*)?")
    return any(pattern.fullmatch(entry.name) for entry in GLOSSARY) or describes(name)


def describes(name: str) -> bool:
    try:
        describe(name)
    except KeyError:
        return False
    return True
