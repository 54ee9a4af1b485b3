"""A Hugging Face folder from a stream of named tensors: one file's worth in memory at a time, then renamed whole."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel

from rlctl_train.checkpoint.probe import PROBE, Probe
from rlctl_train.config.layout import write_json

Adapter = tuple[dict[str, Any], Iterable[tuple[str, Tensor]]]
"""What `adapter_config.json` says, and the tensors, in the form of the PEFT library."""
FILE_BYTES = 4 * 2**30
"""A weight file is closed before it grows beyond this."""


def write_folder(
    folder: Path,
    tensors: Iterable[tuple[str, Tensor]],
    lm: PreTrainedModel,
    *,
    dtype: torch.dtype,
    source: str,
    tokenizer: str,
    trust_remote_code: bool,
    adapter: Adapter | None = None,
    probe: Probe | None = None,
) -> None:
    """Write weights in `dtype`, config, generation config and tokenizer; the folder appears when all of it is there.

    `source` is the folder or hub id the model came from, whose code goes along if it has any; `tokenizer` likewise.
    """
    aside = folder.with_name(f".{folder.name}.writing")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    _write_weights(aside, tensors, dtype)
    _write_configs(aside, lm, dtype)
    if adapter is not None:
        _write_adapter(aside / "adapter", *adapter)
    if probe is not None:
        write_json(aside / PROBE, probe)
    AutoTokenizer.from_pretrained(tokenizer, trust_remote_code=trust_remote_code).save_pretrained(aside)
    if trust_remote_code:
        for code in Path(source).glob("*.py"):
            shutil.copy(code, aside)
    if folder.exists():
        replaced = folder.with_name(f".{folder.name}.replaced")
        folder.rename(replaced)
        aside.rename(folder)
        shutil.rmtree(replaced)
    else:
        aside.rename(folder)


def read_folder(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights of a folder that `write_folder` has written, under their names, one at a time."""
    for file in sorted(folder.glob("model*.safetensors")):
        with safe_open(file, "pt") as held:
            for name in held.keys():  # noqa: SIM118  (it is no mapping)
                yield name, held.get_tensor(name)


def _write_weights(folder: Path, tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype) -> None:
    files: list[list[str]] = []
    held: dict[str, Tensor] = {}
    total = held_bytes = 0

    def flush() -> None:
        files.append(list(held))
        save_file(held, folder / f"{len(files):05d}", metadata={"format": "pt"})
        held.clear()

    for name, tensor in tensors:
        tensor = tensor.detach().to("cpu", dtype).contiguous()
        if held and held_bytes + tensor.nbytes > FILE_BYTES:
            flush()
            held_bytes = 0
        held[name] = tensor
        held_bytes += tensor.nbytes
        total += tensor.nbytes
    flush()
    _name_files(folder, files, total)


def _write_adapter(folder: Path, settings: dict[str, Any], tensors: Iterable[tuple[str, Tensor]]) -> None:
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    whole = {name: tensor.cpu().contiguous() for name, tensor in tensors}
    save_file(whole, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def _name_files(folder: Path, files: list[list[str]], total_bytes: int) -> None:
    """Give weight files the names transformers looks for, which hold their number, and write the index."""
    if len(files) == 1:
        (folder / "00001").rename(folder / "model.safetensors")
        return
    where: dict[str, str] = {}
    for number, names in enumerate(files, 1):
        file_name = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        (folder / f"{number:05d}").rename(folder / file_name)
        where |= dict.fromkeys(names, file_name)
    index = {"metadata": {"total_size": total_bytes}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _write_configs(folder: Path, lm: PreTrainedModel, dtype: torch.dtype) -> None:
    config = copy.deepcopy(lm.config)
    config.architectures = [type(lm).__name__]
    config.dtype = dtype
    config.save_pretrained(folder)
    if lm.can_generate() and lm.generation_config is not None:
        lm.generation_config.save_pretrained(folder)
