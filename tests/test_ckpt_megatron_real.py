"""Checkpoints that the real Megatron-core has saved, split in two and not, hold the model that it computed with."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from rlctl_train.checkpoint.kinds import megatron
from tests.megatron_saver import CASES, TOKENS

pytestmark = [pytest.mark.megatron, pytest.mark.slow]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("megatron")
    command = [os.environ["RLCTL_MEGATRON"], "-m", "tests.megatron_saver", str(folder)]
    subprocess.run(command, cwd=Path(__file__).parent.parent, check=True)
    return folder


def weights(folder: Path) -> dict[str, Tensor]:
    return {name: tensor.read() for name, tensor in megatron.read(folder).tensors.items()}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("ranks", ["tp1", "tp2"])
def test_the_hugging_face_model_computes_what_megatron_computed(
    saved: Path, tmp_path: Path, case: str, ranks: str
) -> None:
    save_file(weights(saved / case / ranks), tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_bytes((saved / case / ranks / "huggingface" / "config.json").read_bytes())
    load = cast(Any, AutoModelForCausalLM).from_pretrained
    model, report = load(tmp_path, dtype=torch.float32, output_loading_info=True)
    assert not any(report.values())
    with torch.no_grad():
        logits = model(TOKENS).logits
    torch.testing.assert_close(logits, torch.load(saved / case / ranks / "logits.pt"), rtol=0, atol=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_a_model_split_in_two_is_read_bit_for_bit_as_a_whole_one(saved: Path, case: str) -> None:
    torch.testing.assert_close(weights(saved / case / "tp2"), weights(saved / case / "tp1"), rtol=0, atol=0)
