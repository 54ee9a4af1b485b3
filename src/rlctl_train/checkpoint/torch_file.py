"""Files that `torch.save` wrote, read as tensors that stay where they are: in the file, or in a part of a larger one.

The pickle inside is read by `inert_pickle`, which makes nothing and calls nothing. What it says of a tensor is believed
only as far as the file has bytes for it. A shape or stride is in elements, an offset in bytes of the whole file.
"""

from __future__ import annotations

import math
import os
import pickle
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from rlctl_train.checkpoint.inert_pickle import Instance, Known, Name, checked_key, damaged, read_pickle, refused
from rlctl_train.checkpoint.stored import DerivedTensor, NamedTensor, Piece, StoredTensor
from rlctl_train.checkpoint.torch_zip import STORAGES, Archive, Storage, is_torch_zip

MOST_DIMENSIONS = 64
DTYPES = {f"torch.{name}": value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}
DISTRIBUTED = frozenset({
    "DTensor", "DTensorSpec", "TensorMeta", "DeviceMesh", "_MeshLayout", "_FlatLayout", "ShardOrderEntry",
    "Shard", "_StridedShard", "Replicate", "Partial", "_Partial",
})  # fmt: skip
"""Classes below `torch.distributed` that a DTensor's pickle refers to; their modules differ between versions."""
OTHER_CLASSES = frozenset({"deepspeed.checkpoint.universal_checkpoint.SubparamShape"})
INERT = frozenset(
    {
        "torch.Tensor",
        "torch.nn.parameter.Parameter",
        "builtins.dict",
        "builtins.list",
        "__builtin__.dict",
        "__builtin__.list",
    }
)
"""Names that a pickle may mention, but not call."""


@dataclass(frozen=True)
class FileTensor:
    """A tensor whose elements lie in a record of a file; nothing is known yet of whether the record has them all."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    file: Path
    offset: int
    """Of its first element."""
    room: int
    """Bytes of its record from there on."""
    checksum: int
    """CRC-32 of the whole record, as the file has it."""

    @property
    def nbytes(self) -> int:
        """Return its size in bytes, were it contiguous."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def is_contiguous(self) -> bool:
        """Say whether its elements follow each other in C order."""
        expected = 1
        for size, stride in zip(reversed(self.shape), reversed(self.stride), strict=True):
            if size != 1 and stride != expected:
                return math.prod(self.shape) == 0
            expected *= size
        return True

    @property
    def span(self) -> int:
        """Return how many elements lie from its first to its last."""
        if math.prod(self.shape) == 0:
            return 0
        return 1 + sum((size - 1) * stride for size, stride in zip(self.shape, self.stride, strict=True))

    def read(self) -> Tensor:
        """Return it in memory of its own, contiguous."""
        flat = StoredTensor("", self.dtype, (self.span,), (Piece(self.file, self.offset, (0,), (self.span,)),)).read()
        return flat.as_strided(self.shape, self.stride).contiguous()


@dataclass(frozen=True)
class Placement:
    """How a tensor lies over one axis of a mesh."""

    kind: str
    """`Shard`, `Replicate`, or the name of another class of torch's."""
    dim: int = 0
    """The dimension that is cut, of a shard."""


@dataclass(frozen=True)
class MeshTensor:
    """One rank's part of a DTensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    """Of the whole tensor."""
    axes: tuple[str, ...]
    """Names of the mesh's axes; empty where they have none."""
    mesh_shape: tuple[int, ...]
    coordinate: tuple[int, ...] | None
    """Of this rank in the mesh, where its writer put that down."""
    placements: tuple[Placement, ...]
    local: FileTensor


def read_torch_file(path: Path) -> Any:
    """Return what `torch.save` put into a file; raises UserError for all that is not plain data.

    Tensors come as `FileTensor` and `MeshTensor`, in dictionaries, lists and tuples as they were. A file from before
    torch 1.6 comes with tensors in memory.
    """
    if not is_torch_zip(path):
        return _read_legacy(path)
    with path.open("rb") as file:
        return _held(Archive(file, path, str(path), 0, os.fstat(file.fileno()).st_size), str(path))


