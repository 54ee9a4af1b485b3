"""Sharded checkpoints and exported folders of one process, without a process group."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlctl_train.checkpoint.sharded import load_sharded, save_sharded, stored_names
from rlctl_train.config.errors import UserError
from rlctl_train.engines import export
from tests.engine_support import make_batch, make_engine, make_model, policy_objective, value_objective, weights


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def own_group() -> Iterator[None]:
    """Take down the process group that mixed precision brings up for itself."""
    yield
    dist.destroy_process_group()


def step(engine, num_steps: int = 1) -> list[float]:  # type: ignore[no-untyped-def]
    losses = []
    for _ in range(num_steps):
        losses.append(engine.forward_backward(make_batch(), policy_objective)["loss"])
        engine.optim_step()
    return losses


def test_tensors_of_every_shape_come_back(tmp_path: Path) -> None:
    saved = {"a": torch.randn(3, 4), "b": torch.tensor(7), "c": torch.arange(5, dtype=torch.uint8)}
    save_sharded(saved, tmp_path)
    loaded = {name: torch.zeros_like(tensor) for name, tensor in saved.items()}
    load_sharded(loaded, tmp_path)
    torch.testing.assert_close(loaded, saved, rtol=0, atol=0)
    assert stored_names(tmp_path) == set(saved)


def test_a_tensor_the_checkpoint_lacks_is_named(tmp_path: Path) -> None:
    save_sharded({"a": torch.zeros(1)}, tmp_path)
    with pytest.raises(UserError, match="lacks 1 tensors, among them 'b'"):
        load_sharded({"a": torch.zeros(1), "b": torch.zeros(1)}, tmp_path)


class Evil:
    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, ("owned",)


@pytest.mark.parametrize("protocol", [2, 5])
def test_a_checkpoint_that_would_run_code_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, protocol: int
) -> None:
    monkeypatch.chdir(tmp_path)
    save_sharded({"a": torch.zeros(1)}, tmp_path)
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Evil(), protocol=protocol))
    with pytest.raises(pickle.UnpicklingError, match=r"may not refer to posix\.mkdir"):
        load_sharded({"a": torch.zeros(1)}, tmp_path)
    assert not (tmp_path / "owned").exists()


def test_a_resumed_engine_repeats_the_uninterrupted_one_bit_for_bit(path: str, tmp_path: Path) -> None:
    engine = make_engine(path)
    step(engine, 3)
    engine.save(tmp_path)
    draws = torch.rand(3)
    losses = step(engine, 3)
    resumed = make_engine(path)
    resumed.load(tmp_path)
    assert torch.equal(torch.rand(3), draws)
    assert step(resumed, 3) == losses
    torch.testing.assert_close(weights(resumed), weights(engine), rtol=0, atol=0)


def test_saving_while_offloaded_saves_everything(path: str, tmp_path: Path) -> None:
    engine = make_engine(path, offload_params=True, offload_optimizer=True)
    step(engine)
    engine.offload()
    engine.save(tmp_path)
    again = make_engine(path, offload_params=True, offload_optimizer=True)
    again.offload()
    again.load(tmp_path)
    engine.onload()
    again.onload()
    assert step(again, 2) == step(engine, 2)


def test_mixed_precision_on_one_rank_saves_what_single_precision_loads(
    path: str, tmp_path: Path, own_group: None
) -> None:
    half = make_engine(path, compute_dtype="bfloat16", offload_params=True, offload_optimizer=True)
    step(half)
    half.offload()
    half.onload()
    step(half)
    half.save(tmp_path)
    single = make_engine(path)
    single.load(tmp_path)
    assert {tensor.dtype for tensor in weights(half).values()} == {torch.float32}
    torch.testing.assert_close(weights(single), weights(half), rtol=0, atol=0)


def test_a_reference_saves_and_loads_weights_alone(path: str, tmp_path: Path) -> None:
    make_engine(path).save(tmp_path)
    reference = make_engine(path, role="reference", optim=None)
    reference.load(tmp_path)
    torch.testing.assert_close(weights(reference), weights(make_engine(path)), rtol=0, atol=0)


def test_an_exported_folder_is_a_whole_model(path: str, tmp_path: Path) -> None:
    engine = make_engine(path)
    step(engine)
    engine.export(tmp_path / "hf")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    torch.testing.assert_close(dict(model.named_parameters()), weights(engine), rtol=0, atol=0, check_stride=False)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(path).chat_template
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert model.config.architectures == ["Qwen2ForCausalLM"]


def test_a_model_without_a_tokenizer_is_exported_with_the_one_that_is_named(path: str, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(path).save_pretrained(tmp_path / "bare")
    make_engine(str(tmp_path / "bare")).export(tmp_path / "hf", tokenizer=path)
    assert AutoTokenizer.from_pretrained(tmp_path / "hf").chat_template is not None


def test_export_replaces_an_older_folder_and_leaves_nothing_else(path: str, tmp_path: Path) -> None:
    engine = make_engine(path)
    engine.export(tmp_path / "hf")
    (tmp_path / "hf" / "stale").touch()
    step(engine)
    engine.export(tmp_path / "hf")
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]
    assert not (tmp_path / "hf" / "stale").exists()
    torch.testing.assert_close(weights(make_engine(str(tmp_path / "hf"))), weights(engine), rtol=0, atol=0)


def test_export_keeps_the_dtype_the_model_came_with(path: str, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).save_pretrained(tmp_path / "half")
    AutoTokenizer.from_pretrained(path).save_pretrained(tmp_path / "half")
    make_engine(str(tmp_path / "half")).export(tmp_path / "hf")
    assert {t.dtype for t in load_file(tmp_path / "hf" / "model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["dtype"] == "bfloat16"


def test_a_large_model_is_written_in_several_files(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "FILE_BYTES", 20_000)
    engine = make_engine(path)
    engine.export(tmp_path / "hf")
    assert len(list((tmp_path / "hf").glob("model-*-of-*.safetensors"))) > 1
    torch.testing.assert_close(weights(make_engine(str(tmp_path / "hf"))), weights(engine), rtol=0, atol=0)


def test_an_exported_critic_keeps_its_value_head(path: str, tmp_path: Path) -> None:
    critic = make_engine(path, role="critic")
    critic.forward_backward(make_batch(), value_objective)
    critic.optim_step()
    critic.export(tmp_path / "hf")
    again = make_engine(str(tmp_path / "hf"), role="critic")
    torch.testing.assert_close(again.values(make_batch()), critic.values(make_batch()), rtol=0, atol=0)
