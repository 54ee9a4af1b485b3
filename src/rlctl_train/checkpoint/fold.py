"""LoRA adapters added into the weights they lie beside: W + scale B A, block by block, in float32.

`r`, the rank, comes from the tensors themselves; the scale is alpha / r, or alpha / sqrt(r) with `use_rslora`, with the
patterns of PEFT's `adapter_config.json` for single layers. Anything but plain LoRA is refused.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from rlctl_train.checkpoint.stored import CHUNK_BYTES, Adapter, NamedTensor
from rlctl_train.config.errors import UserError

PREFIX = "base_model.model."
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "eva", "lora_ga")
"""Ways to initialise an adapter that may change the weights it starts from."""
LINEAR, EMBEDDING = ("lora_A", "lora_B"), ("lora_embedding_A", "lora_embedding_B")


@dataclass(frozen=True)
class Pair:
    """A and B of one layer."""

    layer: str
    """Name of the module, so that `LAYER.weight` is the weight."""
    down: NamedTensor
    """A, [r, inputs]."""
    up: NamedTensor
    """B, [outputs, r]."""
    scale: float
    transposed: bool
    """Whether the weight is stored as [inputs, outputs]."""

    def shape(self) -> tuple[int, int]:
        """Return the shape of the weight."""
        outputs, inputs = self.up.shape[0], self.down.shape[1]
        return (inputs, outputs) if self.transposed else (outputs, inputs)


@dataclass(frozen=True)
class FoldedTensor:
    """A weight with its adapter added, [rows, columns] in float32."""

    base: NamedTensor
    pair: Pair

    @property
    def name(self) -> str:
        """Return the weight's name."""
        return self.base.name

    @property
    def dtype(self) -> torch.dtype:
        """Return float32, in which the sum is made."""
        return torch.float32

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the weight's shape."""
        return self.base.shape

    @property
    def nbytes(self) -> int:
        """Return its size in float32."""
        return math.prod(self.shape) * 4

    def read(self) -> Tensor:
        """Return the sum whole."""
        return torch.cat([chunk.clone() for chunk in self.chunks()]).view(self.shape)

    def chunks(self, num_bytes: int = CHUNK_BYTES) -> Iterator[Tensor]:
        """Yield the sum in C order; only A, B and one block are in memory."""
        left, right = self._factors()
        width, at = self.shape[1], 0
        for chunk in self.base.chunks(num_bytes):
            first, last = at // width, -(-(at + len(chunk)) // width)
            delta = (left[first:last] @ right).view(-1)[at - first * width :][: len(chunk)]
            yield chunk.to(torch.float32).add(delta, alpha=self.pair.scale)
            at += len(chunk)

    def _factors(self) -> tuple[Tensor, Tensor]:
        """Return two matrices, [rows, r] and [r, columns], whose product is to be added."""
        down, up = self.pair.down.read().float(), self.pair.up.read().float()
        return (down.T.contiguous(), up.T.contiguous()) if self.pair.transposed else (up, down)


@dataclass(frozen=True)
class Contents:
    """What an adapter holds."""

    pairs: tuple[Pair, ...]
    replaced: Mapping[str, NamedTensor]
    """Tensors that stand in for the base's, by the base's names: trained whole (`modules_to_save`), biases."""


def contents(adapter: Adapter) -> Contents:
    """Sort an adapter's tensors; raises UserError for what cannot be added to weights."""
    _refuse_strange(adapter)
    tensors = {_plain(name): tensor for name, tensor in adapter.tensors.items()}
    pairs: list[Pair] = []
    replaced: dict[str, NamedTensor] = {}
    for name, tensor in tensors.items():
        layer, part = _split(name)
        if part in (LINEAR[0], EMBEDDING[0]):
            pairs.append(_pair(adapter.settings, layer, part, tensors))
        elif part is None:
            replaced[name] = tensor
        elif not any(_split(other) == (layer, part[:-1] + "A") for other in tensors):
            raise UserError(f"the adapter has {part} of {layer} but not its A", "save the adapter again")
    return Contents(tuple(pairs), replaced)


def _refuse_strange(adapter: Adapter) -> None:
    settings = adapter.settings
    kind = settings.get("peft_type", "LORA")
    if str(kind).upper() != "LORA":
        raise _unsupported(f"the adapter is {kind}, not LoRA")
    if settings.get("use_dora") or any("lora_magnitude_vector" in name for name in adapter.tensors):
        raise _unsupported("the adapter is DoRA, which rescales the weights beside adding to them")
    if settings.get("target_parameters"):
        raise _unsupported("the adapter has target_parameters, pairs for parameters that several experts share")
    if settings.get("trainable_token_indices"):
        raise _unsupported("the adapter trains single tokens of the embedding")
    if any("lora_" in name and len(tensor.shape) != 2 for name, tensor in adapter.tensors.items()):
        raise _unsupported("the adapter has pairs that are not matrices")
    start = settings.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(CHANGES_BASE):
        raise _unsupported(f"the adapter was initialised by {start}, which may have changed the weights below it")


def _unsupported(what: str) -> UserError:
    return UserError(
        f"{what}: it cannot be folded here",
        "keep it beside the base with --adapter keep, or fold it with PEFT's merge_and_unload",
    )


def _plain(name: str) -> str:
    """Return a tensor's name in the adapter as the base model has it."""
    name = name.removeprefix(PREFIX).replace(".base_layer.", ".")
    name = re.sub(r"\.modules_to_save\.[^.]+\.", ".", name)
    return re.sub(r"\.(lora_(?:embedding_)?[AB])\.[^.]+\.weight$", r".\1.weight", name)


def _split(name: str) -> tuple[str, str | None]:
    """Return the layer and which part of a pair a tensor is, or the name itself and None."""
    found = re.fullmatch(r"(.+)\.(lora_(?:embedding_)?[AB])(?:\.weight|\.[^.]+)?", name)
    return (found[1], found[2]) if found else (name, None)


def _pair(settings: Mapping[str, object], layer: str, part: str, tensors: Mapping[str, NamedTensor]) -> Pair:
    names = {_split(name): name for name in tensors}
    other = (layer, part[:-1] + "B")
    if other not in names:
        raise UserError(f"the adapter has {part} of {layer} but not its B", "save the adapter again")
    down, up = tensors[names[layer, part]], tensors[names[other]]
    rank, told = down.shape[0], _of_layer(settings, "rank_pattern", "r", layer)
    if up.shape[1] != rank or (told is not None and told != rank):
        raise UserError(
            f"the adapter's A of {layer} is {list(down.shape)}, its B {list(up.shape)}, its rank is said to be {told}",
            "mend r and rank_pattern in adapter_config.json, or save the adapter again",
        )
    alpha = _of_layer(settings, "alpha_pattern", "lora_alpha", layer)
    if alpha is None:
        raise UserError("adapter_config.json has no lora_alpha", "add it: the adapter's strength is alpha / rank")
    scale = alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)
    transposed = bool(settings.get("fan_in_fan_out")) or part == EMBEDDING[0]
    return Pair(layer, down, up, scale, transposed)


def _of_layer(settings: Mapping[str, object], patterns: str, key: str, layer: str) -> float | None:
    """Return a setting for one layer: the first pattern that ends its name, else the common one."""
    for pattern, value in cast(Mapping[str, Any], settings.get(patterns) or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", layer):
            return float(value)
    common = settings.get(key)
    return None if common is None else float(cast(float, common))
