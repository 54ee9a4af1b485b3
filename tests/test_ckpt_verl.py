"""verl's FSDP checkpoints, read back bit for bit from what torch itself writes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed._mesh_layout import _MeshLayout
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from transformers import AutoModelForCausalLM

from rlctl_train.checkpoint.kinds import verl_fsdp
from rlctl_train.checkpoint.stored import Checkpoint, Contents, Part
from rlctl_train.config.errors import UserError
from tests import verl_files
from tests.stored_tensors import assert_same

LAYER = "base_model.model.model.layers.0.self_attn.q_proj"


def some_tensors(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)
    shapes = {"even": (8, 3), "uneven": (11, 2), "few_rows": (2, 5), "one": (1,), "cube": (5, 2, 3), "empty": (0, 4)}
    tensors = {name: torch.randn(shape, generator=draw).to(dtype) for name, shape in shapes.items()}
    return tensors | {"scalar": torch.tensor(7.0, dtype=dtype)}


class Small(nn.Module):
    """Layers of uneven sizes, and two names for one weight."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(7, 4)
        self.layer = nn.Linear(4, 3)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight


def contents_of_optimizer(checkpoint: Checkpoint) -> Contents:
    part = checkpoint.others["optimizer"]
    assert isinstance(part, Part)
    return part.contents


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("num_ranks", "replicas"), [(1, 1), (2, 1), (4, 1), (4, 2)])
def test_shards_of_every_layout_come_back(tmp_path: Path, dtype: torch.dtype, num_ranks: int, replicas: int) -> None:
    tensors = some_tensors(dtype)
    verl_files.write_shards(tmp_path, tensors, num_ranks=num_ranks, replicas=replicas)
    checkpoint = verl_fsdp.read(tmp_path)
    assert checkpoint.kind == "verl-fsdp"
    assert_same(checkpoint.tensors, tensors)
    assert checkpoint.facts["world_size"] == num_ranks
    assert checkpoint.facts["dtype"] == str(dtype).removeprefix("torch.")
    assert checkpoint.facts["layout"] == (f"fsdp {num_ranks}" if replicas == 1 else "ddp 2 x fsdp 2")


def test_what_fully_shard_leaves_comes_back_with_its_optimizer(tmp_path: Path) -> None:
    verl_files.write_fsdp2(tmp_path, Small)
    checkpoint = verl_fsdp.read(tmp_path)
    model = Small()
    adamw = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for parameter in model.parameters():
        parameter.grad = parameter.detach().clone()
    adamw.step()
    assert_same(checkpoint.tensors, model.state_dict())
    names = ["embed.weight", "layer.weight", "layer.bias"]
    moments = {
        f"state.{names[number]}.{part}": value
        for number, own in adamw.state_dict()["state"].items()
        for part, value in own.items()
    }
    assert_same(checkpoint.others["optimizer"], moments)
    assert contents_of_optimizer(checkpoint).facts["optimizer_lr"] == "0.001"
    assert contents_of_optimizer(checkpoint).notes == checkpoint.notes == ()


def mesh_before_2_10(mesh: DeviceMesh) -> dict[str, Any]:
    names, ranks = mesh.mesh_dim_names, torch.arange(mesh.size()).view(mesh.shape)
    return {"device_type": "cpu", "mesh": ranks, "mesh_dim_names": names, "_coordinate_on_dim": mesh.get_coordinate()}


def mesh_with_one_layout(mesh: DeviceMesh) -> dict[str, Any]:
    layout = object.__new__(_MeshLayout)
    vars(layout).update(shape=tuple(mesh.shape), stride=(2, 1))
    return {"_device_type": "cpu", "_layout": layout, "_mesh_dim_names": mesh.mesh_dim_names}


@pytest.mark.parametrize("state", [mesh_before_2_10, mesh_with_one_layout])
def test_meshes_of_other_versions_of_torch_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: Callable[[DeviceMesh], dict[str, Any]]
) -> None:
    monkeypatch.setattr(DeviceMesh, "__getstate__", state)
    tensors = some_tensors()
    checkpoint = verl_fsdp.read(verl_files.write_shards(tmp_path, tensors, num_ranks=4, replicas=2))
    assert_same(checkpoint.tensors, tensors)
    assert checkpoint.facts["layout"] == "ddp 2 x fsdp 2"


