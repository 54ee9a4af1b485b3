"""Megatron-core's checkpoints read as Hugging Face weights: exact for every family, and nothing in them is run."""

from __future__ import annotations

import functools
import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, WriteItem, WriteItemType
from torch.distributed.checkpoint.state_dict_saver import save

from rlctl_train.checkpoint.kinds import megatron
from rlctl_train.checkpoint.stored import Checkpoint, Part, StoredTensor
from rlctl_train.config.errors import UserError
from tests.mcore_files import FAMILIES, HfModel, hf_model, mcore_weights, megatron_lm_arguments, write_checkpoint

made = functools.cache(hf_model)


def read_exactly(checkpoint: Checkpoint, weights: dict[str, Tensor]) -> None:
    assert set(checkpoint.tensors) == set(weights)
    for name, tensor in checkpoint.tensors.items():
        assert tensor.name == name and tensor.dtype == weights[name].dtype and tensor.shape == weights[name].shape
        assert torch.equal(tensor.read(), weights[name]), name
        assert torch.equal(torch.cat([chunk.clone() for chunk in tensor.chunks(64)]), weights[name].flatten()), name


def write_qwen2(folder: Path, **changes: Tensor) -> HfModel:
    model = made("qwen2")
    write_checkpoint(folder, mcore_weights(model) | changes, config=model.config)
    return model


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("apart", [False, True], ids=["stacked", "apart"])
@pytest.mark.parametrize("tensor_parallel", [1, 2])
def test_every_family_is_read_exactly(tmp_path: Path, family: str, apart: bool, tensor_parallel: int) -> None:
    model = made(family)
    tensors = mcore_weights(model, apart=apart)
    write_checkpoint(tmp_path / "actor", tensors, config=model.config, tensor_parallel=tensor_parallel)
    checkpoint = megatron.read(tmp_path / "actor")
    read_exactly(checkpoint, model.weights)
    assert checkpoint.hf_folder == tmp_path / "actor" / "huggingface"
    assert all(isinstance(tensor, StoredTensor) for tensor in checkpoint.tensors.values())


def test_half_precision_is_read_as_it_is_stored(tmp_path: Path) -> None:
    model = made("qwen2")
    half = {name: tensor.bfloat16() for name, tensor in mcore_weights(model).items()}
    write_checkpoint(tmp_path, half, config=model.config, tensor_parallel=2)
    read_exactly(megatron.read(tmp_path), {name: tensor.bfloat16() for name, tensor in model.weights.items()})


def test_one_layer_is_read_without_the_others(tmp_path: Path) -> None:
    write_qwen2(tmp_path)
    key = megatron.read(tmp_path).tensors["model.layers.1.self_attn.k_proj.weight"]
    assert isinstance(key, StoredTensor)
    assert sum(piece.size for piece in key.pieces) == 8 * 16


def test_a_padded_vocabulary_is_left_padded(tmp_path: Path) -> None:
    padded = torch.cat([made("qwen2").weights["model.embed_tokens.weight"], torch.zeros(8, 16)])
    write_qwen2(tmp_path, **{"embedding.word_embeddings.weight": padded})
    assert torch.equal(megatron.read(tmp_path).tensors["model.embed_tokens.weight"].read(), padded)


def test_a_critic_has_a_value_head(tmp_path: Path) -> None:
    head = torch.randn(1, 16)
    write_qwen2(tmp_path, **{"output_layer.weight": head})
    assert torch.equal(megatron.read(tmp_path).tensors["score.weight"].read(), head)


@pytest.mark.parametrize("folder", ["actor", "actor/model", "model", "."])
def test_the_weights_are_found_in_every_layout(tmp_path: Path, folder: str) -> None:
    write_qwen2(tmp_path / folder)
    reason = megatron.recognise(tmp_path)
    assert reason is not None and reason.endswith("dist_ckpt/metadata.json says 'torch_dist'")
    read_exactly(megatron.read(tmp_path), made("qwen2").weights)


def test_the_last_checkpoint_of_a_megatron_run_is_read_with_its_own_arguments(tmp_path: Path) -> None:
    model = made("llama")
    write_checkpoint(tmp_path / "made", mcore_weights(model), common=megatron_lm_arguments(model))
    (tmp_path / "made" / "dist_ckpt").rename(tmp_path / "iter_0000007")
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("7")
    checkpoint = megatron.read(tmp_path)
    read_exactly(checkpoint, model.weights)
    assert checkpoint.hf_folder is None and checkpoint.facts["step"] == 7
    assert "no config.json" in checkpoint.notes[0]


def test_verl_says_the_heads_where_hugging_face_does_not(tmp_path: Path) -> None:
    model = made("qwen3")
    write_checkpoint(tmp_path / "model", mcore_weights(model))
    (tmp_path / "transformer_config.json").write_text(json.dumps({"num_attention_heads": 4, "num_query_groups": 2}))
    read_exactly(megatron.read(tmp_path), model.weights)


