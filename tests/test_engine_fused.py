"""Leaner passes: the same values and gradients as the modules of transformers they stand in for."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from rlctl_train.engines.fused import FUSED, _GatedMlp, _RmsNorm, _Rotate, fuse
from tests.engine_support import make_model


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).requires_grad_()


def test_gradients_are_those_of_finite_differences() -> None:
    torch.manual_seed(0)
    assert torch.autograd.gradcheck(lambda x, w: _RmsNorm.apply(x, w, 1e-3), (draw(3, 2, 4), draw(4)))
    angle = torch.randn(3, 1, 2, dtype=torch.float64).repeat(1, 1, 2)
    assert torch.autograd.gradcheck(lambda x: _Rotate.apply(x, angle.cos(), angle.sin()), (draw(3, 2, 4),))
    assert torch.autograd.gradcheck(_GatedMlp.apply, (draw(3, 4), draw(5, 4), draw(5, 4), draw(4, 5)))


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3", "llama"])
def test_every_part_of_a_known_architecture_is_replaced(tmp_path: Path, architecture: str) -> None:
    lm = AutoModelForCausalLM.from_pretrained(make_model(tmp_path, architecture=architecture))
    fuse(lm)
    replaced = [name for name, module in lm.named_modules() if "forward" in vars(module)]
    norms_of_heads = 2 if architecture == "qwen3" else 0
    assert len(replaced) == 2 * (4 + norms_of_heads) + 1


@pytest.mark.parametrize("part", ["input_layernorm", "mlp"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parts_agree_with_transformers(tmp_path: Path, part: str, dtype: torch.dtype) -> None:
    lm = AutoModelForCausalLM.from_pretrained(make_model(tmp_path), dtype=dtype)
    plain: nn.Module = getattr(lm.model.layers[0], part)
    lean = copy.deepcopy(plain)
    fuse(lean)
    x = torch.randn(1, 6, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    results = []
    for module in (plain, lean):
        leaf = x.clone().requires_grad_()
        out = module(leaf)
        out.float().sin().sum().backward()
        results.append([out, leaf.grad, *(p.grad for p in module.parameters())])
    close = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 0.03, "atol": 0.03}
    for ours, theirs in zip(results[1], results[0], strict=True):
        assert ours is not None and theirs is not None and ours.dtype == dtype
        torch.testing.assert_close(ours, theirs, **close)


def test_modules_of_the_same_name_from_elsewhere_are_left_alone() -> None:
    class Qwen2MLP(nn.Module):
        pass

    module = Qwen2MLP()
    fuse(module)
    assert "forward" not in vars(module)
    assert "transformers.models.qwen2.modeling_qwen2.Qwen2MLP" in FUSED


@pytest.mark.parametrize("unusual", [{"mlp_bias": True}, {"hidden_act": "gelu"}])
def test_an_mlp_of_another_kind_keeps_its_own_pass(unusual: dict[str, object]) -> None:
    config = LlamaConfig(hidden_size=32, intermediate_size=8, **unusual)  # type: ignore[arg-type]
    module = LlamaMLP(config)
    fuse(module)
    assert "forward" not in vars(module)