def read_torch_part(file: BinaryIO, path: Path, offset: int, length: int) -> Any:
    """Return what `torch.save` put into a part of an open file, as `read_torch_file` does of a whole one."""
    where = f"{path} at byte {offset}"
    return _held(Archive(file, path, where, offset, length), where)


def as_stored(name: str, tensor: FileTensor | Tensor) -> NamedTensor:
    """Return one tensor of a file under a name; raises UserError where the file has fewer bytes than it claims."""
    if isinstance(tensor, Tensor):
        return DerivedTensor(name, tensor.dtype, tuple(tensor.shape), lambda: tensor.detach().clone())
    return assembled(name, tensor.dtype, tensor.shape, [((0,) * len(tensor.shape), tensor)])


def assembled(
    name: str, dtype: torch.dtype, shape: tuple[int, ...], parts: Sequence[tuple[tuple[int, ...], FileTensor]]
) -> NamedTensor:
    """Return the tensor that parts make up, each from its start index on; none of them may claim what is not there."""
    for _, part in parts:
        _check_room(name, part)
    if all(part.is_contiguous for _, part in parts):
        pieces = tuple(Piece(part.file, part.offset, start, part.shape) for start, part in parts)
        return StoredTensor(name, dtype, shape, pieces)

    def make() -> Tensor:
        whole = torch.empty(shape, dtype=dtype)
        for start, part in parts:
            whole[tuple(slice(a, a + n) for a, n in zip(start, part.shape, strict=True))] = part.read()
        return whole

    return DerivedTensor(name, dtype, shape, make)


def checked_sizes(values: Any) -> tuple[int, ...]:
    """Return what a file says of a shape, strides or offsets; raises ValueError or TypeError for what no tensor has."""
    values = tuple(values)
    if len(values) > MOST_DIMENSIONS or any(type(value) is not int or not 0 <= value < 2**62 for value in values):
        raise ValueError("a shape, stride or offset that no tensor has")
    return values


@dataclass(frozen=True)
class _Wrapper:
    """What is said of a tensor subclass before its own fields are known."""

    dtype: torch.dtype
    shape: tuple[int, ...]


def _held(archive: Archive, where: str) -> Any:
    return read_pickle(archive.pickle(), KNOWN, archive.storage, where)


def _read_legacy(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, TypeError, KeyError, IndexError) as error:
        # Its own message advises to load the file without the safeguard.
        if unsafe := re.search(r"GLOBAL (\S+)", str(error)):
            raise refused(str(path), f"refer to {unsafe[1]}") from error
        raise damaged(str(path), "it is neither a zip archive of torch's nor a file from before torch 1.6") from error


def _check_room(name: str, part: FileTensor) -> None:
    needed = max(part.nbytes, part.span * part.dtype.itemsize)
    if needed > part.room:
        raise damaged(str(part.file), f"{name} claims {needed} bytes, but its record has {part.room} left")


def _tensor(
    storage: Any, offset: Any, shape: Any, stride: Any, *_: Any, dtype: torch.dtype | None = None
) -> FileTensor:
    if type(storage) is not Storage:
        raise TypeError("a tensor without a storage")
    kind = dtype or storage.dtype
    shape, stride = checked_sizes(shape), checked_sizes(stride)
    (first,) = checked_sizes((offset,))
    if len(shape) != len(stride):
        raise ValueError("a tensor whose shape and strides differ in length")
    skipped = first * kind.itemsize
    return FileTensor(
        kind, shape, stride, storage.file, storage.offset + skipped, storage.num_bytes - skipped, storage.checksum
    )


def _tensor_v3(
    storage: Any, offset: Any, shape: Any, stride: Any, _grad: Any, _hooks: Any, dtype: Any, *_: Any
) -> FileTensor:
    return _tensor(storage, offset, shape, stride, dtype=DTYPES[dtype.text])