def test_experts_without_a_config_are_named_as_qwen_names_them(tmp_path: Path) -> None:
    model = made("qwen2_moe")
    write_checkpoint(tmp_path, mcore_weights(model), common=megatron_lm_arguments(model))
    checkpoint = megatron.read(tmp_path)
    read_exactly(checkpoint, model.weights)
    assert "no config.json says otherwise" in checkpoint.notes[-1]


def test_without_any_word_on_heads_nothing_is_guessed(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, mcore_weights(made("qwen3")))
    with pytest.raises(UserError, match=r"linear_qkv.*nothing says of how many heads"):
        megatron.read(tmp_path)


def test_a_config_of_another_model_is_refused(tmp_path: Path) -> None:
    model = made("qwen3")
    write_checkpoint(tmp_path, mcore_weights(model), config=model.config | {"num_attention_heads": 14})
    with pytest.raises(UserError, match=r"rows, which do not make 3 parts"):
        megatron.read(tmp_path)


def test_a_model_saved_with_its_wrappers_is_read(tmp_path: Path) -> None:
    model = made("qwen2")
    wrapped = {f"module.module.{name}": tensor for name, tensor in mcore_weights(model).items()}
    write_checkpoint(tmp_path, wrapped, config=model.config)
    read_exactly(megatron.read(tmp_path), model.weights)


def test_an_optimizer_is_kept_beside_the_weights_under_its_own_names(tmp_path: Path) -> None:
    moment = torch.randn(5)
    write_qwen2(tmp_path, **{"chained_0.optimizer.state.exp_avg.decoder.final_layernorm.weight": moment})
    (name, tensor), *more = megatron.read(tmp_path).others["optimizer"].items()
    assert name == "chained_0.optimizer.state.exp_avg.decoder.final_layernorm.weight" and not more
    assert torch.equal(tensor.read(), moment)


def test_an_optimizer_in_a_folder_of_its_own_is_found(tmp_path: Path) -> None:
    write_qwen2(tmp_path / "model")
    write_checkpoint(tmp_path / "optimizer", {"optimizer.state.exp_avg": torch.arange(3)})
    checkpoint = megatron.read(tmp_path)
    assert list(checkpoint.others) == ["optimizer"]
    assert torch.equal(checkpoint.others["optimizer"]["optimizer.state.exp_avg"].read(), torch.arange(3))


def test_an_optimizer_in_a_folder_of_its_own_is_not_opened_for_the_weights(tmp_path: Path) -> None:
    write_qwen2(tmp_path / "model")
    write_checkpoint(tmp_path / "optimizer", {"optimizer.state.exp_avg": torch.arange(3)})
    (tmp_path / "optimizer" / "dist_ckpt" / "__0_0.distcp").unlink()
    checkpoint = megatron.read(tmp_path)
    read_exactly(checkpoint, made("qwen2").weights)
    with pytest.raises(UserError, match=r"__0_0\.distcp is missing, in which optimizer\.state\.exp_avg lies"):
        list(checkpoint.others["optimizer"])


def test_an_optimizer_that_is_not_whole_is_noted_where_it_lies(tmp_path: Path) -> None:
    write_qwen2(tmp_path / "model")
    write_checkpoint(tmp_path / "optimizer", {"optimizer.state.exp_avg": torch.arange(3)})
    path = tmp_path / "optimizer" / "dist_ckpt" / ".metadata"
    description = pickle.loads(path.read_bytes())
    description.state_dict_metadata["optimizer.state.exp_avg"].size = torch.Size([4])
    path.write_bytes(pickle.dumps(description))
    part = megatron.read(tmp_path).others["optimizer"]
    assert isinstance(part, Part) and part.contents.notes == ("1 tensors of optimizer have parts missing",)


def test_unknown_names_are_listed_and_refused(tmp_path: Path) -> None:
    write_qwen2(tmp_path, **{"mtp.layers.0.enorm.weight": torch.ones(1), "decoder.layers.0.odd.weight": torch.ones(1)})
    with pytest.raises(UserError, match=r"2 tensors .*decoder\.layers\.0\.odd\.weight, mtp\.layers\.0\.enorm\.weight"):
        megatron.read(tmp_path)


def test_what_holds_no_weights_is_noted_and_left_out(tmp_path: Path) -> None:
    write_qwen2(tmp_path, **{"rotary_pos_emb.inv_freq": torch.ones(2)})
    checkpoint = megatron.read(tmp_path)
    read_exactly(checkpoint, made("qwen2").weights)
    assert "rotary_pos_emb.inv_freq" in checkpoint.notes[-1]


