"""Low-rank adaptation (LoRA, Hu et al. 2021, arXiv:2106.09685): W x becomes W x + (alpha / rank) B A x.

W is frozen, A and B are trained. An adapted layer keeps W and its bias under their own names, so that nobody who
reads or streams weights by name need know of adapters. Letters: N tokens, I input and O output features, r rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import PreTrainedModel

from rlctl_train.config.errors import PREFLIGHT, UserError
from rlctl_train.config.model import LoraConfig

DOWN, UP = ".lora_A", ".lora_B"
"""How the names of A and B end; before it stands the name of the layer."""
ALL = "all-linear"


class LoraLinear(nn.Module):
    """A linear layer with frozen `weight` [O, I] and an adapter of `lora_A` [r, I] and `lora_B` [O, r] in float32.

    A is drawn from a Gaussian of variance 1 / I, which keeps the scale of the input, and B is zero: at first the
    layer computes what it did before.
    """

    def __init__(self, base: nn.Linear, config: LoraConfig, draw: torch.Generator) -> None:
        super().__init__()
        self.weight, self.bias = base.weight, base.bias
        self.scale, self.enabled = scale(config), True
        self.lora_A = nn.Parameter(
            torch.randn(config.rank, base.in_features, generator=draw) / math.sqrt(base.in_features)
        )
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, config.rank))

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., I] to [..., O]."""
        rows = x.flatten(0, -2)
        out = linear(rows, self.weight, self.bias)
        if self.enabled:
            # Into the product that was just made: nothing keeps it, and an adapter then holds [N, r] and no [N, O].
            down, up = self.lora_A.to(out.dtype), self.lora_B.to(out.dtype)
            out.addmm_(linear(rows, down), up.t(), alpha=self.scale)
        return out.view(*x.shape[:-1], -1)


def adapt(lm: PreTrainedModel, config: LoraConfig, seed: int) -> None:
    """Freeze a model and give the layers that `config` names an adapter."""
    draw = torch.Generator().manual_seed(seed)
    lm.requires_grad_(False)
    for name in target_layers(lm, config):
        holder, _, own_name = name.rpartition(".")
        base = cast(nn.Linear, lm.get_submodule(name))
        lm.get_submodule(holder).register_module(own_name, LoraLinear(base, config, draw))


def target_layers(lm: PreTrainedModel, config: LoraConfig) -> list[str]:
    """Return the names of the layers that get adapters: linear ones of the decoder, never the output projection."""
    prefix, decoder = lm.base_model_prefix, cast(nn.Module, lm.base_model)
    linears = [f"{prefix}.{name}" for name, module in decoder.named_modules() if type(module) is nn.Linear]
    targets = config.target_modules
    if targets == (ALL,):
        return linears
    for target in targets:
        if not any(_is_called(name, target) for name in linears):
            own_names = sorted({name.rpartition(".")[2] for name in linears})
            raise UserError(
                f"model.lora.target_modules names {target!r}, but no linear layer of the decoder is called that",
                f"choose among {', '.join(own_names)}, or give {ALL} alone",
                exit_code=PREFLIGHT,
            )
    return [name for name in linears if any(_is_called(name, target) for target in targets)]


def is_adapter(name: str) -> bool:
    """Say whether a parameter of this name is part of an adapter."""
    return name.endswith((DOWN, UP))


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Let the model compute what it would without adapters."""
    layers = [module for module in model.modules() if isinstance(module, LoraLinear)]
    for layer in layers:
        layer.enabled = False
    try:
        yield
    finally:
        for layer in layers:
            layer.enabled = True


def scale(config: LoraConfig) -> float:
    """Return the factor on B A."""
    return config.alpha / config.rank


def _is_called(name: str, target: str) -> bool:
    return f".{name}".endswith(f".{target}")