@pytest.mark.parametrize(
    "placements", [(Shard(0), Shard(0)), (Shard(0), Replicate()), (Replicate(), Partial())], ids=str
)
def test_layouts_that_are_not_fsdps_are_refused(tmp_path: Path, placements: tuple[Placement, ...]) -> None:
    for rank in range(4):
        with verl_files.being_rank(rank, 4, 2) as mesh:
            held = {"a": DTensor.from_local(torch.ones(2, 2), mesh, placements, run_check=False)}
            torch.save(held, file_of(tmp_path, rank))
    with pytest.raises(UserError, match=r"a lies as \(.*\) over a mesh .*, which cannot be joined"):
        verl_fsdp.read(tmp_path)


@pytest.mark.parametrize("held", [[torch.ones(1)], {"a": 3}])
def test_files_of_something_else_are_refused(tmp_path: Path, held: object) -> None:
    torch.save(held, file_of(tmp_path, 0, 1))
    with pytest.raises(UserError, match=r"rank_0\.pt is damaged: it holds"):
        verl_fsdp.read(tmp_path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A whole checkpoint of four ranks."""
    return verl_files.write_shards(tmp_path / "actor", some_tensors())


def file_of(folder: Path, rank: int, num_ranks: int = 4) -> Path:
    return folder / f"model_world_size_{num_ranks}_rank_{rank}.pt"


def change(file: Path, **changes: Tensor | None) -> None:
    """Rewrite a rank's file; None drops a tensor."""
    held = torch.load(file, weights_only=False) | changes
    torch.save({name: value for name, value in held.items() if value is not None}, file)


def test_a_step_or_a_whole_run_is_read_as_its_actor(tmp_path: Path) -> None:
    step = tmp_path / "run" / "global_step_20"
    verl_files.write_shards(step / "actor", {"a": torch.ones(5)}, num_ranks=2)
    critic = {"model.a": torch.zeros(5), "v_head.summary.weight": torch.ones(1, 5)}
    verl_files.write_shards(step / "critic", critic, num_ranks=2)
    (tmp_path / "run" / "latest_checkpointed_iteration.txt").write_text("20")
    for path in (tmp_path / "run", step, step / "actor"):
        assert verl_fsdp.recognise(path) is not None
        assert_same(verl_fsdp.read(path).tensors, {"a": torch.ones(5)})
    assert any("beside it lies critic" in note for note in verl_fsdp.read(step).notes)
    assert verl_fsdp.read(step).facts["step"] == "20"
    assert_same(verl_fsdp.read(step / "critic").tensors, critic)


def test_the_step_that_the_run_names_must_be_there(tmp_path: Path) -> None:
    verl_files.write_shards(tmp_path / "global_step_20" / "actor", {"a": torch.ones(5)}, num_ranks=1)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("30")
    with pytest.raises(UserError, match=r"global_step_30: .* no such folder"):
        verl_fsdp.read(tmp_path)


def test_an_empty_folder_is_none_of_verls(tmp_path: Path) -> None:
    assert verl_fsdp.recognise(tmp_path) is None


def test_missing_ranks_are_named(folder: Path) -> None:
    file_of(folder, 2).unlink()
    with pytest.raises(UserError, match="1 of 4 ranks are missing: model_world_size_4_rank_2"):
        verl_fsdp.read(folder)


def test_files_of_two_saves_are_not_mixed(folder: Path) -> None:
    verl_files.write_shards(folder, some_tensors(), num_ranks=2)
    with pytest.raises(UserError, match="files of 2 and 4 ranks"):
        verl_fsdp.read(folder)


def test_swapped_files_are_seen(folder: Path) -> None:
    shutil.copy(file_of(folder, 1), folder / "aside")
    shutil.copy(file_of(folder, 0), file_of(folder, 1))
    shutil.copy(folder / "aside", file_of(folder, 0))
    with pytest.raises(UserError, match="the file of rank 0 holds what rank 1"):
        verl_fsdp.read(folder)


def test_a_file_of_another_number_of_ranks_is_seen(tmp_path: Path) -> None:
    verl_files.write_shards(tmp_path, {"a": torch.ones(5)}, num_ranks=2)
    file_of(tmp_path, 0, 2).rename(file_of(tmp_path, 0, 1))
    file_of(tmp_path, 1, 2).unlink()
    with pytest.raises(UserError, match="mesh of 2 ranks, but named as one of 1"):
        verl_fsdp.read(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"uneven": None}, "ranks 0 and 1 hold different tensors: uneven"),
        ({"more": torch.zeros(1)}, "ranks 0 and 1 hold different tensors: more"),
        ({"even": torch.zeros(2, 3)}, "even is a DTensor on some ranks and a plain tensor on others"),
        ({"even": torch.zeros(2, 3).half()}, "ranks disagree about dtypes of even"),
    ],
)
def test_ranks_that_disagree_are_refused(folder: Path, changes: dict[str, Tensor | None], message: str) -> None:
    with verl_files.being_rank(1, 4):
        change(file_of(folder, 1), **changes)
    with pytest.raises(UserError, match=message):
        verl_fsdp.read(folder)