def test_a_chunk_that_no_rank_wrote_is_named(tmp_path: Path) -> None:
    model = made("qwen2")
    write_checkpoint(tmp_path, mcore_weights(model), config=model.config, tensor_parallel=2)
    path = tmp_path / "dist_ckpt" / ".metadata"
    description = pickle.loads(path.read_bytes())
    gone = next(index for index in description.storage_data if index.fqn == "decoder.layers.mlp.linear_fc2.weight")
    del description.storage_data[gone]
    path.write_bytes(pickle.dumps(description))
    with pytest.raises(UserError, match=r"lacks parts of 1 tensors: decoder\.layers\.mlp\.linear_fc2\.weight \(192 el"):
        megatron.read(tmp_path)


class MCoreMetadata(Metadata):
    """Stands for the class of this name in Megatron-core 0.15."""


def test_a_description_with_what_megatron_keeps_for_its_next_save_is_read(tmp_path: Path) -> None:
    write_qwen2(tmp_path)
    path = tmp_path / "dist_ckpt" / ".metadata"
    description = MCoreMetadata(**vars(pickle.loads(path.read_bytes())))
    item = WriteItem(index=MetadataIndex("a"), type=WriteItemType.BYTE_IO)
    vars(description)["all_local_plans"] = [SavePlan([item], storage_data=[WriteItemType.SHARD])]
    theirs = b"cmegatron.core.dist_checkpointing.strategies.torch\n"
    path.write_bytes(pickle.dumps(description, protocol=2).replace(f"c{__name__}\n".encode(), theirs))
    assert theirs in path.read_bytes()
    read_exactly(megatron.read(tmp_path), made("qwen2").weights)


def test_a_file_that_is_gone_is_named(tmp_path: Path) -> None:
    write_qwen2(tmp_path)
    (tmp_path / "dist_ckpt" / "__0_0.distcp").unlink()
    with pytest.raises(UserError, match=r"__0_0\.distcp is missing, in which .* lies"):
        megatron.read(tmp_path)


def test_a_file_cut_short_is_named(tmp_path: Path) -> None:
    write_qwen2(tmp_path)
    path = tmp_path / "dist_ckpt" / "__0_0.distcp"
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(UserError, match=r"__0_0\.distcp at byte \d+ is damaged: it ends before"):
        megatron.read(tmp_path)


def test_a_tensor_whose_dimensions_lie_in_another_order_is_refused(tmp_path: Path) -> None:
    write_qwen2(tmp_path)
    save({"a": torch.arange(6.0).view(2, 3).t()}, checkpoint_id=tmp_path / "dist_ckpt", no_dist=True)
    with pytest.raises(UserError, match="1 tensors whose dimensions lie in another order: a"):
        megatron.read(tmp_path)


def test_a_folder_of_something_else_is_not_taken_for_one(tmp_path: Path) -> None:
    (tmp_path / "metadata.json").write_text("[]")
    assert megatron.recognise(tmp_path) is None
    with pytest.raises(UserError, match=r"holds no metadata\.json of Megatron-core"):
        megatron.read(tmp_path)


@pytest.mark.parametrize("backend", ["zarr", "fsdp_dtensor"])
def test_other_formats_of_megatron_are_refused_by_name(tmp_path: Path, backend: str) -> None:
    (tmp_path / "metadata.json").write_text(json.dumps({"sharded_backend": backend}))
    with pytest.raises(UserError, match=f"says '{backend}'"):
        megatron.read(tmp_path)


class Evil:
    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, ("owned",)


def test_a_description_that_would_run_code_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_qwen2(tmp_path)
    (tmp_path / "dist_ckpt" / ".metadata").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(UserError, match=r"\.metadata: refused; .* refer to posix\.mkdir"):
        megatron.read(tmp_path)
    assert not (tmp_path / "owned").exists()


def test_a_tensor_that_would_run_code_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_qwen2(tmp_path)
    evil = pickle.dumps(Evil(), protocol=2)
    path = tmp_path / "dist_ckpt" / "__0_0.distcp"
    data = path.read_bytes()
    at = data.index(b"\x80\x02ctorch._utils")
    path.write_bytes(data[:at] + evil + data[at + len(evil) :])
    with pytest.raises(UserError, match=r"__0_0\.distcp at byte \d+: refused; .* refer to posix\.mkdir"):
        megatron.read(tmp_path)
    assert not (tmp_path / "owned").exists()


def test_settings_that_would_run_code_are_left_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_qwen2(tmp_path)
    torch.save({"iteration": Evil()}, tmp_path / "dist_ckpt" / "common.pt")
    checkpoint = megatron.read(tmp_path)
    assert "common.pt is left unread" in checkpoint.notes[0] and "posix.mkdir" in checkpoint.notes[0]
    assert not (tmp_path / "owned").exists()


def test_a_path_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    write_qwen2(tmp_path)
    path = tmp_path / "dist_ckpt" / ".metadata"
    description = pickle.loads(path.read_bytes())
    for info in description.storage_data.values():
        info.relative_path = "../../secret"
    path.write_bytes(pickle.dumps(description))
    with pytest.raises(UserError, match=r"\.metadata: refused; .* a file outside its folder"):
        megatron.read(tmp_path)
