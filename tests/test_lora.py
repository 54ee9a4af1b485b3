"""Adapters beside frozen weights: what they compute, what is trained, streamed, saved and exported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from rlctl_hw.model_shape import shape_from_config
from rlctl_hw.params import lora_params
from transformers import AutoModelForCausalLM

from rlctl_train.config.errors import UserError
from rlctl_train.config.model import LoraConfig
from rlctl_train.engines.fsdp2 import Fsdp2Engine
from tests.engine_support import (
    gradients,
    make_batch,
    make_engine,
    make_model,
    policy_objective,
    value_objective,
    weights,
)

LORA = LoraConfig(rank=4, alpha=8)
EXACT = {"rtol": 0, "atol": 0}
CLOSE = {"rtol": 1e-4, "atol": 2e-6}
PROJECTIONS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_model(tmp_path_factory.mktemp("lora") / "model")


def trained(path: str, num_steps: int = 3, **changes: Any) -> Fsdp2Engine:
    """Make an engine with adapters that have learnt something."""
    engine = make_engine(path, lora=LORA, **changes)
    train(engine, num_steps)
    return engine


def train(engine: Fsdp2Engine, num_steps: int) -> list[float]:
    losses = []
    for _ in range(num_steps):
        losses.append(engine.forward_backward(make_batch(), policy_objective)["loss"])
        engine.optim_step()
    return losses


def logp(engine: Fsdp2Engine) -> torch.Tensor:
    return engine.logprobs(make_batch(), 1.0)[0]


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    """Compute in float64: what differs then are the weights, not how a processor rounds sums of products."""
    return model.double()(torch.arange(4, 20)[None]).logits


@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16"])
def test_new_adapters_change_nothing(path: str, compute_dtype: str) -> None:
    adapted, plain = (make_engine(path, lora=lora, compute_dtype=compute_dtype) for lora in (LORA, None))
    torch.testing.assert_close(logp(adapted), logp(plain), **EXACT)
    torch.testing.assert_close(
        {name: tensor.float() for name, tensor in weights(adapted).items()},
        {name: tensor.to(getattr(torch, compute_dtype)).float() for name, tensor in weights(plain).items()},
        **EXACT,
    )


def test_only_adapters_are_trained(path: str) -> None:
    engine = make_engine(path, lora=LORA)
    frozen = {name: p.detach().clone() for name, p in engine._model.named_weights()}
    train(engine, 2)
    engine.forward_backward(make_batch(), policy_objective)
    with_gradient = {name for name, p in engine._model.lm.named_parameters() if p.grad is not None}
    assert {name.split(".")[-2] for name in with_gradient} == PROJECTIONS
    assert {name.split(".")[-1] for name in with_gradient} == {"lora_A", "lora_B"}
    assert all(float(grad.abs().max()) > 0 for grad in gradients(engine).values())
    torch.testing.assert_close(dict(engine._model.named_weights()), frozen, **EXACT)


@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16"])
def test_frozen_weights_are_in_the_compute_dtype_and_adapters_in_single_precision(
    path: str, compute_dtype: str
) -> None:
    engine = make_engine(path, lora=LORA, compute_dtype=compute_dtype)
    assert {p.dtype for p in engine._weights.values()} == {getattr(torch, compute_dtype)}
    assert {p.dtype for p in engine._parameters.values()} == {torch.float32}


@pytest.mark.parametrize("targets", [("all-linear",), ("o_proj",), ("k_proj", "gate_proj")], ids=str)
def test_the_gradient_is_that_of_the_merged_weight(path: str, tmp_path: Path, targets: tuple[str, ...]) -> None:
    """With W' = W + s B A: dL/dB = s dL/dW' A^T and dL/dA = s B^T dL/dW'."""
    engine = make_engine(path, lora=LORA.model_copy(update={"target_modules": targets}))
    train(engine, 2)
    engine.export(tmp_path / "hf")
    full = make_engine(str(tmp_path / "hf"))
    full.forward_backward(make_batch(), policy_objective)
    engine.forward_backward(make_batch(), policy_objective)
    of_weight = gradients(full)
    for name, got in gradients(engine).items():
        layer = name.rpartition(".")[0]
        down, up = (engine._parameters[f"{layer}.lora_{part}"].detach() for part in "AB")
        whole = of_weight[f"{layer}.weight"]
        torch.testing.assert_close(got, 2 * (whole @ down.t() if name.endswith("B") else up.t() @ whole), **CLOSE)


@pytest.mark.parametrize(
    "changes",
    [{"packing": False}, {"max_tokens_per_micro_batch": 20}, {"recompute": "full"}, {"logits_chunk_tokens": 7}],
    ids=str,
)
def test_gradients_do_not_depend_on_layout_cuts_and_recomputation(path: str, changes: dict[str, Any]) -> None:
    engines = trained(path), trained(path, **changes)
    for engine in engines:
        engine.forward_backward(make_batch(), policy_objective)
    torch.testing.assert_close(gradients(engines[1]), gradients(engines[0]), **CLOSE)


@pytest.mark.parametrize("architecture", ["qwen3", "llama"])
def test_merged_weights_compute_what_the_adapters_do(tmp_path: Path, architecture: str) -> None:
    engine = trained(make_model(tmp_path / "model", architecture=architecture))
    engine.export(tmp_path / "merged")
    plain = make_engine(str(tmp_path / "merged"))
    assert float((logp(engine) - logp(make_engine(str(tmp_path / "model")))).abs().max()) > 0.01
    torch.testing.assert_close(logp(engine), logp(plain), **CLOSE)


