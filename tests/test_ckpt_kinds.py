"""Hugging Face folders, adapters of PEFT, and DeepSpeed's universal checkpoints, read back bit for bit."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from rlctl_train.checkpoint.kinds import deepspeed, huggingface, peft
from rlctl_train.checkpoint.safetensors_file import DTYPES, read_safetensors
from rlctl_train.config.errors import UserError
from tests.deepspeed_files import write_universal
from tests.stored_tensors import assert_same


def some_tensors() -> dict[str, Tensor]:
    return {"a": torch.randn(5, 3), "b": torch.randn(4).bfloat16(), "empty": torch.zeros(0, 2), "c": torch.tensor(1.5)}


def write_header(path: Path, entries: Any, data: bytes = bytes(64)) -> Path:
    header = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)
    return path


def entry(begin: int, end: int, shape: list[Any] | None = None, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": [4] if shape is None else shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize("dtype", [dtype for name, dtype in DTYPES.items() if name != "F8_E8M0"], ids=str)
def test_every_dtype_of_safetensors_comes_back(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {"a": torch.arange(20).reshape(4, 5).to(dtype), "scalar": torch.ones((), dtype=dtype)}
    save_file(tensors, tmp_path / "file.safetensors", metadata={"format": "pt"})
    assert_same(read_safetensors(tmp_path / "file.safetensors"), tensors)


BAD_HEADERS: dict[str, tuple[Any, str]] = {
    "beyond the file": ({"a": entry(64, 80)}, "a ends at byte"),
    "over one another": ({"a": entry(0, 16), "b": entry(8, 24)}, "b and a lie over one another"),
    "too few bytes": ({"a": entry(0, 12)}, "a has 12 bytes, but its shape needs 16"),
    "backwards": ({"a": entry(16, 0)}, "a has -16 bytes"),
    "negative": ({"a": entry(-16, 0)}, "a shape or an offset that no tensor has"),
    "a shape of fractions": ({"a": entry(0, 16, [4.0])}, "a shape or an offset that no tensor has"),
    "an unknown dtype": ({"a": entry(0, 16, dtype="F4")}, "F4"),
    "no table": ([1, 2], "no table of tensors"),
    "no JSON": (b"{" * 9, "header makes no sense"),
    "nested too deep": (b"[" * 100_000, "header makes no sense"),
}


@pytest.mark.parametrize("case", BAD_HEADERS)
def test_safetensors_headers_that_lie_are_refused(tmp_path: Path, case: str) -> None:
    entries, message = BAD_HEADERS[case]
    with pytest.raises(UserError, match=message) as caught:
        read_safetensors(write_header(tmp_path / "bad.safetensors", entries))
    assert "bad.safetensors is damaged" in caught.value.what


@pytest.mark.parametrize("content", [b"", b"\x01", struct.pack("<Q", 2**40), struct.pack("<Q", 0) + b"{}"])
def test_files_without_a_header_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "file.safetensors").write_bytes(content)
    with pytest.raises(UserError, match="does not begin with a safetensors header"):
        read_safetensors(tmp_path / "file.safetensors")


@pytest.mark.parametrize("shard_size", ["1GB", "20KB"])
def test_a_saved_model_is_read_whole(tmp_path: Path, tiny_model: Path, shard_size: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path, max_shard_size=shard_size)
    checkpoint = huggingface.read(tmp_path)
    assert huggingface.recognise(tmp_path) is not None
    assert_same(checkpoint.tensors, dict(model.named_parameters()))
    assert checkpoint.hf_folder == tmp_path
    assert checkpoint.facts["dtype"] == "bfloat16"
    assert checkpoint.facts["architecture"] == "Qwen2ForCausalLM"
    assert (len(checkpoint.files) > 2) == (shard_size == "20KB")


def sharded(folder: Path, suffix: str = "safetensors", stem: str = "model") -> dict[str, Tensor]:
    """Write two files and an index; return the tensors."""
    tensors = some_tensors()
    halves = [{name: tensors[name] for name in names} for names in (("a", "b"), ("empty", "c"))]
    where: dict[str, str] = {}
    for number, half in enumerate(halves, 1):
        name = f"{stem}-{number:05d}-of-00002.{suffix}"
        if suffix == "bin":
            torch.save(half, folder / name)
        else:
            save_file(half, folder / name)
        where |= dict.fromkeys(half, name)
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"weight_map": where}))
    return tensors


@pytest.mark.parametrize(("suffix", "stem"), [("safetensors", "model"), ("bin", "pytorch_model")])
@pytest.mark.parametrize("with_index", [True, False])
def test_several_files_are_one_model(tmp_path: Path, suffix: str, stem: str, with_index: bool) -> None:
    tensors = sharded(tmp_path, suffix, stem)
    if not with_index:
        (tmp_path / f"{stem}.{suffix}.index.json").unlink()
    assert huggingface.recognise(tmp_path) is not None
    assert_same(huggingface.read(tmp_path).tensors, tensors)


def test_a_file_that_the_index_names_must_be_there(tmp_path: Path) -> None:
    sharded(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match=r"model-00002-of-00002\.safetensors: there is no such file"):
        huggingface.read(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    with pytest.raises(UserError, match="there are 1 of 2 weight files"):
        huggingface.read(tmp_path)


def test_a_tensor_that_the_index_names_must_be_there(tmp_path: Path) -> None:
    sharded(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    where = json.loads(index.read_text())["weight_map"] | {"lost": "model-00001-of-00002.safetensors"}
    index.write_text(json.dumps({"weight_map": where}))
    with pytest.raises(UserError, match="tensors that it names are in none of its files: lost"):
        huggingface.read(tmp_path)


def test_a_tensor_that_the_index_leaves_out_is_noted(tmp_path: Path) -> None:
    tensors = sharded(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    where = json.loads(index.read_text())["weight_map"]
    index.write_text(json.dumps({"weight_map": {name: file for name, file in where.items() if name != "a"}}))
    checkpoint = huggingface.read(tmp_path)
    assert_same(checkpoint.tensors, tensors)
    assert checkpoint.notes == ("model.safetensors.index.json leaves out tensors that are in its files: a",)


def test_a_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    sharded(tmp_path)
    save_file({"a": torch.zeros(1)}, tmp_path / "model-00002-of-00002.safetensors")
    (tmp_path / "model.safetensors.index.json").unlink()
    with pytest.raises(UserError, match="tensors that another file has too: a"):
        huggingface.read(tmp_path)


@pytest.mark.parametrize("content", ["[]", "{}", "{", '{"weight_map": {"a": 1}}', '{"weight_map": {"a": "../x"}}'])
def test_an_index_that_makes_no_sense_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(UserError, match=r"model\.safetensors\.index\.json is damaged"):
        huggingface.read(tmp_path)


def test_a_single_file_of_weights_is_a_checkpoint_too(tmp_path: Path) -> None:
    tensors = some_tensors()
    save_file(tensors, tmp_path / "x.safetensors")
    torch.save({"state_dict": tensors, "epoch": 3}, tmp_path / "x.pt")
    torch.save({**tensors, "epoch": 3}, tmp_path / "x.bin", _use_new_zipfile_serialization=False)
    notes = {"x.safetensors": (), "x.pt": ("x.pt has the weights under 'state_dict'",)}
    for name in ("x.safetensors", "x.pt", "x.bin"):
        assert huggingface.recognise(tmp_path / name) is not None
        checkpoint = huggingface.read(tmp_path / name)
        assert_same(checkpoint.tensors, tensors)
        assert checkpoint.hf_folder is None
        assert checkpoint.notes == notes.get(name, checkpoint.notes)
    assert [("memory" in note, "epoch" in note) for note in checkpoint.notes] == [(True, False), (False, True)]


@pytest.mark.parametrize("held", [[1, 2], {"a": 1}, {}])
def test_a_file_without_tensors_is_refused(tmp_path: Path, held: object) -> None:
    torch.save(held, tmp_path / "x.pt")
    with pytest.raises(UserError, match=r"in place of named tensors|it holds no tensors"):
        huggingface.read(tmp_path / "x.pt")


def test_a_folder_without_weights_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    save_file(some_tensors(), tmp_path / "adapter_model.safetensors")
    assert huggingface.recognise(tmp_path) is None
    with pytest.raises(UserError, match="there are no weights in it"):
        huggingface.read(tmp_path)


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_an_adapter_is_read_with_its_settings(tmp_path: Path, suffix: str) -> None:
    tensors = {f"base_model.model.layer.lora_{part}.weight": torch.randn(2, 2) for part in "AB"}
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": "some/model"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    if suffix == "bin":
        torch.save(tensors, tmp_path / "adapter_model.bin")
    else:
        save_file(tensors, tmp_path / "adapter_model.safetensors")
    checkpoint = peft.read(tmp_path)
    assert peft.recognise(tmp_path) is not None
    assert checkpoint.tensors == {}
    assert checkpoint.adapter is not None
    assert checkpoint.adapter.settings == settings
    assert_same(checkpoint.adapter.tensors, tensors)
    assert checkpoint.facts["base_model_name_or_path"] == "some/model"


def test_an_adapter_without_tensors_is_refused(tmp_path: Path) -> None:
    assert peft.recognise(tmp_path) is None
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"neither adapter_model\.safetensors nor adapter_model\.bin"):
        peft.read(tmp_path)


def universal(folder: Path, *, flat: bool) -> dict[str, Tensor]:
    """Write a universal checkpoint of two weights; return them."""
    weights = {"model.a.weight": torch.randn(4, 3), "model.norm.weight": torch.randn(3)}
    write_universal(folder, weights, flat=flat)
    return weights


@pytest.mark.parametrize("flat", [False, True])
def test_universal_checkpoints_are_read_with_their_moments(tmp_path: Path, flat: bool) -> None:
    weights = universal(tmp_path / "global_step5", flat=flat)
    (tmp_path / "latest_universal").write_text("global_step5")
    assert deepspeed.recognise(tmp_path) is not None
    for path in (tmp_path, tmp_path / "global_step5"):
        checkpoint = deepspeed.read(path)
        assert_same(checkpoint.tensors, weights)
        moments = {f"state.{name}.exp_avg": weight * 2 for name, weight in weights.items()}
        moments |= {f"state.{name}.exp_avg_sq": weight**2 for name, weight in weights.items()}
        moments |= {f"state.{name}.step": torch.tensor(5.0) for name in weights}
        assert_same(checkpoint.others["optimizer"], moments)
        assert checkpoint.facts["tag"] == "global_step5"


def test_flat_parameters_without_their_shapes_are_refused(tmp_path: Path) -> None:
    universal(tmp_path, flat=True)
    (tmp_path / "mp_rank_00_model_states.pt").unlink()
    with pytest.raises(UserError, match=r"tells the shapes of parameters that lie flat: model\.a\.weight"):
        deepspeed.read(tmp_path)


def test_flat_parameters_that_are_too_short_are_refused(tmp_path: Path) -> None:
    universal(tmp_path, flat=True)
    torch.save(torch.zeros(11), tmp_path / "zero" / "model.a.weight" / "fp32.pt")
    with pytest.raises(UserError, match=r"it holds 11 numbers, too few for \[4, 3\]"):
        deepspeed.read(tmp_path)


def test_partitions_of_ranks_are_refused_with_the_way_out(tmp_path: Path) -> None:
    folder = tmp_path / "global_step5"
    folder.mkdir()
    assert deepspeed.recognise(folder) is None
    torch.save({}, folder / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt")
    assert deepspeed.recognise(folder) is not None
    with pytest.raises(UserError, match="partitioned by DeepSpeed's ranks") as caught:
        deepspeed.read(folder)
    assert f"ds_to_universal --input_folder {folder}" in caught.value.remedy
    assert "zero_to_fp32.py" in caught.value.remedy


def test_whole_weights_beside_partitions_are_a_hugging_face_folder(tmp_path: Path) -> None:
    (tmp_path / "global_step5").mkdir()
    torch.save({}, tmp_path / "global_step5" / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    (tmp_path / "latest").write_text("global_step5")
    assert deepspeed.recognise(tmp_path) is not None
    save_file(some_tensors(), tmp_path / "model.safetensors")
    assert deepspeed.recognise(tmp_path) is None
    assert huggingface.recognise(tmp_path) is not None
