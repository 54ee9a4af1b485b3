"""What adapters become outside their engine: part of the weights they lie beside, or a folder of the PEFT library.

They are found by name among the trained parameters: `LAYER.lora_A` and `LAYER.lora_B` belong to `LAYER.weight`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rlctl_train.checksum import checksum
from rlctl_train.config.model import LoraConfig
from rlctl_train.engines.lora import ALL, DOWN, UP, is_adapter, scale
from rlctl_train.engines.sharding import full


@torch.no_grad()
def merged(name: str, whole: Tensor, adapters: Mapping[str, nn.Parameter], config: LoraConfig) -> Tensor:
    """Return the weight called `name` with its adapter, if it has one, added in float32; all ranks must ask."""
    layer = name.removesuffix(".weight")
    if layer + DOWN not in adapters:
        return whole
    down, up = (full(adapters[layer + part].detach().to(whole.device)) for part in (DOWN, UP))
    return torch.addmm(whole.to(up.dtype), up, down, alpha=scale(config))


def fingerprint(weights: Mapping[str, nn.Parameter]) -> Tensor:
    """Return a checksum of the frozen weights, [16] uint8, the same for every number of ranks; all ranks must ask.

    It sees weights as bfloat16 does, in which they are the same whatever precision they are computed with.
    """
    frozen = ((name, full(weight.detach())) for name, weight in weights.items() if not weight.requires_grad)
    return torch.tensor(list(bytes.fromhex(checksum(frozen, torch.bfloat16))), dtype=torch.uint8)


def peft_settings(config: LoraConfig, base: str, adapters: Iterable[str]) -> dict[str, Any]:
    """Return what `adapter_config.json` of the PEFT library says of adapters of these names on the model at `base`."""
    alpha, targets = config.alpha, config.target_modules
    if targets == (ALL,):
        layers = {name.removesuffix(DOWN) for name in adapters if name.endswith(DOWN)}
        targets = sorted({layer.rpartition(".")[2] for layer in layers})
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": config.rank,
        "lora_alpha": int(alpha) if alpha.is_integer() else alpha,
        "target_modules": list(targets),
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
    }


def peft_tensors(adapters: Mapping[str, nn.Parameter]) -> Iterator[tuple[str, Tensor]]:
    """Yield A and B of every layer whole, under the names PEFT gives them; all ranks must ask."""
    for name, parameter in adapters.items():
        if is_adapter(name):
            yield peft_name(name), full(parameter.detach())


def peft_name(name: str) -> str:
    """Return the name that PEFT gives to an adapter's parameter."""
    return f"base_model.model.{name}.weight"
