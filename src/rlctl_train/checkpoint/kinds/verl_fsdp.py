"""verl's FSDP checkpoints: one file a rank, `model_world_size_W_rank_R.pt`, of DTensors or of plain tensors.

With replicas (HSDP) the ranks of the first row hold a whole model, and their files alone are read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlctl_train.checkpoint.expected import expected
from rlctl_train.checkpoint.inert_pickle import damaged
from rlctl_train.checkpoint.kinds.folder import dtype_words, missing, read_table, some
from rlctl_train.checkpoint.kinds.verl_lora import split_adapter
from rlctl_train.checkpoint.kinds.verl_optimizer import find_optimizer
from rlctl_train.checkpoint.mesh import joined, num_shards
from rlctl_train.checkpoint.stored import Checkpoint, NamedTensor
from rlctl_train.checkpoint.torch_file import FileTensor, MeshTensor, read_torch_file
from rlctl_train.config.errors import FAILED, UserError

TRACKER = "latest_checkpointed_iteration.txt"
FILES = "model_world_size_*_rank_*.pt"
MODEL_FILE = re.compile(r"model_world_size_(\d+)_rank_(\d+)\.pt$")
ROLES = ("actor", "critic")
"""Folders of a step, in the order of preference."""


def recognise(path: Path) -> str | None:
    """Say why a folder is a checkpoint of verl's, of one role, one step or a run; None where it is none."""
    if (path / TRACKER).is_file() and any(any(path.glob(f"global_step_*/{under}{FILES}")) for under in ("", "*/")):
        return f"it has {TRACKER}"
    if any(path.glob(FILES)):
        return f"it has {FILES}"
    role = next((role for role in ROLES if any(path.glob(f"{role}/{FILES}"))), None)
    return None if role is None else f"it has {role}/{FILES}"


def read(path: Path) -> Checkpoint:
    """Read the weights of the actor, or of the role whose folder is named, and its optimizer state."""
    folder, notes = _find(path)
    ranks = _find_ranks(folder)
    shards = [_named_tensors(file) for file in ranks.used(_mesh_of)]
    tensors = join_ranks(shards, folder)
    tensors, adapter, lora_notes = split_adapter(tensors, folder)
    optimizer = find_optimizer(folder, ranks.size, len(shards), list(shards[0].items()))
    hf_folder = folder / "huggingface"
    return Checkpoint(
        kind="verl-fsdp",
        path=path,
        tensors=tensors,
        hf_folder=hf_folder if (hf_folder / "config.json").is_file() else None,
        adapter=adapter,
        others={} if optimizer is None else {"optimizer": optimizer},
        facts=_facts(folder, ranks, shards[0], tensors),
        notes=(*notes, *lora_notes),
        files=tuple(sorted(file for file in folder.rglob("*") if file.is_file())),
    )


def join_ranks(shards: list[dict[str, MeshTensor | FileTensor]], folder: Path) -> dict[str, NamedTensor]:
    """Join what each rank holds under the same names; raises UserError where they do not hold the same ones."""
    names = shards[0]
    for rank, own in enumerate(shards):
        if set(own) != set(names):
            raise UserError(
                f"{folder}: ranks 0 and {rank} hold different tensors: {some(set(own) ^ set(names))}",
                "copy the checkpoint again, every rank's file of one step",
                exit_code=FAILED,
            )
    plain = len(shards) > 1 and any(isinstance(value, FileTensor) for value in names.values())
    shapes = _model_shapes(folder / "huggingface") if plain else {}
    return {name: joined(name, [own[name] for own in shards], shapes.get(_base_name(name))) for name in names}


@dataclass(frozen=True)
class _Ranks:
    """The model files of a folder, by rank."""

    files: tuple[Path, ...]

    @property
    def size(self) -> int:
        return len(self.files)

    def used(self, mesh_of: Any) -> tuple[Path, ...]:
        """Return the files of the first replica: all of them where the model is not replicated."""
        return self.files[: mesh_of(self.files)]


def _mesh_of(files: tuple[Path, ...]) -> int:
    """Return how many ranks shard one copy of the model."""
    example = next((v for v in _named_tensors(files[0]).values() if isinstance(v, MeshTensor)), None)
    if example is None:
        return len(files)
    size = 1
    for axis in example.mesh_shape:
        size *= axis
    if size != len(files):
        raise damaged(str(files[0]), f"it is of a mesh of {size} ranks, but named as one of {len(files)}")
    return num_shards(example)


