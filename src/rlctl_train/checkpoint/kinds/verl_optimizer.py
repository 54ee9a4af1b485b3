"""Optimizer state in verl's checkpoints: moments by parameter, which FSDP2 numbers and FSDP1 names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlctl_train.checkpoint.inert_pickle import damaged
from rlctl_train.checkpoint.kinds.folder import missing, some
from rlctl_train.checkpoint.mesh import joined
from rlctl_train.checkpoint.stored import Contents, NamedTensor, Part
from rlctl_train.checkpoint.torch_file import FileTensor, MeshTensor, read_torch_file

MOMENT = "exp_avg"
"""The state whose shape is its parameter's."""
TOLD = ("lr", "betas", "eps", "weight_decay")
Shard = MeshTensor | FileTensor


def find_optimizer(
    folder: Path, world_size: int, num_used: int, parameters: Sequence[tuple[str, Shard]]
) -> Part | None:
    """Return `state.PARAMETER.exp_avg` and the like, in the files of the first `num_used` ranks; None without files.

    `parameters` are those of the model, in its order.
    """
    files = [folder / f"optim_world_size_{world_size}_rank_{rank}.pt" for rank in range(world_size)]
    if not any(file.is_file() for file in files):
        return None
    return Part(lambda: _read(files, num_used, parameters))


def _read(files: Sequence[Path], num_used: int, parameters: Sequence[tuple[str, Shard]]) -> Contents:
    lost = [file.name for file in files if not file.is_file()]
    if lost:
        raise missing(files[0].parent, f"{len(lost)} of {len(files)} optimizer files are missing: {some(lost)}")
    ranks = [_Rank.of(file) for file in files[:num_used]]
    names = _names(ranks[0], parameters)
    notes = [] if names is not None else ["parameters of the optimizer state are numbered, and cannot be named"]
    tensors: dict[str, NamedTensor] = {}
    for key, own in ranks[0].state.items():
        for part in own:
            held = [rank.state.get(key, {}).get(part) for rank in ranks]
            name = f"state.{names[key] if names is not None else key}.{part}"
            if any(not isinstance(value, (MeshTensor, FileTensor)) for value in held):
                notes.append(f"{name} is no tensor on every rank, and is left out")
                continue
            found = [value for value in held if isinstance(value, (MeshTensor, FileTensor))]
            whole_shape = found[0].shape if not found[0].shape else None
            tensors[name] = joined(name, found, whole_shape)
    return Contents(tensors, _facts(ranks[0]), tuple(notes))


@dataclass(frozen=True)
class _Rank:
    """One rank's optimizer file."""

    state: dict[Any, dict[str, Any]]
    groups: list[dict[str, Any]]

    @classmethod
    def of(cls, file: Path) -> _Rank:
        held = read_torch_file(file)
        if not isinstance(held, dict) or not isinstance(held.get("state"), dict):
            raise damaged(str(file), "it holds no optimizer state")
        state = {key: value for key, value in held["state"].items() if isinstance(value, dict)}
        groups = [group for group in held.get("param_groups", ()) if isinstance(group, dict)]
        return cls(state, groups)


def _names(rank: _Rank, parameters: Sequence[tuple[str, Shard]]) -> dict[Any, str] | None:
    """Return the name of each key of the state; None where numbers cannot be told to be those of the parameters."""
    if all(isinstance(key, str) for key in rank.state):
        return {key: key for key in rank.state}
    ordered = _without_tied(parameters)
    numbers = [number for group in rank.groups for number in group.get("params", ())]
    if sorted(numbers, key=str) != sorted(range(len(ordered)), key=str):
        return None
    for key, own in rank.state.items():
        moment = own.get(MOMENT)
        if isinstance(moment, (MeshTensor, FileTensor)) and moment.shape != ordered[key][1].shape:
            return None
    return {key: ordered[key][0] for key in rank.state}


def _without_tied(parameters: Sequence[tuple[str, Shard]]) -> list[tuple[str, Shard]]:
    """Drop names that stand for the same bytes as an earlier one: an optimizer has them once."""
    seen: set[tuple[Path, int, tuple[int, ...]]] = set()
    kept: list[tuple[str, Shard]] = []
    for name, part in parameters:
        local = part.local if isinstance(part, MeshTensor) else part
        place = (local.file, local.offset, local.shape)
        if local.nbytes and place in seen:
            continue
        seen.add(place)
        kept.append((name, part))
    return kept


def _facts(rank: _Rank) -> dict[str, str | int]:
    group: Mapping[str, Any] = rank.groups[0] if rank.groups else {}
    return {f"optimizer_{key}": str(group[key]) for key in TOLD if isinstance(group.get(key), (int, float, tuple))}