def test_shapes_that_disagree_are_refused(folder: Path, tmp_path: Path) -> None:
    other = some_tensors() | {"even": torch.zeros(12, 3)}
    verl_files.write_shards(tmp_path / "other", other)
    shutil.copy(file_of(tmp_path / "other", 3), file_of(folder, 3))
    with pytest.raises(UserError, match=r"ranks disagree about shapes .* of even"):
        verl_fsdp.read(folder)


def test_an_optimizer_that_cannot_be_named_keeps_its_numbers(tmp_path: Path) -> None:
    moment = torch.randn(9, 2)

    def state(_: int, mesh: DeviceMesh) -> dict[str, Any]:
        own = {"step": torch.tensor(3.0), "exp_avg": verl_files.shard(moment, mesh)}
        return {"state": {0: own}, "param_groups": [{"params": [0, 1], "lr": 0.1}]}

    checkpoint = verl_fsdp.read(verl_files.write_shards(tmp_path, {"a": torch.zeros(9, 2)}, optimizer=state))
    assert_same(checkpoint.others["optimizer"], {"state.0.step": torch.tensor(3.0), "state.0.exp_avg": moment})
    assert any("cannot be named" in note for note in contents_of_optimizer(checkpoint).notes)


def test_an_optimizer_that_names_parameters_keeps_their_names(tmp_path: Path) -> None:
    def state(_: int, mesh: DeviceMesh) -> dict[str, Any]:
        return {"state": {"a": {"exp_avg": verl_files.shard(torch.ones(9), mesh)}}, "param_groups": []}

    checkpoint = verl_fsdp.read(verl_files.write_shards(tmp_path, {"a": torch.zeros(9)}, optimizer=state))
    assert_same(checkpoint.others["optimizer"], {"state.a.exp_avg": torch.ones(9)})


def test_missing_optimizer_files_are_named(tmp_path: Path) -> None:
    verl_files.write_shards(tmp_path, {"a": torch.zeros(9)}, num_ranks=2, optimizer=lambda *_: {"state": {}})
    (tmp_path / "optim_world_size_2_rank_1.pt").unlink()
    with pytest.raises(UserError, match="1 of 2 optimizer files are missing: optim_world_size_2_rank_1"):
        len(verl_fsdp.read(tmp_path).others["optimizer"])


def test_an_optimizer_is_not_opened_for_the_weights(tmp_path: Path) -> None:
    verl_files.write_shards(tmp_path, {"a": torch.zeros(9)}, num_ranks=2, optimizer=lambda *_: {"state": {}})
    (tmp_path / "optim_world_size_2_rank_0.pt").write_bytes(b"PK\x03\x04 and nothing else")
    (tmp_path / "optim_world_size_2_rank_1.pt").unlink()
    assert_same(verl_fsdp.read(tmp_path).tensors, {"a": torch.zeros(9)})


def plain_ranks(model_folder: Path) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """Return a model's weights, and what two ranks hold: matrices cut by rows, vectors whole."""
    whole = AutoModelForCausalLM.from_pretrained(model_folder).state_dict()
    halves = {name: tensor.chunk(2) if tensor.ndim > 1 else (tensor, tensor) for name, tensor in whole.items()}
    return whole, [{name: pair[rank].clone() for name, pair in halves.items()} for rank in range(2)]


def test_plain_tensors_are_joined_as_the_models_shapes_say(tmp_path: Path, tiny_model: Path) -> None:
    whole, ranks = plain_ranks(tiny_model)
    verl_files.write_plain(tmp_path, ranks)
    shutil.copytree(tiny_model, tmp_path / "huggingface")
    checkpoint = verl_fsdp.read(tmp_path)
    assert_same(checkpoint.tensors, whole)
    assert checkpoint.hf_folder == tmp_path / "huggingface"
    assert checkpoint.facts["layout"] == "plain tensors"