def test_without_adapters_the_actor_is_the_reference(path: str) -> None:
    engine, reference = trained(path), make_engine(path, role="reference", optim=None)
    with engine.adapters_off():
        torch.testing.assert_close(logp(engine), logp(reference), **EXACT)
    assert not torch.equal(logp(engine), logp(reference))


def test_the_exported_adapter_loads_in_peft_and_computes_the_same(path: str, tmp_path: Path) -> None:
    engine = trained(path)
    engine.export(tmp_path / "hf")
    base = AutoModelForCausalLM.from_pretrained(path)
    before = logits(base)
    adapted = PeftModel.from_pretrained(base, str(tmp_path / "hf" / "adapter"))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    torch.testing.assert_close(logits(adapted), logits(merged), **CLOSE)
    assert float((logits(adapted) - before).abs().max()) > 0.01
    settings = json.loads((tmp_path / "hf" / "adapter" / "adapter_config.json").read_text())
    assert set(settings["target_modules"]) == PROJECTIONS and settings["base_model_name_or_path"] == path


def test_a_resumed_run_repeats_the_uninterrupted_one_bit_for_bit(path: str, tmp_path: Path) -> None:
    engine = trained(path)
    engine.save(tmp_path)
    losses = train(engine, 2)
    again = make_engine(path, lora=LORA)
    again.load(tmp_path)
    assert train(again, 2) == losses
    torch.testing.assert_close(weights(again), weights(engine), **EXACT)


def test_a_checkpoint_holds_adapters_and_not_the_model(path: str, tmp_path: Path) -> None:
    sizes = {}
    for name, lora in (("lora", LORA), ("full", None)):
        make_engine(path, lora=lora).save(tmp_path / name)
        sizes[name] = sum(file.stat().st_size for file in (tmp_path / name).glob("*.distcp"))
    engine = make_engine(path, lora=LORA)
    num_adapters = sum(p.numel() for p in engine._parameters.values())
    num_weights = sum(p.numel() for p in engine._weights.values())
    assert sizes["full"] - sizes["lora"] > 0.9 * 12 * (num_weights - num_adapters)


def test_adapters_are_refused_beside_other_weights(path: str, tmp_path: Path) -> None:
    trained(path, 1).save(tmp_path / "saved")
    other = trained(path, 1)
    other.export(tmp_path / "hf")
    changed = make_engine(str(tmp_path / "hf"), lora=LORA)
    with pytest.raises(UserError, match="not those that the adapters"):
        changed.load(tmp_path / "saved")


def test_a_checkpoint_of_full_training_is_refused(path: str, tmp_path: Path) -> None:
    make_engine(path).save(tmp_path)
    with pytest.raises(UserError, match="lacks 1 tensors, among them 'base'"):
        make_engine(path, lora=LORA).load(tmp_path)


def test_a_critic_trains_its_adapters_and_its_output(path: str, tmp_path: Path) -> None:
    critic = make_engine(path, lora=LORA, role="critic", compute_dtype="bfloat16")
    assert not critic.values(make_batch()).any(), "a new critic promises nothing"
    losses = []
    for _ in range(3):
        losses.append(critic.forward_backward(make_batch(), value_objective)["loss"])
        critic.optim_step()
    assert losses[-1] < losses[0]
    others = {name for name in critic._parameters if "lora_" not in name}
    assert others == {"score.weight", "score.bias"}
    critic.save(tmp_path)
    again = make_engine(path, lora=LORA, role="critic", compute_dtype="bfloat16")
    again.load(tmp_path)
    torch.testing.assert_close(again.values(make_batch()), critic.values(make_batch()), **EXACT)


def test_named_layers_alone_get_adapters(path: str, tmp_path: Path) -> None:
    lora = LoraConfig(rank=2, target_modules=("q_proj", "layers.1.mlp.up_proj"))
    engine = make_engine(path, lora=lora)
    train(engine, 2)
    assert {name.rpartition(".")[0] for name in engine._parameters} == {
        "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj", "model.layers.1.mlp.up_proj",
    }  # fmt: skip
    engine.export(tmp_path / "hf")
    base = AutoModelForCausalLM.from_pretrained(path)
    loaded = PeftModel.from_pretrained(base, str(tmp_path / "hf" / "adapter"))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    torch.testing.assert_close(logits(loaded), logits(merged), **CLOSE)


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3", "llama"])
def test_the_planner_counts_as_many_adapter_parameters(tmp_path: Path, architecture: str) -> None:
    path = make_model(tmp_path / "model", architecture=architecture)
    trained = sum(p.numel() for p in make_engine(path, lora=LORA)._parameters.values())
    shape = shape_from_config(json.loads((tmp_path / "model" / "config.json").read_text()))
    assert lora_params(shape, LORA.rank) == trained


@pytest.mark.parametrize("target", ["query_proj", "lm_head", "embed_tokens", "proj"])
def test_an_unknown_layer_is_refused_with_those_that_exist(path: str, target: str) -> None:
    with pytest.raises(UserError, match=rf"model\.lora\.target_modules names '{target}'") as caught:
        make_engine(path, lora=LoraConfig(target_modules=("q_proj", target)))
    assert "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj" in caught.value.remedy
