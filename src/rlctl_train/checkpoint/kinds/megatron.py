"""Megatron-core's distributed checkpoints (`torch_dist`), of Megatron-LM or of verl, as Hugging Face weights.

Such a checkpoint does not depend on how the model was split: tensors are whole, in chunks from all ranks. Each Hugging
Face tensor is rows of one of them, so it is bytes of files here too. Megatron's other formats (`zarr`, `fsdp_dtensor`)
are refused.
"""

from __future__ import annotations

import json
import pickle
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rlctl_train.checkpoint import mcore_names
from rlctl_train.checkpoint.dcp import read_dcp
from rlctl_train.checkpoint.slices import item, rows
from rlctl_train.checkpoint.stored import Checkpoint, Contents, NamedTensor, Part, StoredTensor
from rlctl_train.config.errors import FAILED, UserError

FORMAT = "metadata.json"
SETTINGS = "common.pt"
TRACKER = "latest_checkpointed_iteration.txt"
OF_A_ROLE = ("dist_ckpt", "model/dist_ckpt")
INSIDE = ("", *OF_A_ROLE, *(f"actor/{place}" for place in OF_A_ROLE))
"""Where the weights may lie in the folder of a checkpoint: Megatron-LM's, then verl's of two generations."""
BESIDE = ("optimizer", "extra")
"""Folders that verl keeps beside `model`."""
NUM_LISTED = 5
"""Names in a message, before the rest is only counted."""


def recognise(path: Path) -> str | None:
    """Return why a folder is taken for one of Megatron-core's, or None."""
    folder = _find(path)
    return None if folder is None else f"{(folder / FORMAT).relative_to(path)} says {_backend(folder)!r}"


def read(path: Path) -> Checkpoint:
    """Read the weights under their Hugging Face names, padded vocabulary included; an optimizer keeps Megatron's names.

    Heads are counted in `config.json`, else in verl's `transformer_config.json`, else in Megatron-LM's arguments.
    """
    folder = _find(path)
    if folder is None:
        raise UserError(f"{path} holds no {FORMAT} of Megatron-core", "name the folder of one checkpoint")
    if (backend := _backend(folder)) != "torch_dist":
        raise UserError(
            f"{folder / FORMAT} says {backend!r}; of Megatron-core's formats only 'torch_dist' can be read",
            "save it once more in Megatron's own environment, with --ckpt-format torch_dist",
        )
    stored = _stored(folder)
    optimizer = {name: t for name, t in stored.items() if mcore_names.OPTIMIZER.fullmatch(name)}
    weights = {mcore_names.plain(name): t for name, t in stored.items() if name not in optimizer}
    _check_whole(folder, weights)
    around = _around(path, folder)
    tensors = _hf_tensors(folder, weights, around)
    places = _places_beside(folder)
    others: dict[str, Mapping[str, NamedTensor]] = {part: _beside(part, place) for part, place in places.items()}
    if optimizer and not others:
        others["optimizer"] = optimizer
    files = {piece.file for tensor in stored.values() for piece in tensor.pieces}
    files |= {file for place in places.values() for file in place.glob("*.distcp")}
    return Checkpoint(
        kind="megatron",
        path=path,
        tensors=tensors,
        hf_folder=around.hf_folder,
        others=others,
        facts={"format": "torch_dist", "files": len(files), **around.facts},
        notes=around.notes + _notes(weights, tensors, around) + _lacking("optimizer", optimizer),
        files=tuple(sorted(files | {folder / name for name in (".metadata", FORMAT)} | set(around.files))),
    )


@dataclass(frozen=True)
class _Around:
    """What lies about the weights and tells of the model."""

    hf_folder: Path | None
    model_type: str | None
    heads: tuple[int, int] | None
    """Heads, and groups of them that share a key and a value."""
    facts: Mapping[str, str | int]
    notes: tuple[str, ...]
    files: tuple[Path, ...]


def _find(path: Path) -> Path | None:
    """Return the folder with the weights of a checkpoint, or of the last one of a run."""
    places = [path]
    tracker = path / TRACKER
    if tracker.is_file():
        last = tracker.read_text().strip()
        names = [f"iter_{int(last):07d}", f"global_step_{int(last)}"] if last.isdecimal() else ["release"]
        places += [path / name for name in names]
    folders = (place / inside for place in places for inside in INSIDE)
    return next((folder for folder in folders if _backend(folder) is not None), None)


