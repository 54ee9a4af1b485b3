"""Hugging Face folders: weights in safetensors or in torch's files, in one or several, with or without an index.

A single file of weights (.safetensors, .bin, .pt) is one too.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from rlctl_train.checkpoint.inert_pickle import damaged
from rlctl_train.checkpoint.kinds.folder import dtype_words, missing, read_table, some
from rlctl_train.checkpoint.safetensors_file import read_safetensors
from rlctl_train.checkpoint.stored import Checkpoint, NamedTensor
from rlctl_train.checkpoint.torch_file import FileTensor, as_stored, read_torch_file
from rlctl_train.checkpoint.torch_zip import is_torch_zip

TORCH_SUFFIXES = (".bin", ".pt", ".pth")
INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
"""In the order in which they are preferred."""
PATTERNS = ("model*.safetensors", "*.safetensors", "pytorch_model*.bin")
"""Weights without an index, in the order of preference."""
NUMBERED = re.compile(r"-(\d{5})-of-(\d{5})\.(?:safetensors|bin)$")
WRAPPERS = ("state_dict", "model", "module")
"""Keys under which some trainers put the weights of a file."""


def recognise(path: Path) -> str | None:
    """Say why a path is a Hugging Face folder, or a file of weights; None where it is neither."""
    if path.is_file():
        return f"a {path.suffix} file of weights" if path.suffix in (".safetensors", *TORCH_SUFFIXES) else None
    index = next((name for name in INDEXES if (path / name).is_file()), None)
    if index is not None:
        return f"it has {index}"
    files = _files_without_index(path)
    return f"it has {files[0].name}" if files else None


def read(path: Path) -> Checkpoint:
    """Read weights by name, each from the file the index says, or from all files where there is no index."""
    files, index, notes = [path], None, []
    if path.is_dir():
        index = next((path / name for name in INDEXES if (path / name).is_file()), None)
        files = _files_of_index(index) if index is not None else _files_without_index(path)
        if not files:
            raise missing(path, "there are no weights in it")
    tensors: dict[str, NamedTensor] = {}
    for file in files:
        own, own_notes = read_weights(file)
        if twice := set(own) & set(tensors):
            raise damaged(str(file), f"it has tensors that another file has too: {some(twice)}")
        tensors |= own
        notes += own_notes
    if index is not None:
        notes += _check_index(index, tensors)
    config = path / "config.json"
    facts: dict[str, str | int] = {"dtype": dtype_words(tensors.values()), "weight_files": len(files)}
    if config.is_file():
        facts["architecture"] = str((read_table(config).get("architectures") or ["unknown"])[0])
    return Checkpoint(
        kind="huggingface",
        path=path,
        tensors=tensors,
        hf_folder=path if config.is_file() else None,
        facts=facts,
        notes=tuple(notes),
        files=(*files, *([index] if index is not None else [])),
    )


def read_weights(file: Path) -> tuple[Mapping[str, NamedTensor], list[str]]:
    """Return the tensors of one file by name, and what is odd about it."""
    if not file.is_file():
        raise missing(file, "there is no such file")
    if file.suffix == ".safetensors":
        return read_safetensors(file), []
    held, notes = read_torch_file(file), []
    if not is_torch_zip(file):
        notes.append(f"{file.name} is from before torch 1.6 and was read into memory whole")
    if isinstance(held, dict) and not any(_is_tensor(value) for value in held.values()):
        wrapper = next((key for key in WRAPPERS if isinstance(held.get(key), dict)), None)
        if wrapper is not None:
            held = held[wrapper]
            notes.append(f"{file.name} has the weights under {wrapper!r}")
    if not isinstance(held, dict):
        raise damaged(str(file), f"it holds a {type(held).__name__} in place of named tensors")
    tensors = {str(name): as_stored(str(name), value) for name, value in held.items() if _is_tensor(value)}
    if left_out := [str(name) for name, value in held.items() if not _is_tensor(value)]:
        notes.append(f"{file.name} holds more than tensors, which is left out: {some(left_out)}")
    if not tensors:
        raise damaged(str(file), "it holds no tensors")
    return tensors, notes


def _is_tensor(value: object) -> bool:
    return isinstance(value, (FileTensor, Tensor))


def _files_of_index(index: Path) -> list[Path]:
    names = _weight_map(index).values()
    if outside := [name for name in names if Path(name).name != name]:
        raise damaged(str(index), f"it names files outside its folder: {some(set(outside))}")
    return [index.with_name(name) for name in sorted(set(names))]


def _files_without_index(folder: Path) -> list[Path]:
    for pattern in PATTERNS:
        files = sorted(file for file in folder.glob(pattern) if not file.name.startswith("adapter_"))
        numbers = [found for file in files if (found := NUMBERED.search(file.name))]
        if numbers and len(numbers) != int(numbers[0][2]):
            raise missing(folder, f"there are {len(numbers)} of {int(numbers[0][2])} weight files")
        if files:
            return files
    return []


def _check_index(index: Path, tensors: Mapping[str, NamedTensor]) -> list[str]:
    named = _weight_map(index)
    if lost := set(named) - set(tensors):
        raise missing(index, f"tensors that it names are in none of its files: {some(lost)}")
    unnamed = set(tensors) - set(named)
    return [f"{index.name} leaves out tensors that are in its files: {some(unnamed)}"] if unnamed else []


def _weight_map(index: Path) -> dict[str, str]:
    table = read_table(index).get("weight_map")
    if not isinstance(table, dict) or not all(isinstance(name, str) for name in table.values()):
        raise damaged(str(index), "it has no weight_map")
    return table