def _wrapper(_kind: Any, dtype: Any, shape: Any, *_: Any) -> _Wrapper:
    return _Wrapper(DTYPES[dtype.text], checked_sizes(shape))


def _of_type(function: Any, kind: Any, arguments: Any, state: Any) -> Any:
    """Stand for `torch._tensor._rebuild_from_type_v2`: a tensor with attributes, or a DTensor."""
    if type(function) is not Name or function.text not in REBUILDERS or type(arguments) is not tuple:
        raise TypeError("a tensor that is made by no function of torch's")
    made = REBUILDERS[function.text](*arguments)
    if type(made) is not _Wrapper:
        return made
    if type(kind) is not Name or kind.text.rpartition(".")[2] != "DTensor":
        raise TypeError(f"a tensor of the unknown kind {kind.text if type(kind) is Name else kind!r}")
    fields = state[1] if type(state) is tuple else state
    local, spec = fields["_local_tensor"], fields["_spec"]
    mesh = spec.fields["mesh"]
    if type(local) is not FileTensor:
        raise TypeError("a DTensor without a local tensor")
    placements = tuple(_placement(placement) for placement in spec.fields["placements"])
    return MeshTensor(
        made.dtype, made.shape, _mesh_names(mesh), _mesh_shape(mesh), _coordinate(mesh), placements, local
    )


def _placement(placement: Instance) -> Placement:
    """Return a placement, whose dimension versions of torch keep in a field, a bare state or an argument."""
    arguments = placement.arguments[0] if placement.arguments else 0
    dim = placement.fields.get("dim", placement.fields.get("state", arguments))
    return Placement(placement.kind, dim if type(dim) is int else 0)


def _mesh_names(mesh: Instance) -> tuple[str, ...]:
    names = mesh.fields.get("_mesh_dim_names") or mesh.fields.get("mesh_dim_names") or ()
    return tuple(str(name) for name in names)


def _mesh_shape(mesh: Instance) -> tuple[int, ...]:
    """Return the size of each axis, which versions of torch keep in a tensor of ranks or in a layout."""
    if (ranks := mesh.fields.get("mesh", mesh.fields.get("_mesh"))) is not None:
        return ranks.shape
    layout = mesh.fields["_layout"]
    if "axes" in layout.fields:
        return tuple(_product(axis.fields["shape"]) for axis in layout.fields["axes"])
    shape = layout.fields["shape"] if "shape" in layout.fields else layout.arguments[0]
    return tuple(_product(size) for size in shape) if type(shape) is tuple else (_product(shape),)


def _product(size: Any) -> int:
    return math.prod(checked_sizes(size if type(size) is tuple else (size,)))


def _coordinate(mesh: Instance) -> tuple[int, ...] | None:
    value = mesh.fields.get("_coordinate_on_dim")
    return None if value is None else checked_sizes(value)


REBUILDERS: Mapping[str, Any] = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
    "torch._utils._rebuild_parameter": lambda data, *_: data,
    "torch._utils._rebuild_parameter_with_state": lambda data, *_: data,
    "torch._utils._rebuild_wrapper_subclass": _wrapper,
}
CALLS: Mapping[str, Any] = {
    **REBUILDERS,
    "torch._tensor._rebuild_from_type_v2": _of_type,
    "torch.Size": checked_sizes,
    "torch.device": lambda *parts: ":".join(str(part) for part in parts if isinstance(part, (str, int))),
    "torch.serialization._get_layout": lambda text: Name(str(text)) if type(text) is str else None,
    "collections.OrderedDict": lambda items=(): {checked_key(key): value for key, value in items},
    "collections.defaultdict": lambda *_: {},
}


def _is_class(name: str) -> bool:
    own_name = name.rpartition(".")[2]
    return (name.startswith("torch.distributed.") and own_name in DISTRIBUTED) or name in OTHER_CLASSES


def _is_constant(name: str) -> bool:
    return name in DTYPES or name in INERT or name.removeprefix("torch.") in STORAGES


KNOWN = Known(CALLS, _is_class, _is_constant)