def _backend(folder: Path) -> str | None:
    says = _json(folder / FORMAT).get("sharded_backend")
    return says if isinstance(says, str) else None


def _stored(folder: Path) -> dict[str, StoredTensor]:
    """Return the tensors of a folder, which may lack parts; raises UserError where one lies in no order of rows."""
    tensors, _ = read_dcp(folder, allow_missing=True)
    stored = {name: tensor for name, tensor in tensors.items() if isinstance(tensor, StoredTensor)}
    if turned := tensors.keys() - stored.keys():
        raise UserError(
            f"{folder} holds {len(turned)} tensors whose dimensions lie in another order: {_listed(list(turned))}",
            "save it once more in Megatron's own environment, with contiguous tensors",
            exit_code=FAILED,
        )
    return stored


def _places_beside(folder: Path) -> dict[str, Path]:
    """Return the folders that verl's newer layout has apart from the weights."""
    if (folder.parent.name, folder.name) != ("model", "dist_ckpt"):
        return {}
    places = {part: folder.parent.parent / part / folder.name for part in BESIDE}
    return {part: place for part, place in places.items() if (place / ".metadata").is_file()}


def _beside(part: str, place: Path) -> Part:
    def read() -> Contents:
        tensors = _stored(place)
        return Contents(tensors, notes=_lacking(part, tensors))

    return Part(read)


def _json(path: Path) -> dict[str, Any]:
    """Return a file's object; an empty one where there is no such file or it holds something else."""
    try:
        found = json.loads(path.read_text()) if path.is_file() else {}
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _around(path: Path, folder: Path) -> _Around:
    near = [folder, *(parent for parent in folder.parents if parent.is_relative_to(path))]
    if folder.name == "dist_ckpt":
        near.append(folder.parent)
    configs = [place / inside / "config.json" for place in near for inside in ("huggingface", "")]
    hf_config = next((config for config in configs if config.is_file()), None)
    verl = [folder.parent / "transformer_config.json", folder.parent.parent / "transformer_config.json"]
    verl_config = next((config for config in verl if folder.name == "dist_ckpt" and config.is_file()), None)
    common, notes = _common(folder)
    arguments = common.get("args")
    found = _json(hf_config) if hf_config else {}
    heads = (
        _heads(found, "num_key_value_heads")
        or _heads(_json(verl_config) if verl_config else {}, "num_query_groups")
        or _heads(vars(arguments) if isinstance(arguments, Namespace) else {}, "num_query_groups")
    )
    if hf_config is None:
        notes += ("no config.json of Hugging Face lies beside the weights",)
    step = common.get("iteration")
    return _Around(
        hf_folder=hf_config.parent if hf_config else None,
        model_type=found.get("model_type"),
        heads=heads,
        facts={"step": step} if isinstance(step, int) else {},
        notes=notes,
        files=tuple(file for file in (hf_config, verl_config, folder / SETTINGS) if file and file.is_file()),
    )