def test_plain_tensors_without_a_config_are_refused(tmp_path: Path, tiny_model: Path) -> None:
    verl_files.write_plain(tmp_path, plain_ranks(tiny_model)[1])
    with pytest.raises(UserError, match="plain tensor on each of 2 ranks, and nothing says") as caught:
        verl_fsdp.read(tmp_path)
    assert "config.json" in caught.value.remedy


def test_code_that_comes_with_a_config_is_never_run(tmp_path: Path, tiny_model: Path) -> None:
    verl_files.write_plain(tmp_path, plain_ranks(tiny_model)[1])
    (tmp_path / "huggingface").mkdir()
    config = {"model_type": "mine", "auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}}
    (tmp_path / "huggingface" / "config.json").write_text(json.dumps(config))
    (tmp_path / "huggingface" / "evil.py").write_text(f"open({str(tmp_path / 'canary')!r}, 'w').close()")
    with pytest.raises(UserError, match="comes with code of its own"):
        verl_fsdp.read(tmp_path)
    assert not (tmp_path / "canary").exists()


def test_whole_tensors_that_differ_between_ranks_are_refused(tmp_path: Path, tiny_model: Path) -> None:
    _, ranks = plain_ranks(tiny_model)
    ranks[1]["model.norm.weight"] += 1
    verl_files.write_plain(tmp_path, ranks)
    shutil.copytree(tiny_model, tmp_path / "huggingface")
    with pytest.raises(UserError, match=r"every rank holds model\.norm\.weight whole, but not with the same values"):
        verl_fsdp.read(tmp_path)


def test_plain_tensors_that_make_up_no_whole_are_refused(tmp_path: Path, tiny_model: Path) -> None:
    _, ranks = plain_ranks(tiny_model)
    ranks[1]["model.embed_tokens.weight"] = ranks[1]["model.embed_tokens.weight"][1:]
    verl_files.write_plain(tmp_path, ranks)
    shutil.copytree(tiny_model, tmp_path / "huggingface")
    with pytest.raises(UserError, match=r"model\.embed_tokens\.weight should be .* but its parts have"):
        verl_fsdp.read(tmp_path)


def lora_tensors() -> dict[str, Tensor]:
    return {
        f"{LAYER}.base_layer.weight": torch.randn(6, 4),
        f"{LAYER}.lora_A.default.weight": torch.randn(2, 4),
        f"{LAYER}.lora_B.default.weight": torch.randn(6, 2),
        "base_model.model.model.norm.weight": torch.randn(4),
    }


def test_adapters_are_told_apart_from_the_weights_beside_them(tmp_path: Path) -> None:
    tensors = lora_tensors()
    checkpoint = verl_fsdp.read(verl_files.write_shards(tmp_path, tensors))
    weights = [tensors[f"{LAYER}.base_layer.weight"], tensors["base_model.model.model.norm.weight"]]
    names = ["model.layers.0.self_attn.q_proj.weight", "model.norm.weight"]
    assert_same(checkpoint.tensors, dict(zip(names, weights, strict=True)))
    assert checkpoint.adapter is not None
    adapter = {f"{LAYER}.lora_{part}.weight": tensors[f"{LAYER}.lora_{part}.default.weight"] for part in "AB"}
    assert_same(checkpoint.adapter.tensors, adapter)
    assert checkpoint.adapter.settings["r"] == 2
    assert checkpoint.adapter.settings["target_modules"] == ["q_proj"]


def test_how_strong_adapters_are_is_never_guessed(tmp_path: Path) -> None:
    checkpoint = verl_fsdp.read(verl_files.write_shards(tmp_path, lora_tensors()))
    assert checkpoint.adapter is not None and "lora_alpha" not in checkpoint.adapter.settings
    assert any("lora_alpha is not known" in note for note in checkpoint.notes)


@pytest.mark.parametrize("file", ["lora_adapter/adapter_config.json", "lora_train_meta.json"])
def test_adapter_settings_come_from_either_of_verls_files(tmp_path: Path, file: str) -> None:
    verl_files.write_shards(tmp_path, lora_tensors())
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text(json.dumps({"r": 2, "lora_alpha": 8, "task_type": "CAUSAL_LM"}))
    checkpoint = verl_fsdp.read(tmp_path)
    assert checkpoint.adapter is not None
    assert (checkpoint.adapter.settings["r"], checkpoint.adapter.settings["lora_alpha"]) == (2, 8)
    assert checkpoint.notes == ()
