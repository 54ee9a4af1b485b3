"""Checkpoints of our own runs, of one and two ranks, and torch's sharded folders of others."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from rlctl_train.checkpoint.dcp import read_dcp
from rlctl_train.checkpoint.kinds import huggingface, own
from rlctl_train.checkpoint.sharded import save_sharded
from rlctl_train.checkpoint.store import CheckpointStore
from rlctl_train.config.errors import UserError
from rlctl_train.config.layout import RunFiles
from rlctl_train.config.model import LoraConfig
from tests import runs
from tests.engine_support import make_batch, make_engine, make_model, policy_objective, weights
from tests.stored_tensors import assert_same
from tests.verl_files import shard

LORA = {"rank": 2, "alpha": 4.0, "target_modules": ["q_proj", "up_proj"]}


def make_run(root: Path, lora: dict[str, Any] | None = None, roles: tuple[str, ...] = ("actor",)) -> dict[str, Any]:
    """Make a run with the checkpoints of steps 2 and 4; return the engines as they are at the end."""
    files = runs.make_run(root, model={**runs.CONFIG["model"], "lora": lora})
    path = make_model(files.model)
    store = CheckpointStore(files.checkpoints, keep_last=2)
    config = None if lora is None else LoraConfig.model_validate(lora)
    engines = {role: make_engine(path, role=role, lora=config) for role in roles}
    for step in (2, 4):
        if "actor" in engines:
            engines["actor"].forward_backward(make_batch(), policy_objective)
            engines["actor"].optim_step()
        with store.writing(step) as folder:
            for role, engine in engines.items():
                engine.save(folder / role)
    return engines


def moments(engine: Any) -> dict[str, Tensor]:
    held = {name.replace("optim.", "state."): tensor for name, tensor in engine._optimizer.state().items()}
    return {name: tensor.detach() for name, tensor in held.items()}


def test_the_newest_step_of_a_run_is_read_with_all_that_lies_in_it(tmp_path: Path) -> None:
    engines = make_run(tmp_path / "run", roles=("actor", "critic"))
    root = tmp_path / "run"
    step = root / "checkpoints" / "step_000004"
    for path in (root, root / "checkpoints", step, step / "actor"):
        assert own.recognise(path) is not None
        checkpoint = own.read(path)
        assert_same(checkpoint.tensors, weights(engines["actor"]))
        assert_same(checkpoint.others["optimizer"], moments(engines["actor"]))
        assert set(checkpoint.others["random_state"]) == {"cpu.0"}
        assert checkpoint.hf_folder == root / "model"
        assert (checkpoint.facts["step"], checkpoint.facts["role"]) == (4, "actor")
    checkpoint = own.read(step)
    assert_same(checkpoint.others["critic"], weights(engines["critic"]))
    assert_same(checkpoint.others["critic.optimizer"], moments(engines["critic"]))
    assert_same(own.read(step / "critic").tensors, weights(engines["critic"]))


def test_an_older_step_is_read_by_its_name_and_a_broken_one_is_passed_over(tmp_path: Path) -> None:
    make_run(tmp_path / "run")
    newest = tmp_path / "run" / "checkpoints" / "step_000004"
    next(newest.glob("actor/*.distcp")).unlink()
    assert own.read(tmp_path / "run").facts["step"] == 2
    with pytest.raises(UserError, match=r"step_000004 is damaged: its files are not those that manifest\.json lists"):
        own.read(newest)


def test_a_folder_without_a_complete_step_says_so(tmp_path: Path) -> None:
    files = RunFiles(tmp_path)
    files.checkpoints.mkdir()
    assert own.recognise(tmp_path) is None
    with pytest.raises(UserError, match="there is no complete checkpoint"):
        own.read(tmp_path)


def test_adapters_come_apart_from_the_weights_that_the_run_began_with(tmp_path: Path) -> None:
    engine = make_run(tmp_path / "run", LORA)["actor"]
    engine.export(tmp_path / "hf")
    checkpoint = own.read(tmp_path / "run")
    assert checkpoint.adapter is not None
    exported = huggingface.read_weights(tmp_path / "hf" / "adapter" / "adapter_model.safetensors")[0]
    assert_same(checkpoint.adapter.tensors, {name: tensor.read() for name, tensor in exported.items()})
    settings = json.loads((tmp_path / "hf" / "adapter" / "adapter_config.json").read_text())
    assert dict(checkpoint.adapter.settings) == settings
    start = huggingface.read(tmp_path / "run" / "model").tensors
    assert_same(checkpoint.tensors, {name: tensor.read() for name, tensor in start.items()})
    assert any("only adapters are saved" in note for note in checkpoint.notes)
    assert set(checkpoint.others["base"]) == {"base"}


@pytest.mark.parametrize(
    ("model", "note"),
    [
        ({"type": "pretrained", "path": "nobody/has-this"}, "of nobody/has-this are not on this machine"),
        ({"type": "pretrained", "path": "/gone/a/b"}, "of /gone/a/b are not on this machine"),
    ],
)
def test_a_model_that_is_not_here_is_noted(tmp_path: Path, model: dict[str, Any], note: str) -> None:
    make_run(tmp_path / "run")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    (tmp_path / "run" / "config.json").write_text(json.dumps(config | {"model": model}))
    checkpoint = own.read(tmp_path / "run")
    assert checkpoint.hf_folder is None
    assert any(note in line for line in checkpoint.notes)


def test_settings_of_adapters_that_make_no_sense_are_refused(tmp_path: Path) -> None:
    make_run(tmp_path / "run")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    config["model"]["lora"] = {"rank": 0}
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"config\.json is damaged: model\.lora makes no sense"):
        own.read(tmp_path / "run")


def test_a_warm_started_run_belongs_to_what_the_warm_start_made(tmp_path: Path) -> None:
    make_run(tmp_path / "run")
    warm = RunFiles(tmp_path / "run" / "warm_start")
    make_model(warm.hf)
    assert own.read(tmp_path / "run").hf_folder == warm.hf
    (tmp_path / "run" / "checkpoints").rename(warm.checkpoints)
    assert own.read(warm.checkpoints).hf_folder == tmp_path / "run" / "model"


def test_a_step_without_its_run_is_read_all_the_same(tmp_path: Path) -> None:
    engine = make_run(tmp_path / "run")["actor"]
    (tmp_path / "run" / "checkpoints" / "step_000004").rename(tmp_path / "alone")
    checkpoint = own.read(tmp_path / "alone")
    assert_same(checkpoint.tensors, weights(engine))
    assert any("there is no run around it" in note for note in checkpoint.notes)


def sharded_tensors() -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)
    shapes = {"even": (4, 3), "uneven": (7, 2), "one_row": (1, 5), "vector": (3,)}
    tensors = {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}
    return tensors | {"half": torch.randn(5, 4, generator=draw).bfloat16(), "scalar": torch.tensor(3)}


def save_as_rank(rank: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("fsdp",))
    tensors = sharded_tensors()
    held = {name: shard(tensor, mesh) if tensor.ndim else tensor for name, tensor in tensors.items()}
    save_sharded(held, folder / "saved")
    dist.destroy_process_group()


@pytest.mark.slow
def test_shards_of_two_ranks_come_back(tmp_path: Path) -> None:
    mp.spawn(save_as_rank, (tmp_path,), nprocs=2)  # type: ignore[attr-defined]
    assert len(list((tmp_path / "saved").glob("*.distcp"))) == 2
    tensors, others = read_dcp(tmp_path / "saved")
    assert_same(tensors, sharded_tensors())
    assert others == []


def test_a_foreign_folder_keeps_its_names(tmp_path: Path) -> None:
    save_sharded({"layer.weight": torch.ones(2, 2), "optimizer.state.x": torch.zeros(2)}, tmp_path)
    assert own.recognise(tmp_path) is not None
    checkpoint = own.read(tmp_path)
    assert_same(checkpoint.tensors, {"layer.weight": torch.ones(2, 2)})
    assert_same(checkpoint.others["optimizer"], {"optimizer.state.x": torch.zeros(2)})
    assert checkpoint.facts["format"] == "torch.distributed.checkpoint"


def test_megatrons_folders_are_left_to_their_own_reader(tmp_path: Path) -> None:
    save_sharded({"a": torch.ones(2)}, tmp_path)
    (tmp_path / "metadata.json").write_text("{}")
    assert own.recognise(tmp_path) is None


def test_the_key_of_a_state_dict_is_left_out_where_it_can_be_told(tmp_path: Path) -> None:
    save_sharded({"model.model.norm.weight": torch.ones(2), "model.lm_head.weight": torch.ones(2, 2)}, tmp_path / "a")
    checkpoint = own.read(tmp_path / "a")
    assert_same(checkpoint.tensors, {"model.norm.weight": torch.ones(2), "lm_head.weight": torch.ones(2, 2)})
    assert any("further `model.`" in note for note in checkpoint.notes)
    save_sharded({"model.norm.weight": torch.ones(2)}, tmp_path / "b")
    assert_same(own.read(tmp_path / "b").tensors, {"model.norm.weight": torch.ones(2)})


def test_a_missing_or_shortened_shard_file_is_named(tmp_path: Path) -> None:
    save_sharded({"a": torch.ones(200)}, tmp_path)
    (file,) = tmp_path.glob("*.distcp")
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"__0_0\.distcp at byte 0 is damaged: it ends before"):
        own.read(tmp_path)
    file.unlink()
    with pytest.raises(UserError, match=r"__0_0\.distcp is missing, in which a lies"):
        own.read(tmp_path)


def edit_description(folder: Path, change: Any) -> None:
    path = folder / ".metadata"
    description = pickle.loads(path.read_bytes())
    change(description)
    path.write_bytes(pickle.dumps(description))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("relative_path", "../x", "refer to a file outside its folder"),
        ("transform_descriptors", ["zstd"], "be compressed"),
        ("offset", 1, "is damaged"),
    ],
)
def test_a_description_that_lies_is_refused(tmp_path: Path, field: str, value: Any, message: str) -> None:
    save_sharded({"a": torch.ones(20)}, tmp_path)

    def change(description: Any) -> None:
        (info,) = description.storage_data.values()
        setattr(info, field, value)

    edit_description(tmp_path, change)
    with pytest.raises(UserError, match=message):
        own.read(tmp_path)


def test_shards_that_make_up_no_whole_are_refused(tmp_path: Path) -> None:
    save_sharded({"a": torch.ones(20)}, tmp_path)

    def change(description: Any) -> None:
        description.state_dict_metadata["a"].size = torch.Size([21])

    edit_description(tmp_path, change)
    with pytest.raises(UserError, match=r"the shards of a do not make up \[21\]"):
        own.read(tmp_path)


@pytest.mark.parametrize(
    "data", [b"", b"\x80\x02.", b"\x80\x02K\x01.", b"\x80\x02ctorch\nSize\nX\x01\x00\x00\x00a\x85R."]
)
def test_a_description_that_makes_no_sense_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / ".metadata").write_bytes(data)
    with pytest.raises(UserError, match=r"\.metadata is damaged"):
        own.read(tmp_path)


def test_a_description_that_would_run_code_is_refused(tmp_path: Path) -> None:
    (tmp_path / ".metadata").write_bytes(b"\x80\x02cos\nsystem\nX\x0c\x00\x00\x00touch canary\x85R.")
    with pytest.raises(UserError, match=r"refused; a checkpoint may not refer to os\.system"):
        own.read(tmp_path)