def _common(folder: Path) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return what all ranks share, as far as it is plain values; the rest is not worth running code for."""
    path = folder / SETTINGS
    if not path.is_file():
        return {}, (f"there is no {SETTINGS}",)
    try:
        with torch.serialization.safe_globals([Namespace]):
            common = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, EOFError, RuntimeError, ValueError) as error:
        return {}, (f"{SETTINGS} is left unread, since it refers to more than plain values ({_reason(error)})",)
    return (common if isinstance(common, dict) else {}), ()


def _reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines()]
    return next((line for line in lines if "GLOBAL" in line), lines[0] if lines else type(error).__name__)


def _heads(settings: Mapping[str, Any], groups_key: str) -> tuple[int, int] | None:
    heads = settings.get("num_attention_heads")
    groups = settings.get(groups_key) or heads
    return (heads, groups) if isinstance(heads, int) and isinstance(groups, int) else None


def _check_whole(folder: Path, weights: Mapping[str, StoredTensor]) -> None:
    lacking = {name: tensor.missing() for name, tensor in weights.items() if tensor.missing()}
    if lacking:
        listed = [f"{name} ({count} elements)" for name, count in lacking.items()]
        raise UserError(
            f"{folder} lacks parts of {len(lacking)} tensors: {_listed(listed)}",
            "copy the folder once more from where it was saved; every node writes files of its own",
            exit_code=FAILED,
        )


def _hf_tensors(folder: Path, weights: Mapping[str, StoredTensor], around: _Around) -> dict[str, NamedTensor]:
    output_layer = weights.get("output_layer.weight")
    model = mcore_names.Model(
        family=mcore_names.family_of(around.model_type, weights),
        latent_attention=any(".linear_kv_down_proj." in name for name in weights),
        value_head=output_layer is not None and output_layer.shape[0] == 1,
    )
    tensors: dict[str, NamedTensor] = {}
    unknown: list[str] = []
    for name, tensor in weights.items():
        source = mcore_names.source(name, model)
        if source is None:
            unknown += [] if mcore_names.WITHOUT_WEIGHTS.fullmatch(name) else [name]
            continue
        for part in _parts(tensor, source, around.heads):
            assert part.name not in tensors, part.name
            tensors[part.name] = part
    if unknown:
        raise UserError(
            f"{folder} holds {len(unknown)} tensors that no Hugging Face tensor is known for: {_listed(unknown)}",
            "export this model with Megatron-Bridge, which knows its architecture",
            exit_code=FAILED,
        )
    return tensors


def _parts(tensor: StoredTensor, source: mcore_names.Source, heads: tuple[int, int] | None) -> Iterator[StoredTensor]:
    """Yield the Hugging Face tensors that one of Megatron's holds, by their names."""
    for layer, of_layer in enumerate(_along_first(tensor)) if source.layers_stacked else [(-1, tensor)]:
        for expert, whole in enumerate(_along_first(of_layer)) if source.experts_stacked else [(-1, of_layer)]:
            names = [target.format(layer=layer, expert=expert) for target in source.targets]
            if len(names) == 1:
                yield whole.renamed(names[0])
                continue
            for name, spans in zip(names, _spans(whole, len(names), heads), strict=True):
                yield rows(whole, spans).renamed(name)


def _along_first(tensor: StoredTensor) -> Iterator[StoredTensor]:
    return (item(tensor, index) for index in range(tensor.shape[0]))


def _spans(whole: StoredTensor, num_parts: int, heads: tuple[int, int] | None) -> Sequence[Sequence[tuple[int, int]]]:
    num_rows = whole.shape[0]
    if num_parts == 2 and num_rows % 2 == 0:
        return [[(0, num_rows // 2)], [(num_rows // 2, num_rows // 2)]]
    if num_parts == 3 and heads is None:
        raise UserError(
            f"{whole.name!r} holds queries, keys and values together, and nothing says of how many heads",
            "put the model's config.json beside the weights, in a folder huggingface",
        )
    if num_parts == 3 and heads is not None and mcore_names.heads_fit(num_rows, *heads):
        return mcore_names.qkv_spans(num_rows, *heads)
    raise UserError(
        f"{whole.name!r} has {num_rows} rows, which do not make {num_parts} parts with (heads, groups) = {heads}",
        "check that config.json is of this model",
        exit_code=FAILED,
    )


def _notes(weights: Mapping[str, StoredTensor], tensors: Mapping[str, NamedTensor], around: _Around) -> tuple[str, ...]:
    notes: list[str] = []
    without = [name for name in weights if mcore_names.WITHOUT_WEIGHTS.fullmatch(name)]
    if without:
        notes.append(f"{len(without)} tensors hold no weights and are left out: {_listed(without)}")
    if around.model_type is None and any(".experts." in name for name in tensors):
        notes.append("experts are named as Qwen and DeepSeek name theirs, since no config.json says otherwise")
    return tuple(notes)


def _lacking(part: str, tensors: Mapping[str, StoredTensor]) -> tuple[str, ...]:
    """Say where what lies beside the weights is not whole; old formats of an optimizer never are."""
    num_lacking = sum(1 for tensor in tensors.values() if tensor.missing())
    return (f"{num_lacking} tensors of {part} have parts missing",) if num_lacking else ()


def _listed(names: Sequence[str]) -> str:
    more = len(names) - NUM_LISTED
    return ", ".join(sorted(names)[:NUM_LISTED]) + (f" and {more} more" if more > 0 else "")
