"""Merging: whatever lies in files becomes a folder that loads as the same model, or is refused with names."""

from __future__ import annotations

import errno
import json
import os
import zlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForTokenClassification, PreTrainedModel

from rlctl_train.checkpoint import kinds, workplace
from rlctl_train.checkpoint.merge import MergeOptions, merge, plan_merge
from rlctl_train.checkpoint.safetensors_writer import Finished
from rlctl_train.checkpoint.stored import Adapter, Checkpoint
from rlctl_train.config.errors import DOES_NOT_FIT, FAILED, UserError
from tests.stored_checkpoints import FAMILIES, in_files, make_model, read_file, read_folder, save_model

IDS = torch.tensor([[3, 17, 5, 90, 41, 8]])


def logits(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


def loaded(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()


def same(folder: Path, model: PreTrainedModel) -> bool:
    model.set_attn_implementation("eager")
    return torch.equal(logits(loaded(folder)), logits(model))


def in_memory(tmp_path: Path, model: PreTrainedModel, num_pieces: int = 1, **changes: Any) -> Checkpoint:
    """Return a model as a trainer holds it: every name of its state, in pieces of rows, config beside."""
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(tmp_path / "config")
    tensors = {name.replace("/", "."): tensor for name, tensor in (dict(model.state_dict()) | changes).items()}
    stored = in_files(tmp_path / "raw", tensors, num_pieces)
    return Checkpoint("rlctl", tmp_path, stored, tmp_path / "config", files=tuple((tmp_path / "raw").iterdir()))


def problems(checkpoint: Checkpoint, **options: Any) -> str:
    return "\n".join(problem.what for problem in plan_merge(checkpoint, MergeOptions(**options)).problems)


@pytest.mark.parametrize("architecture", FAMILIES)
def test_a_saved_model_merges_into_one_with_the_same_logits(tmp_path: Path, architecture: str) -> None:
    model = save_model(tmp_path / "in", architecture)
    plan = plan_merge(read_folder(tmp_path / "in"), MergeOptions(shard_gb=5e-5))
    merge(plan, tmp_path / "out")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    assert same(tmp_path / "out", model)
    assert plan.notes == () and plan.problems == ()


@pytest.mark.parametrize("architecture", FAMILIES)
@pytest.mark.parametrize("num_pieces", [1, 3])
def test_a_model_as_it_is_in_memory_merges_into_the_names_of_files(
    tmp_path: Path, architecture: str, num_pieces: int
) -> None:
    model = save_model(tmp_path / "in", architecture)
    merge(plan_merge(in_memory(tmp_path, model, num_pieces), MergeOptions()), tmp_path / "out")
    assert set(read_file(tmp_path / "out" / "model.safetensors")) == set(load_file(tmp_path / "in/model.safetensors"))
    assert same(tmp_path / "out", model)


def test_the_output_equals_what_transformers_saves_byte_for_byte_but_for_order(tmp_path: Path) -> None:
    save_model(tmp_path / "in", "Qwen3MoeForCausalLM")
    merge(plan_merge(read_folder(tmp_path / "in"), MergeOptions()), tmp_path / "out")
    ours, theirs = (load_file(tmp_path / place / "model.safetensors") for place in ("out", "in"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_a_chosen_dtype_is_that_of_weights_and_config(tmp_path: Path, dtype: Any) -> None:
    model = save_model(tmp_path / "in", "LlamaForCausalLM")
    merge(plan_merge(read_folder(tmp_path / "in"), MergeOptions(dtype=dtype)), tmp_path / "out")
    wanted = getattr(torch, dtype)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == dtype
    assert loaded(tmp_path / "out").dtype == wanted
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(stored[name], tensor.to(wanted)) for name, tensor in model.state_dict().items())


def test_kept_bfloat16_weights_get_a_config_that_says_so(tmp_path: Path) -> None:
    checkpoint = in_memory(tmp_path, make_model("LlamaForCausalLM").bfloat16())
    config = tmp_path / "config" / "config.json"
    config.write_text(config.read_text().replace("bfloat16", "float32"))
    merge(plan_merge(checkpoint, MergeOptions()), tmp_path / "out")
    assert loaded(tmp_path / "out").dtype == torch.bfloat16


def test_numbers_beyond_float16_are_refused_by_name(tmp_path: Path) -> None:
    checkpoint = in_memory(tmp_path, make_model("LlamaForCausalLM"), **{"model.norm.weight": torch.full((32,), 1e5)})
    with pytest.raises(UserError, match=r"model\.norm\.weight") as caught:
        merge(plan_merge(checkpoint, MergeOptions(dtype="float16")), tmp_path / "out")
    assert "bfloat16" in caught.value.remedy and not (tmp_path / "out").exists()


def test_missing_extra_and_misshapen_tensors_are_refused_with_names(tmp_path: Path) -> None:
    checkpoint = in_memory(tmp_path, make_model("LlamaForCausalLM"), **{"model.norm.weight": torch.ones(7)})
    tensors = dict(checkpoint.tensors)
    tensors["stray"] = tensors.pop("lm_head.weight")
    said = problems(replace(checkpoint, tensors=tensors))
    assert "1 tensors are missing: lm_head.weight" in said
    assert "another shape: model.norm.weight [7] for [32]" in said
    assert "does not know 1 tensors: stray" in said


def test_at_most_ten_names_are_listed(tmp_path: Path) -> None:
    checkpoint = in_memory(tmp_path, make_model("LlamaForCausalLM"))
    said = problems(replace(checkpoint, tensors={"lm_head.weight": checkpoint.tensors["lm_head.weight"]}))
    assert said.startswith("20 tensors are missing") and said.endswith("and 10 more")


def test_a_plan_with_problems_writes_nothing(tmp_path: Path) -> None:
    checkpoint = in_memory(tmp_path, make_model("LlamaForCausalLM"), stray=torch.ones(2))
    with pytest.raises(UserError, match="stray"):
        merge(plan_merge(checkpoint, MergeOptions()), tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))


def test_extra_tensors_are_written_along_when_that_is_allowed(tmp_path: Path) -> None:
    checkpoint = in_memory(tmp_path, make_model("LlamaForCausalLM"), stray=torch.ones(2))
    plan = plan_merge(checkpoint, MergeOptions(allow_extra=True))
    merge(plan, tmp_path / "out")
    assert "stray" in read_file(tmp_path / "out" / "model.safetensors") and "stray" in plan.notes[-1]


def test_rows_beyond_the_vocabulary_are_cut_off_and_told(tmp_path: Path) -> None:
    model = make_model("LlamaForCausalLM")
    padded = {
        name: torch.cat([tensor, torch.full((32, 32), 9.0)])
        for name, tensor in model.state_dict().items()
        if name in ("model.embed_tokens.weight", "lm_head.weight")
    }
    plan = plan_merge(in_memory(tmp_path, model, 3, **padded), MergeOptions())
    merge(plan, tmp_path / "out")
    assert plan.trimmed == ("model.embed_tokens.weight: 128 rows to 96", "lm_head.weight: 128 rows to 96")
    assert same(tmp_path / "out", model)


def test_a_tied_pair_that_is_equal_is_written_once(tmp_path: Path) -> None:
    model = make_model("Qwen2ForCausalLM")
    plan = plan_merge(in_memory(tmp_path, model, 2), MergeOptions())
    merge(plan, tmp_path / "out")
    assert plan.tied == ("lm_head.weight",)
    assert "lm_head.weight" not in read_file(tmp_path / "out" / "model.safetensors") and same(tmp_path / "out", model)


def test_a_head_alone_stands_for_the_tied_embedding(tmp_path: Path) -> None:
    model = make_model("Qwen2ForCausalLM")
    checkpoint = in_memory(tmp_path, model)
    tensors = {name: tensor for name, tensor in checkpoint.tensors.items() if name != "model.embed_tokens.weight"}
    merge(plan_merge(replace(checkpoint, tensors=tensors), MergeOptions()), tmp_path / "out")
    assert same(tmp_path / "out", model)


def test_a_tied_pair_that_differs_is_refused_unless_it_may_part(tmp_path: Path) -> None:
    model = make_model("Qwen2ForCausalLM")
    head = model.state_dict()["lm_head.weight"] * 2
    checkpoint = in_memory(tmp_path, model, **{"lm_head.weight": head})
    assert "ties lm_head.weight to model.embed_tokens.weight, and they differ" in problems(checkpoint)
    merge(plan_merge(checkpoint, MergeOptions(untie=True)), tmp_path / "out")
    written = loaded(tmp_path / "out")
    assert torch.equal(written.state_dict()["lm_head.weight"], head)
    assert written.config.tie_word_embeddings is False


def test_a_model_that_transformers_does_not_know_is_merged_unchecked_and_that_is_said(tmp_path: Path) -> None:
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "config.json").write_text(json.dumps({"model_type": "own", "architectures": ["Own"]}))
    tensors = in_files(tmp_path / "raw", {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor(3)})
    plan = plan_merge(Checkpoint("rlctl", tmp_path, tensors, tmp_path / "config"), MergeOptions(dtype="bfloat16"))
    merge(plan, tmp_path / "out")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert "not checked" in plan.notes[0]
    assert stored["a"].dtype == torch.bfloat16 and stored["b"].dtype == torch.int64


def test_code_beside_the_config_is_neither_run_nor_copied_unless_trusted(tmp_path: Path) -> None:
    checkpoint = in_memory(tmp_path, make_model("LlamaForCausalLM"))
    folder = tmp_path / "config"
    config = json.loads((folder / "config.json").read_text()) | {"auto_map": {"AutoConfig": "evil.Config"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Config: pass\n")
    plan = plan_merge(checkpoint, MergeOptions())
    merge(plan, tmp_path / "out")
    assert not (tmp_path / "ran").exists() and not (tmp_path / "out" / "evil.py").exists()
    assert "not copied" in plan.notes[-1]


def test_trusted_code_is_copied(tmp_path: Path) -> None:
    checkpoint = in_memory(tmp_path, make_model("LlamaForCausalLM"))
    (tmp_path / "config" / "modeling_own.py").touch()
    merge(plan_merge(checkpoint, MergeOptions(trust_remote_code=True)), tmp_path / "out")
    assert (tmp_path / "out" / "modeling_own.py").exists()


def test_tokenizer_and_template_come_along(tmp_path: Path, tiny_model: Path) -> None:
    plan = plan_merge(read_folder(tiny_model), MergeOptions())
    merge(plan, tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"config.json", "tokenizer.json", "tokenizer_config.json", "manifest.json"} <= names


def critic(tmp_path: Path) -> tuple[PreTrainedModel, Checkpoint]:
    model = make_model("Qwen2ForTokenClassification", num_labels=1, tie_word_embeddings=False)
    return model, in_memory(tmp_path, model)


def test_a_critic_keeps_its_head(tmp_path: Path) -> None:
    model, checkpoint = critic(tmp_path)
    merge(plan_merge(checkpoint, MergeOptions()), tmp_path / "out")
    written = AutoModelForTokenClassification.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(written.eval()), logits(model))


def test_a_critic_whose_config_is_a_language_models_becomes_what_it_is(tmp_path: Path) -> None:
    model, checkpoint = critic(tmp_path)
    config = json.loads((tmp_path / "config" / "config.json").read_text())
    for key in ("id2label", "label2id"):
        config.pop(key, None)
    config["architectures"] = ["Qwen2ForCausalLM"]
    (tmp_path / "config" / "config.json").write_text(json.dumps(config))
    merge(plan_merge(checkpoint, MergeOptions()), tmp_path / "out")
    assert torch.equal(logits(AutoModelForTokenClassification.from_pretrained(tmp_path / "out").eval()), logits(model))


def test_a_critic_without_its_head_is_the_bare_model(tmp_path: Path) -> None:
    model, checkpoint = critic(tmp_path)
    plan = plan_merge(checkpoint, MergeOptions(value_head="drop"))
    merge(plan, tmp_path / "out")
    assert plan.dropped == ("score.weight", "score.bias")
    bare, report = AutoModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    with torch.no_grad():
        assert torch.equal(bare.eval()(IDS).last_hidden_state, model.base_model(IDS).last_hidden_state)


def test_a_value_head_beside_a_language_model_needs_a_word(tmp_path: Path) -> None:
    checkpoint = in_memory(tmp_path, make_model("LlamaForCausalLM"), **{"v_head.summary.weight": torch.ones(1, 32)})
    assert "v_head.summary.weight" in problems(checkpoint)
    assert problems(checkpoint, value_head="drop") == ""
    merge(plan_merge(checkpoint, MergeOptions(value_head="keep")), tmp_path / "out")
    assert "v_head.summary.weight" in read_file(tmp_path / "out" / "model.safetensors")


def lora(model: PreTrainedModel, folder: Path, seed: int = 1, **settings: Any) -> PreTrainedModel:
    """Save a random adapter of PEFT's own on a model, and return the model with it merged in."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    wrapped = get_peft_model(model, LoraConfig(**{"r": 4, "lora_alpha": 6, "task_type": "CAUSAL_LM"} | settings))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    wrapped.save_pretrained(folder, save_embedding_layers="embed_tokens" in str(settings))
    return wrapped.merge_and_unload().eval()


PLAIN = ["q_proj", "down_proj"]
ADAPTERS: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": PLAIN},
    "rslora": {"target_modules": PLAIN, "use_rslora": True},
    "patterns": {
        "target_modules": PLAIN,
        "rank_pattern": {"layers.1.self_attn.q_proj": 2},
        "alpha_pattern": {"down_proj": 20},
    },
    "saved whole": {"target_modules": PLAIN, "modules_to_save": ["lm_head"]},
    "embedding": {"target_modules": [*PLAIN, "embed_tokens"]},
}


@pytest.mark.parametrize("case", ADAPTERS)
def test_an_adapter_folds_as_peft_merges_it(tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    save_model(tmp_path / "base", "LlamaForCausalLM")
    merged = lora(loaded(tmp_path / "base"), tmp_path / "adapter", **ADAPTERS[case])
    monkeypatch.setattr(kinds, "read", read_folder)
    plan = plan_merge(read_folder(tmp_path / "adapter"), MergeOptions(base=tmp_path / "base"))
    merge(plan, tmp_path / "out")
    assert len(plan.folded) == (5 if case == "embedding" else 4)
    torch.testing.assert_close(logits(loaded(tmp_path / "out")), logits(merged), atol=1e-5, rtol=1e-5)


def test_an_adapter_on_transposed_weights_folds_as_peft_merges_it(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=96, n_positions=32)).eval()
    checkpoint = in_memory(tmp_path, model)
    merged = lora(model, tmp_path / "adapter", target_modules=["c_attn"], fan_in_fan_out=True)
    adapter = read_folder(tmp_path / "adapter").adapter
    merge(plan_merge(replace(checkpoint, adapter=adapter), MergeOptions()), tmp_path / "out")
    torch.testing.assert_close(logits(loaded(tmp_path / "out")), logits(merged), atol=1e-5, rtol=1e-5)


def test_folding_is_exact_in_float32_before_the_cast(tmp_path: Path) -> None:
    checkpoint = in_memory(tmp_path, make_model("LlamaForCausalLM").bfloat16(), num_pieces=3)
    name, down, up = "model.layers.0.self_attn.q_proj", torch.randn(4, 32), torch.randn(32, 4)
    stored = in_files(tmp_path / "lora", {f"base_model.model.{name}.lora_{x}.weight": y for x, y in
                                          (("A", down), ("B", up))})  # fmt: skip
    adapter = Adapter({"r": 4, "lora_alpha": 2}, stored)
    merge(plan_merge(replace(checkpoint, adapter=adapter), MergeOptions()), tmp_path / "out")
    weight = checkpoint.tensors[f"{name}.weight"].read().float()
    written = load_file(tmp_path / "out" / "model.safetensors")[f"{name}.weight"]
    torch.testing.assert_close(written, (weight + 0.5 * up @ down).bfloat16(), atol=0, rtol=0.008)
    assert written.dtype == torch.bfloat16


def test_an_adapter_on_a_tied_head_parts_it_from_the_embedding(tmp_path: Path) -> None:
    checkpoint = in_memory(tmp_path, make_model("Qwen2ForCausalLM"))
    tensors = {name: tensor for name, tensor in checkpoint.tensors.items() if name != "lm_head.weight"}
    pair = {"base_model.model.lm_head.lora_A.weight": torch.randn(4, 32),
            "base_model.model.lm_head.lora_B.weight": torch.randn(96, 4)}  # fmt: skip
    adapter = Adapter({"r": 4, "lora_alpha": 4}, in_files(tmp_path / "lora", pair))
    checkpoint = replace(checkpoint, tensors=tensors, adapter=adapter)
    assert "and they differ" in problems(checkpoint) and problems(checkpoint, untie=True) == ""


def test_dora_and_other_adapters_are_refused(tmp_path: Path) -> None:
    checkpoint = in_memory(tmp_path, make_model("LlamaForCausalLM"))
    for settings, word in (
        ({"use_dora": True}, "DoRA"), ({"peft_type": "IA3"}, "IA3"), ({"init_lora_weights": "pissa"}, "pissa"),
        ({"target_parameters": ["mlp.experts"]}, "target_parameters"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=word):
            plan_merge(replace(checkpoint, adapter=Adapter(settings, {})), MergeOptions())


def test_an_adapter_for_layers_that_are_not_there_is_refused(tmp_path: Path) -> None:
    checkpoint = in_memory(tmp_path, make_model("LlamaForCausalLM"))
    pair = {"base_model.model.x.lora_A.weight": torch.ones(4, 32), "base_model.model.x.lora_B.weight": torch.ones(9, 4)}
    adapter = Adapter({"r": 4, "lora_alpha": 4}, in_files(tmp_path / "lora", pair))
    assert "1 layers that the weights lack: x" in problems(replace(checkpoint, adapter=adapter))


def test_an_adapter_can_be_kept_beside_its_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from peft import PeftModel

    model = save_model(tmp_path / "base", "LlamaForCausalLM")
    merged = lora(loaded(tmp_path / "base"), tmp_path / "adapter", target_modules=PLAIN)
    monkeypatch.setattr(kinds, "read", read_folder)
    options = MergeOptions(base=tmp_path / "base", adapter="keep")
    merge(plan_merge(read_folder(tmp_path / "adapter"), options), tmp_path / "out")
    assert same(tmp_path / "out", model)
    wrapped = PeftModel.from_pretrained(loaded(tmp_path / "out"), tmp_path / "out" / "adapter")
    torch.testing.assert_close(logits(wrapped.merge_and_unload()), logits(merged))


def test_an_adapter_can_be_written_alone(tmp_path: Path) -> None:
    lora(make_model("LlamaForCausalLM"), tmp_path / "adapter", target_modules=PLAIN)
    merge(plan_merge(read_folder(tmp_path / "adapter"), MergeOptions(adapter="only")), tmp_path / "out")
    ours, theirs = (load_file(tmp_path / place / "adapter_model.safetensors") for place in ("out", "adapter"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_an_adapter_alone_asks_for_its_base(tmp_path: Path) -> None:
    lora(make_model("LlamaForCausalLM"), tmp_path / "adapter", target_modules=PLAIN)
    with pytest.raises(UserError, match="adapter alone") as caught:
        plan_merge(read_folder(tmp_path / "adapter"), MergeOptions())
    assert "--base" in caught.value.remedy


def test_an_existing_target_is_refused_and_replaced_only_on_request(tmp_path: Path) -> None:
    plan = plan_merge(in_memory(tmp_path, make_model("LlamaForCausalLM")), MergeOptions())
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(UserError, match="exists already"):
        merge(plan, tmp_path / "out")
    assert (tmp_path / "out" / "mine").exists()
    merge(plan, tmp_path / "out", overwrite=True)
    assert not (tmp_path / "out" / "mine").exists() and not (tmp_path / ".out.merging").exists()


def test_two_merges_into_one_target_do_not_meet(tmp_path: Path) -> None:
    plan = plan_merge(in_memory(tmp_path, make_model("LlamaForCausalLM")), MergeOptions())
    with workplace.claimed(tmp_path / "out"), pytest.raises(UserError, match="another process"):
        merge(plan, tmp_path / "out")


def broken_off(plan: Any, target: Path, monkeypatch: pytest.MonkeyPatch, after: int = 3) -> list[str]:
    """Merge until some tensors are in the journal, then fail; return which."""
    noted: list[str] = []

    def note(place: workplace.Workplace, finished: Sequence[Finished]) -> None:
        original(place, finished[:after])
        noted.extend(one.name for one in finished[:after])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    original = workplace.Workplace.note
    with monkeypatch.context() as patch:
        patch.setattr(workplace.Workplace, "note", note)
        with pytest.raises(UserError, match="No space left") as caught:
            merge(plan, target)
    assert caught.value.exit_code == FAILED and "goes on where it ended" in caught.value.remedy
    return noted


def test_a_broken_off_merge_goes_on_without_writing_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("LlamaForCausalLM")
    checkpoint = in_memory(tmp_path, model)
    plan = plan_merge(checkpoint, MergeOptions())
    done = broken_off(plan, tmp_path / "out", monkeypatch)
    assert not (tmp_path / "out").exists()
    read: list[str] = []
    chunks = type(checkpoint.tensors[done[0]]).chunks
    monkeypatch.setattr(
        type(checkpoint.tensors[done[0]]), "chunks", lambda self, n: (read.append(self.name), chunks(self, n))[1]
    )
    merge(plan, tmp_path / "out")
    assert len(done) == 3 and not set(done) & set(read) and len(read) == len(checkpoint.tensors) - 3
    assert same(tmp_path / "out", model)


@pytest.mark.parametrize("change", ["options", "input"])
def test_a_merge_of_something_else_starts_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str) -> None:
    model = make_model("LlamaForCausalLM")
    checkpoint = in_memory(tmp_path, model)
    broken_off(plan_merge(checkpoint, MergeOptions()), tmp_path / "out", monkeypatch)
    if change == "input":
        model = make_model("LlamaForCausalLM", seed=5)
        checkpoint = in_memory(tmp_path, model)
    else:
        model = model.bfloat16()
    dtype = "bfloat16" if change == "options" else "keep"
    merge(plan_merge(checkpoint, MergeOptions(dtype=dtype)), tmp_path / "out")
    assert same(tmp_path / "out", model)


def test_too_small_a_disk_is_told_with_numbers_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_merge(in_memory(tmp_path, make_model("LlamaForCausalLM")), MergeOptions())
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=10**6))
    with pytest.raises(UserError, match=r"needs 0\.07 GB .* 0\.00 GB are free") as caught:
        merge(plan, tmp_path / "out")
    assert caught.value.exit_code == DOES_NOT_FIT and not list(tmp_path.rglob("*.safetensors"))


def test_a_full_disk_in_the_middle_is_told_and_the_merge_goes_on_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model("LlamaForCausalLM")
    plan = plan_merge(in_memory(tmp_path, model), MergeOptions())
    calls, pwrite = [0], os.pwrite

    def full(*arguments: Any) -> int:
        calls[0] += 1
        if calls[0] > 5:
            raise OSError(errno.ENOSPC, "full")
        return pwrite(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(UserError, match=r"No space left.*model\.safetensors"):
            merge(plan, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    merge(plan, tmp_path / "out")
    assert same(tmp_path / "out", model)


def test_a_place_that_cannot_be_written_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_merge(in_memory(tmp_path, make_model("LlamaForCausalLM")), MergeOptions())

    def refuse(self: Path, *arguments: Any, **settings: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(self))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(UserError, match="Read-only") as caught:
        merge(plan, tmp_path / "out")
    assert "--out" in caught.value.remedy


def test_a_source_that_ends_early_is_told_and_nothing_appears(tmp_path: Path) -> None:
    checkpoint = in_memory(tmp_path, make_model("LlamaForCausalLM"))
    plan = plan_merge(checkpoint, MergeOptions())
    file = tmp_path / "raw" / "lm_head.weight.0"
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(UserError, match="lm_head") as caught:
        merge(plan, tmp_path / "out")
    assert "verify" in caught.value.remedy and not (tmp_path / "out").exists()


def test_the_manifest_lists_every_tensor_and_file(tmp_path: Path) -> None:
    save_file({"x": torch.arange(4.0)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "own"}))
    merge(plan_merge(read_folder(tmp_path), MergeOptions()), tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["schema_version"] == 1 and manifest["kind"] == "huggingface" and manifest["checksum"] == "crc32"
    bits = torch.arange(4.0).numpy().tobytes()
    assert manifest["tensors"]["x"] == {
        "dtype": "F32", "shape": [4], "bytes": 16, "checksum": f"{zlib.crc32(bits):08x}", "file": "model.safetensors",
        "offset": read_file(tmp_path / "out" / "model.safetensors")["x"].pieces[0].offset,  # type: ignore[attr-defined]
    }  # fmt: skip
    assert set(manifest["files"]) == {"config.json", "model.safetensors"}
