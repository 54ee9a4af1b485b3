"""What tensors a model has, found by having transformers build it on the meta device.

Files hold some tensors under other names than the model does, or cut apart (experts that are one tensor in memory);
both forms are known here. Import it only where it is needed: transformers takes seconds.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from rlctl_train.checkpoint.expected_types import Block, Expected

PROBE = (4, 3)
"""Shape of one expert's part of a small tensor that is cut as the real one is, to see what goes where."""


def built(config: Mapping[str, Any], folder: Path, *, trust_remote_code: bool) -> Expected | str:
    """Return what a model of this config needs, or why transformers does not build it."""
    try:
        model = _on_meta(config, folder, trust_remote_code=trust_remote_code)
    except (ValueError, KeyError, ImportError, AttributeError, TypeError, NotImplementedError, RuntimeError) as error:
        return f"transformers {transformers.__version__} builds no such model: {' '.join(str(error).split())[:200]}"
    return _of_model(model)


def _on_meta(config: Mapping[str, Any], folder: Path, *, trust_remote_code: bool) -> PreTrainedModel:
    settings = copy.deepcopy(dict(config))
    if trust_remote_code and "auto_map" in settings:
        loaded = AutoConfig.from_pretrained(folder, trust_remote_code=True)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(loaded, trust_remote_code=True)
    loaded = AutoConfig.for_model(settings.pop("model_type"), **settings)
    name = next(iter(config.get("architectures") or ()), None)
    with torch.device("meta"):
        if name is None:
            return AutoModelForCausalLM.from_config(loaded)
        return getattr(transformers, name)(loaded)


def _of_model(model: PreTrainedModel) -> Expected:
    state = dict(model.state_dict())
    shapes: dict[str, tuple[int, ...]] = {
        name: tuple(tensor.shape) for name, tensor in revert_weight_conversion(model, dict(state)).items()
    }
    inner = {name: _blocks(model, name, tensor, shapes) for name, tensor in state.items() if name not in shapes}
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    modules = {id(module): name for name, module in model.named_modules()}
    vocabulary = tuple(f"{modules[id(end)]}.weight" for end in ends if end is not None and id(end) in modules)
    order = {name: rank for rank, name in enumerate(_file_order(state, inner))}
    ordered = dict(sorted(shapes.items(), key=lambda item: order.get(item[0], len(order))))
    ignored = (*(model._keys_to_ignore_on_load_unexpected or ()), r"rotary_emb\.inv_freq$")
    base = None if model.base_model is model else type(model.base_model).__name__
    return Expected(ordered, dict(model.all_tied_weights_keys), inner, vocabulary, base, ignored)


def _file_order(state: Mapping[str, Tensor], inner: Mapping[str, tuple[Block, ...]]) -> list[str]:
    order: list[str] = []
    for name in state:
        order += [block.name for block in inner[name]] if name in inner else [name]
    return order


def _blocks(
    model: PreTrainedModel, name: str, tensor: Tensor, shapes: Mapping[str, tuple[int, ...]]
) -> tuple[Block, ...]:
    """Return what a tensor of the model is in files; nothing where it does not fall into blocks."""
    if len(tensor.shape) != 3:
        parts = revert_weight_conversion(model, {name: tensor})
        same = all(shapes.get(part) == tuple(tensor.shape) for part in parts) and len(parts) == 1
        return tuple(Block(part, 0, tuple(tensor.shape)) for part in parts) if same else ()
    experts, rows, columns = tensor.shape
    probe = torch.arange(experts * math.prod(PROBE)).view(experts, *PROBE)
    found: list[Block] = []
    for part, values in revert_weight_conversion(model, {name: probe}).items():
        first, num = int(values.reshape(-1)[0]), values.numel()
        whole = torch.arange(first, first + num)
        if not torch.equal(values.reshape(-1), whole) or part not in shapes:
            return ()
        expert, rest = divmod(first, math.prod(PROBE))
        begin = expert * rows * columns + rest * rows * columns // math.prod(PROBE)
        if math.prod(shapes[part]) * math.prod(PROBE) != num * rows * columns:
            return ()
        found.append(Block(part, begin, shapes[part]))
    return tuple(found) if sum(math.prod(block.shape) for block in found) == tensor.numel() else ()
