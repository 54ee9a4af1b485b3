"""DeepSpeed's universal checkpoints: a folder a parameter below `zero`, with a file for each of its states.

Of ZeRO 1 and 2 a file holds a table with the tensor under `param`; of ZeRO 3 it is the tensor alone, flat, and its
shape is in the model's own file. Partitioned checkpoints of ranks are recognised and refused: DeepSpeed's own script
makes one of the former out of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rlctl_train.checkpoint.inert_pickle import damaged
from rlctl_train.checkpoint.kinds import huggingface
from rlctl_train.checkpoint.kinds.folder import dtype_words, missing, some
from rlctl_train.checkpoint.stored import Checkpoint, NamedTensor
from rlctl_train.checkpoint.torch_file import FileTensor, as_stored, read_torch_file
from rlctl_train.config.errors import FAILED, UserError

TRACKERS = ("latest_universal", "latest")
WEIGHT = "fp32"
"""The state that is the parameter itself."""
PARTITIONED = "*zero_pp_rank_*_optim_states.pt"
MODEL_STATES = "*model_states.pt"


def recognise(path: Path) -> str | None:
    """Say why a folder is a checkpoint of DeepSpeed's; None where it is none."""
    folder = _tagged(path)
    if any((folder / "zero").glob(f"*/{WEIGHT}.pt")):
        return f"it has zero/PARAMETER/{WEIGHT}.pt"
    # A trainer's folder may have whole weights beside the state that its ranks continue from.
    if huggingface.recognise(path) is not None or not any(folder.glob(PARTITIONED)):
        return None
    return f"it has {PARTITIONED}"


def read(path: Path) -> Checkpoint:
    """Read weights and moments of a universal checkpoint, each from its own file."""
    folder = _tagged(path)
    parameters = sorted(file.parent for file in (folder / "zero").glob(f"*/{WEIGHT}.pt"))
    if not parameters:
        raise _partitioned(folder)
    states = {file: _held(file) for parameter in parameters for file in sorted(parameter.glob("*.pt"))}
    shapes = _shapes_of_flat(folder, {file.parent.name for file, state in states.items() if state.is_flat})
    tensors: dict[str, NamedTensor] = {}
    optimizer: dict[str, NamedTensor] = {}
    notes: list[str] = []
    for file, state in states.items():
        parameter = file.parent.name
        name = parameter if file.stem == WEIGHT else f"state.{parameter}.{file.stem}"
        if state.tensor is None:
            notes.append(f"{parameter}/{file.name} holds no tensor, and is left out")
            continue
        tensor = _reshaped(file, state.tensor, shapes[parameter]) if state.is_flat else state.tensor
        (tensors if file.stem == WEIGHT else optimizer)[name] = as_stored(name, tensor)
    return Checkpoint(
        kind="deepspeed",
        path=path,
        tensors=tensors,
        hf_folder=folder if (folder / "config.json").is_file() else None,
        others={"optimizer": optimizer} if optimizer else {},
        facts={"format": "universal", "dtype": dtype_words(tensors.values()), "tag": folder.name},
        notes=tuple(notes),
        files=tuple(states),
    )


def _tagged(path: Path) -> Path:
    """Return the folder of the step that a tracker file names, or the path itself."""
    for tracker in TRACKERS:
        if (path / tracker).is_file():
            tag = (path / tracker).read_text().strip()
            if tag and Path(tag).name == tag and (path / tag).is_dir():
                return path / tag
    return path


@dataclass(frozen=True)
class _State:
    """What the file of one state of one parameter holds."""

    tensor: FileTensor | None
    is_flat: bool
    """Whether its shape is told elsewhere."""


def _held(file: Path) -> _State:
    held = read_torch_file(file)
    if isinstance(held, dict):
        held = held.get("param")
        return _State(held if isinstance(held, FileTensor) else None, False)
    if not isinstance(held, FileTensor):
        return _State(None, False)
    return _State(held, file.stem != "step")


def _reshaped(file: Path, flat: FileTensor, shape: tuple[int, ...]) -> FileTensor:
    """Return a tensor that lies flat in its own shape; what follows it is the padding of its partitions."""
    if math.prod(flat.shape) < math.prod(shape) or not flat.is_contiguous:
        raise damaged(str(file), f"it holds {math.prod(flat.shape)} numbers, too few for {list(shape)}")
    stride = tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
    return replace(flat, shape=shape, stride=stride)


def _shapes_of_flat(folder: Path, names: set[str]) -> Mapping[str, tuple[int, ...]]:
    """Return the shapes of parameters that lie flat; the model's own file is read for them, and for them alone."""
    shapes: dict[str, tuple[int, ...]] = {}
    for file in sorted(folder.glob(MODEL_STATES)) if names else ():
        held = read_torch_file(file)
        if isinstance(held, dict) and "param_shapes" in held:
            shapes |= dict(_named_shapes(held["param_shapes"]))
            break
    if lost := names - set(shapes):
        raise missing(folder, f"no {MODEL_STATES} tells the shapes of parameters that lie flat: {some(lost)}")
    return shapes


def _named_shapes(groups: Any) -> Iterator[tuple[str, tuple[int, ...]]]:
    for group in groups if isinstance(groups, (list, tuple)) else (groups,):
        if isinstance(group, dict):
            yield from ((str(name), shape) for name, shape in group.items() if isinstance(shape, tuple))


def _partitioned(folder: Path) -> UserError:
    if not any(folder.glob(PARTITIONED)):
        return missing(folder, f"there is neither zero/PARAMETER/{WEIGHT}.pt nor {PARTITIONED}")
    universal = folder.with_name(f"{folder.name}_universal")
    return UserError(
        f"{folder} is partitioned by DeepSpeed's ranks, which only DeepSpeed can put together",
        f"run python -m deepspeed.checkpoint.ds_to_universal --input_folder {folder} --output_folder {universal} and "
        f"name {universal}; or, for weights alone, python zero_to_fp32.py . OUT in {folder.parent} and name OUT",
        exit_code=FAILED,
    )
