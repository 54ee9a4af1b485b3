"""`rlctl plan memory`: names of its document, defaults, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rlctl.app import run

LLAMA = {
    "model_type": "llama",
    "hidden_size": 2048,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 8192,
    "vocab_size": 128256,
    "tie_word_embeddings": True,
}
METRICS = ("peak", "reserved", "device", "steady")


def ask(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, dict[str, Any], str]:
    """Run the command; return its exit code, document and talk."""
    code = run(["plan", "memory", "-o", "json", *words])
    shown = capsys.readouterr()
    return code, json.loads(shown.out) if shown.out else {}, shown.err


def test_the_document_has_each_metric_as_a_number_with_its_band(capsys: pytest.CaptureFixture[str]):
    code, found, _ = ask(capsys, "--model", "qwen2.5-7b", "--gpus", "8", "--seq-len", "2048")
    assert (code, found["schema_version"], found["fits"]) == (0, 1, None)
    for name in METRICS:
        assert found[f"{name}_low_gib"] <= found[f"{name}_gib"] <= found[f"{name}_high_gib"]
        assert found["bands"][f"{name}_gib"]["high_gib"] == found[f"{name}_high_gib"]
    assert sum(part["gib"] for part in found["parts"]) == pytest.approx(found["device_gib"])
    assert found["mesh"]["dp_shard"] == 8


def test_a_config_json_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    for model in (tmp_path, tmp_path / "config.json"):
        code, found, _ = ask(capsys, "--model", str(model), "--task", "sft", "--gpu", "h100-80gb", "--seq-len", "1024")
        assert (code, found["fits"], found["verdict"]) == (0, True, "fits")


def test_what_does_not_fit_is_shown_and_exits_with_three(capsys: pytest.CaptureFixture[str]):
    code, found, talk = ask(capsys, "--model", "qwen2.5-7b", "--gpu", "rtx4090", "--gpus", "1")
    assert (code, found["fits"], found["verdict"]) == (3, False, "does not fit")
    assert "rtx4090-24gb" in talk and "optimizer" in talk and "--dp-shard" in talk


def test_a_device_inside_the_band_is_borderline_and_refused(capsys: pytest.CaptureFixture[str]):
    words = ("--model", "qwen2.5-7b", "--gpus", "8", "--recompute", "full", "--gpu", "h100-80gb")
    asked = (ask(capsys, *words, "--seq-len", str(seq_len)) for seq_len in range(8192, 65536, 1024))
    code, found, _ = next(answer for answer in asked if answer[0] != 0)
    assert (code, found["verdict"]) == (3, "borderline")
    assert found["device_low_gib"] <= found["gpu_memory_gib"] < found["device_high_gib"]


def test_tensor_parallel_fsdp2_is_sequence_parallel_until_told_otherwise(capsys: pytest.CaptureFixture[str]):
    def peak(*words: str) -> float:
        return ask(capsys, "--model", "llama-3.1-8b", "--tp", "4", *words)[1]["peak_gib"]

    assert peak() == peak("--sp") < peak("--no-sp")
    assert peak("--engine", "megatron") == peak("--engine", "megatron", "--no-sp")


def test_expert_parallelism_brings_its_ranks(capsys: pytest.CaptureFixture[str]):
    code, found, _ = ask(capsys, "--model", "qwen3-30b-a3b", "--engine", "megatron", "--ep", "8", "--tp", "2")
    assert (code, found["mesh"]["dp_shard"]) == (0, 4)


def test_types_follow_the_engine_until_they_are_given(capsys: pytest.CaptureFixture[str]):
    def states(*words: str) -> float:
        _, found, _ = ask(capsys, "--model", "llama-3.1-8b", "--task", "sft", "--recompute", "full", *words)
        return sum(part["gib"] for part in found["parts"] if part["name"] in ("weights", "gradients", "optimizer"))

    billion = 8_030_261_248 / 2**30
    assert states("--num-micro-batches", "2") == pytest.approx(16 * billion)
    assert states("--num-micro-batches", "2", "--param-dtype", "bf16") == pytest.approx(8 * billion)
    assert states("--engine", "megatron", "--gpus", "4") == pytest.approx((6 + 12 / 4) * billion, rel=1e-3)


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (("--model", "qwen2.5-7b", "--tp", "3"), "num_heads 28"),
        (
            (
                "--model",
                "qwen2.5-7bb",
            ),
            "qwen2.5-7b",
        ),
        (("--model", "none/config.json"), "config.json"),
        (("--model", "qwen2.5-7b", "--gpu", "h1000"), "h100"),
        (("--model", "qwen2.5-7b", "--gpus", "6", "--tp", "4"), "--gpus 6"),
        (("--model", "qwen2.5-7b", "--gpus", "8", "--dp-shard", "3"), "--dp-shard 3"),
        (("--model", "qwen2.5-7b", "--param-dtype", "int3"), "--param-dtype"),
    ],
)
def test_bad_input_names_the_flag_and_exits_with_two(
    words: tuple[str, ...], hint: str, capsys: pytest.CaptureFixture[str]
):
    code, found, talk = ask(capsys, *words)
    assert (code, found) == (2, {})
    assert hint in talk
    assert "->" in talk


def test_the_table_shows_parts_as_bars(capsys: pytest.CaptureFixture[str]):
    assert run(["plan", "memory", "--model", "qwen2.5-0.5b", "--task", "rollout", "--micro-batch", "64"]) == 0
    shown = capsys.readouterr().out
    assert "kv_cache" in shown and "█" in shown
