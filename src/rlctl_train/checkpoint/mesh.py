"""One tensor from the parts that ranks hold of it: sharded over a mesh, replicated, or cut without saying how.

R: ranks, F: ranks that shard one copy of the model (all of them, or a row of an HSDP mesh).
"""

from __future__ import annotations

from collections.abc import Sequence

from rlctl_train.checkpoint.stored import NamedTensor
from rlctl_train.checkpoint.torch_file import FileTensor, MeshTensor, Placement, assembled
from rlctl_train.config.errors import FAILED, UserError

REMEDY = "copy the checkpoint again from where it was written, every rank's file of one step"


def num_shards(example: MeshTensor) -> int:
    """Return F, in how many parts one copy of the model lies; the axis that shards is the last of the mesh."""
    return example.mesh_shape[-1]


def joined(name: str, parts: Sequence[MeshTensor | FileTensor], whole_shape: tuple[int, ...] | None) -> NamedTensor:
    """Return the tensor that the parts of F ranks make up, in the order of ranks.

    `whole_shape` is what the model says where the parts are plain tensors; None where it is not known.
    """
    first = parts[0]
    if any(part.dtype != first.dtype for part in parts):
        raise _disagree(name, "dtypes", {str(part.dtype) for part in parts})
    if isinstance(first, MeshTensor):
        same = [part for part in parts if isinstance(part, MeshTensor)]
        if len(same) != len(parts):
            raise UserError(f"{name} is a DTensor on some ranks and a plain tensor on others", REMEDY, exit_code=FAILED)
        return _from_mesh(name, first, same)
    plain = [part for part in parts if isinstance(part, FileTensor)]
    if len(plain) != len(parts):
        raise UserError(f"{name} is a plain tensor on some ranks and a DTensor on others", REMEDY, exit_code=FAILED)
    return _from_plain(name, plain, whole_shape)


def _from_mesh(name: str, first: MeshTensor, parts: Sequence[MeshTensor]) -> NamedTensor:
    if any((part.shape, part.placements) != (first.shape, first.placements) for part in parts):
        raise _disagree(name, "shapes or placements", {f"{part.shape}, {part.placements}" for part in parts})
    *outer, inner = first.placements
    if any(placement.kind != "Replicate" for placement in outer) or inner.kind not in ("Replicate", "Shard"):
        raise _unreadable(name, first)
    for rank, part in enumerate(parts):
        if part.coordinate is not None and part.coordinate[-1] != rank:
            raise UserError(
                f"the file of rank {rank} holds what rank {part.coordinate[-1]} of the mesh wrote: files are swapped",
                REMEDY,
                exit_code=FAILED,
            )
    locals_ = [part.local for part in parts]
    if inner.kind == "Replicate" or not first.shape:
        return _replicated(name, first.shape, locals_)
    return _cut_along(name, inner, first.shape, locals_)


def _cut_along(name: str, placement: Placement, shape: tuple[int, ...], parts: Sequence[FileTensor]) -> NamedTensor:
    dim, at, placed = placement.dim, 0, []
    for rank, part in enumerate(parts):
        rows = part.shape[dim] if len(part.shape) == len(shape) else 0
        own = tuple(rows if axis == dim else size for axis, size in enumerate(shape))
        if part.shape != own and 0 not in part.shape:
            raise _shapes(name, shape, f"rank {rank} has {list(part.shape)}")
        if 0 not in part.shape:
            placed.append((tuple(at if axis == dim else 0 for axis in range(len(shape))), part))
            at += rows
    if at != shape[dim] and 0 not in shape:
        raise _shapes(name, shape, f"its parts have {at} of {shape[dim]} along dimension {dim}")
    return assembled(name, parts[0].dtype, shape, placed)


def _replicated(name: str, shape: tuple[int, ...], parts: Sequence[FileTensor]) -> NamedTensor:
    for rank, part in enumerate(parts):
        if part.shape != shape:
            raise _shapes(name, shape, f"rank {rank} has {list(part.shape)}")
    return assembled(name, parts[0].dtype, shape, [((0,) * len(shape), parts[0])])


def _from_plain(name: str, parts: Sequence[FileTensor], shape: tuple[int, ...] | None) -> NamedTensor:
    """Join plain tensors as the model's own shape says: all of them whole and the same, or rows one after another."""
    if len(parts) == 1:
        return _replicated(name, parts[0].shape, parts)
    if shape is None:
        raise UserError(
            f"{name} is a plain tensor on each of {len(parts)} ranks, and nothing says how they make up one",
            "put config.json of the model into the folder huggingface beside the ranks' files",
            exit_code=FAILED,
        )
    if all(part.shape == shape for part in parts):
        if len({part.checksum for part in parts}) > 1:
            raise UserError(f"every rank holds {name} whole, but not with the same values", REMEDY, exit_code=FAILED)
        return _replicated(name, shape, parts)
    return _cut_along(name, Placement("Shard", 0), shape, parts)


def _disagree(name: str, what: str, found: set[str]) -> UserError:
    return UserError(f"ranks disagree about {what} of {name}: {'; '.join(sorted(found))}", REMEDY, exit_code=FAILED)


def _shapes(name: str, shape: tuple[int, ...], what: str) -> UserError:
    return UserError(f"{name} should be {list(shape)}, but {what}", REMEDY, exit_code=FAILED)


def _unreadable(name: str, part: MeshTensor) -> UserError:
    layout = ", ".join(f"{p.kind}({p.dim})" if "Shard" in p.kind else p.kind for p in part.placements)
    return UserError(
        f"{name} lies as ({layout}) over a mesh {part.axes or part.mesh_shape}, which cannot be joined",
        "save it with FSDP alone, or with replicas of it",
        exit_code=FAILED,
    )