def _find(path: Path) -> tuple[Path, list[str]]:
    """Return the folder that holds the ranks' files, and what else lies beside it."""
    notes: list[str] = []
    if (path / TRACKER).is_file() and not any(path.glob("model_world_size_*")):
        step = (path / TRACKER).read_text().strip()
        path = path / f"global_step_{step}"
        if not step.isdigit() or not path.is_dir():
            raise missing(path, f"{TRACKER} names this step, but there is no such folder")
        notes.append(f"{TRACKER} names step {step}")
    if any(path.glob(FILES)):
        return path, notes
    roles = [role for role in ROLES if any((path / role).glob(FILES))]
    if not roles:
        raise missing(path, "there is no model_world_size_W_rank_R.pt, nor actor or critic with such files")
    if roles[1:]:
        notes.append(f"this is {roles[0]}; beside it lies {', '.join(roles[1:])}: name its folder to read that")
    return path / roles[0], notes


def _find_ranks(folder: Path) -> _Ranks:
    found: dict[int, dict[int, Path]] = {}
    for file in folder.iterdir():
        if match := MODEL_FILE.match(file.name):
            found.setdefault(int(match[1]), {})[int(match[2])] = file
    if len(found) != 1:
        sizes = " and ".join(str(size) for size in sorted(found))
        raise UserError(
            f"{folder}: there are files of {sizes or 'no'} ranks side by side",
            "keep those of one save alone in the folder",
            exit_code=FAILED,
        )
    ((size, files),) = found.items()
    if lost := sorted(set(range(size)) - set(files)):
        names = some(f"model_world_size_{size}_rank_{rank}.pt" for rank in lost)
        raise missing(folder, f"{len(lost)} of {size} ranks are missing: {names}")
    return _Ranks(tuple(files[rank] for rank in range(size)))


def _named_tensors(file: Path) -> dict[str, MeshTensor | FileTensor]:
    held = read_torch_file(file)
    if not isinstance(held, dict):
        raise damaged(str(file), f"it holds a {type(held).__name__} in place of named tensors")
    odd = [str(name) for name, value in held.items() if not isinstance(value, (MeshTensor, FileTensor))]
    if odd:
        raise damaged(str(file), f"it holds things that are no tensors: {some(odd)}")
    return {str(name): value for name, value in held.items()}


def _model_shapes(hf_folder: Path) -> Mapping[str, tuple[int, ...]]:
    """Return the shapes of the model that config.json describes, by name; none without a config."""
    if not (hf_folder / "config.json").is_file():
        return {}
    known = expected(read_table(hf_folder / "config.json"), hf_folder, trust_remote_code=False)
    if isinstance(known, str):
        raise UserError(
            f"{hf_folder} does not tell the shapes of the model: {known}",
            "the ranks' files hold plain tensors, which need them to be joined: put the model's own config.json there",
            exit_code=FAILED,
        )
    return known.shapes


def _base_name(name: str) -> str:
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".")


def _facts(
    folder: Path, ranks: _Ranks, shard: Mapping[str, MeshTensor | FileTensor], tensors: Mapping[str, NamedTensor]
) -> dict[str, str | int]:
    facts: dict[str, str | int] = {"world_size": ranks.size, "dtype": dtype_words(tensors.values())}
    if (folder / "fsdp_config.json").is_file():
        facts["FSDP_version"] = str(read_table(folder / "fsdp_config.json").get("FSDP_version", "unknown"))
    step = next((part for part in (folder.name, folder.parent.name) if part.startswith("global_step_")), None)
    if step is not None:
        facts["step"] = step.removeprefix("global_step_")
    example = next((value for value in shard.values() if isinstance(value, MeshTensor)), None)
    if example is None:
        facts["layout"] = "plain tensors"
    else:
        axes = example.axes or tuple(str(place) for place in range(len(example.mesh_shape)))
        facts["layout"] = " x ".join(f"{name} {size}" for name, size in zip(axes, example.mesh_shape, strict=True))
    return facts
