"""Files of `torch.save`: every tensor comes back bit for bit, and nothing in a file is ever executed."""

from __future__ import annotations

import io
import os
import pickle
import struct
import zipfile
from collections import OrderedDict, defaultdict
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch._utils import _rebuild_tensor_v2

from rlctl_train.checkpoint.stored import DerivedTensor, StoredTensor
from rlctl_train.checkpoint.torch_file import FileTensor, as_stored, read_torch_file, read_torch_part
from rlctl_train.checkpoint.torch_zip import damaged_records
from rlctl_train.config.errors import UserError
from tests.stored_tensors import assert_same

DTYPES = [
    *(torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.complex64),
    *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.bool),
]


def stored(path: Path) -> dict[str, Any]:
    return {name: as_stored(name, tensor) for name, tensor in read_torch_file(path).items()}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_comes_back(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {"a": torch.arange(-7, 13).reshape(4, 5).to(dtype), "scalar": torch.ones((), dtype=dtype)}
    torch.save(tensors, tmp_path / "file.pt")
    assert_same(stored(tmp_path / "file.pt"), tensors)


def test_views_shared_storages_and_parameters_come_back(tmp_path: Path) -> None:
    whole = torch.randn(6, 4)
    tensors = {
        "whole": whole,
        "tied": whole,
        "rows": whole[2:5],
        "turned": whole.t(),
        "columns": whole[:, 1:3],
        "repeated": whole[:1].expand(1, 4),
        "empty": torch.empty(0, 3),
        "parameter": nn.Parameter(torch.randn(3)),
    }
    torch.save(OrderedDict(tensors), tmp_path / "file.pt")
    found = stored(tmp_path / "file.pt")
    assert_same(found, {name: tensor.detach() for name, tensor in tensors.items()})
    assert isinstance(found["rows"], StoredTensor)
    assert isinstance(found["turned"], DerivedTensor)


def test_what_is_no_tensor_comes_back_too(tmp_path: Path) -> None:
    held = {
        "numbers": [1, 2**40, -1, 0.5, None, True],
        "text": ("a", b"b"),
        3: {"shape": torch.Size([2, 3])},
        "defaults": defaultdict(dict, {"x": {"y": 1}}),
        "set": {1, 2},
    }
    torch.save(held, tmp_path / "file.pt", pickle_protocol=4)
    assert read_torch_file(tmp_path / "file.pt") == held


def test_a_module_s_state_dict_with_its_metadata_is_read(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    torch.save(module.state_dict(), tmp_path / "file.pt")
    assert_same(stored(tmp_path / "file.pt"), module.state_dict())


def test_an_archive_inside_a_larger_file_is_read_where_it_lies(tmp_path: Path) -> None:
    tensor, blob = torch.randn(5, 3), io.BytesIO()
    torch.save(tensor, blob)
    path = tmp_path / "large"
    path.write_bytes(b"x" * 77 + blob.getvalue() + b"PK and something else")
    with path.open("rb") as file:
        found = read_torch_part(file, path, 77, len(blob.getvalue()))
        with pytest.raises(UserError, match="before the 999999 bytes"):
            read_torch_part(file, path, 77, 999_999)
    assert_same({"a": as_stored("a", found)}, {"a": tensor})


def test_files_from_before_torch_1_6_are_read_into_memory(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(4, 3), "b": torch.arange(3)}
    torch.save(tensors, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    assert_same(stored(tmp_path / "old.bin"), tensors)


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.pt").write_text("not a model")
    with pytest.raises(UserError, match="neither a zip archive"):
        read_torch_file(tmp_path / "text.pt")


class Calls:
    """Becomes a call of a function when it is unpickled."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self._call = function, arguments

    def __reduce__(self) -> Any:
        return self._call


def archive(path: Path, data: bytes, records: dict[str, bytes] | None = None) -> Path:
    """Write a torch file with a pickle of one's own."""
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", data)
        for name, content in (records or {"byteorder": b"little"}).items():
            file.writestr(f"archive/{name}", content)
    return path


def tensor_pickle(numel: int, shape: tuple[int, ...], stride: tuple[int, ...], offset: int = 0) -> bytes:
    """Return the pickle of {"a": a tensor} over a record `data/0` that is said to have `numel` floats."""

    class Tensors:
        def __reduce__(self) -> Any:
            return _rebuild_tensor_v2, (Storage(), offset, shape, stride, False, OrderedDict())

    class Storage:
        pass

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj: Any) -> Any:
            return ("storage", torch.FloatStorage, "0", "cpu", numel) if isinstance(obj, Storage) else None

    data = io.BytesIO()
    Pickler(data, 2).dump({"a": Tensors()})
    return data.getvalue()


CANARY = "canary"
TOUCH = f"open({CANARY!r}, 'w').close()"
ATTACKS: dict[str, tuple[bytes, str]] = {
    "os.system": (pickle.dumps({"a": Calls(os.system, f"touch {CANARY}")}, 2), r"refer to posix\.system"),
    "eval": (pickle.dumps(Calls(eval, TOUCH), 2), r"refer to __builtin__\.eval"),
    "exec, protocol 4": (pickle.dumps(Calls(exec, TOUCH), 4), r"refer to builtins\.exec"),
    "a chain of getattr": (pickle.dumps(Calls(getattr, torch.float32, "x"), 2), r"refer to __builtin__\.getattr"),
    "a dotted path through torch": (
        b"\x80\x04\x8c\x05torch\x8c\x17serialization.os.system\x93\x8c\x0ctouch canary\x85R.",
        r"refer to torch\.serialization\.os\.system",
    ),
    "torch.load of a pickle within": (
        b"\x80\x02ctorch.serialization\nload\nX\x04\x00\x00\x00evil\x85R.",
        r"refer to torch\.serialization\.load",
    ),
    "the state of a function": (
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\nN}X\x0c\x00\x00\x00__defaults__K\x01\x85s\x86b.",
        r"set the state of torch\._utils\._rebuild_tensor_v2",
    ),
    "the state of a class": (
        b"\x80\x02ctorch.distributed.tensor\nDTensor\nN}X\x0c\x00\x00\x00__setstate__"
        b"ctorch._utils\n_rebuild_parameter\ns\x86b.",
        r"set the state of torch\.distributed\.tensor\.DTensor",
    ),
    "a call of a class that is only mentioned": (
        b"\x80\x02ctorch\nTensor\n)R.",
        r"call torch\.Tensor",
    ),
    "a call of what it made itself": (b"\x80\x02]K\x01\x85R.", "call what it made itself"),
    "an object array of numpy": (
        pickle.dumps(np.array([Calls(os.system, f"touch {CANARY}")], dtype=object), 2),
        r"refer to (posix\.system|numpy.*)",
    ),
    "INST": (b"(S'touch canary'\nios\nsystem\n.", "use the pickle opcode STRING"),
    "INST without arguments": (b"(ios\nsystem\n.", "use the pickle opcode INST"),
    "OBJ": (b"\x80\x02(cos\nsystem\nX\x0c\x00\x00\x00touch canaryo.", r"refer to os\.system"),
    "OBJ of a known class": (b"\x80\x02(ctorch\nTensor\no.", "use the pickle opcode OBJ"),
    "EXT1": (b"\x80\x02\x82\x01)R.", "use the pickle opcode EXT1"),
    "NEWOBJ_EX": (b"\x80\x04ctorch\nTensor\n)}\x92.", "use the pickle opcode NEWOBJ_EX"),
    "a persistent id of text": (b"\x80\x02Pevil\n.", "use the pickle opcode PERSID"),
    "another kind of persistent id": (b"\x80\x02X\x04\x00\x00\x00evilQ.", "asks for something that is no storage"),
    "a deep key": (b"\x80\x02})" + b"\x85" * 100_000 + b"K\x01s.", "neither text nor number"),
    "a long string that is not there": (b"\x80\x04\x8d" + struct.pack("<Q", 2**50) + b"ab.", "makes no sense"),
    "a memo of four billion": (b"\x80\x02r\xff\xff\xff\xff.", "makes no sense"),
    "no end": (b"\x80\x02}", "makes no sense|has no end"),
    "too little on the stack": (b"\x80\x02\x87.", "makes no sense"),
    "a dtype of another sort": (b"\x80\x02ctorch\nSize\n]K\xffNe\x85R.", "makes no sense"),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_what_would_run_or_harm_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, attack: str) -> None:
    monkeypatch.chdir(tmp_path)
    data, message = ATTACKS[attack]
    path = archive(tmp_path / "evil.pt", data)
    with pytest.raises(UserError, match=message) as caught:
        read_torch_file(path)
    assert "evil.pt" in caught.value.what
    assert not (tmp_path / CANARY).exists()
    assert _rebuild_tensor_v2.__defaults__ == (None,)


def test_an_object_of_a_known_class_is_its_name_and_what_was_said_of_it(tmp_path: Path) -> None:
    shard = b"ctorch.distributed.tensor.placement_types\nShard\n"
    data = b"\x80\x02(" + shard + b"K\x01\x85R" + shard + b")\x81}X\x03\x00\x00\x00dimK\x02sbt."
    called, built = read_torch_file(archive(tmp_path / "file.pt", data))
    assert (called.kind, called.arguments, called.fields) == ("Shard", (1,), {})
    assert (built.kind, built.arguments, built.fields) == ("Shard", (), {"dim": 2})


def test_old_files_that_would_run_code_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"a": Calls(os.system, f"touch {CANARY}")}, "old.bin", _use_new_zipfile_serialization=False)
    with pytest.raises(UserError, match=r"refer to posix\.system"):
        read_torch_file(tmp_path / "old.bin")
    assert not (tmp_path / CANARY).exists()


@pytest.mark.parametrize(
    ("shape", "stride", "offset"),
    [((2**40,), (1,), 0), ((5,), (1,), 0), ((4,), (1,), 1), ((2, 2), (3, 1), 0), ((2**40,), (0,), 0), ((4,), (1,), 9)],
)
def test_a_tensor_larger_than_its_record_is_refused_by_name(
    tmp_path: Path, shape: tuple[int, ...], stride: tuple[int, ...], offset: int
) -> None:
    path = archive(tmp_path / "file.pt", tensor_pickle(4, shape, stride, offset), {"data/0": bytes(16)})
    with pytest.raises(UserError, match=r"a claims .* bytes, but its record has"):
        stored(path)


def test_a_tensor_that_fits_its_record_is_read(tmp_path: Path) -> None:
    path = archive(tmp_path / "file.pt", tensor_pickle(4, (2, 2), (2, 1)), {"data/0": bytes(16)})
    assert_same(stored(path), {"a": torch.zeros(2, 2)})


@pytest.mark.parametrize("shape", [(-1,), (2.0,), (True,), (2**63,), (1,) * 65])
def test_shapes_that_no_tensor_has_are_refused(tmp_path: Path, shape: tuple[Any, ...]) -> None:
    path = archive(tmp_path / "file.pt", tensor_pickle(4, shape, (1,) * len(shape)), {"data/0": bytes(16)})
    with pytest.raises(UserError, match="a shape, stride or offset that no tensor has"):
        read_torch_file(path)


def test_a_storage_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no record data/0"):
        read_torch_file(archive(tmp_path / "file.pt", tensor_pickle(4, (4,), (1,))))


def test_big_endian_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="big-endian"):
        read_torch_file(archive(tmp_path / "file.pt", b"\x80\x02}.", {"byteorder": b"big"}))


def test_compressed_records_are_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "file.pt", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("archive/data.pkl", b"\x80\x02}" + b"0" * 1000)
    with pytest.raises(UserError, match="compress or encrypt its record archive/data"):
        read_torch_file(tmp_path / "file.pt")


def test_two_records_of_one_name_are_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "file.pt", "w") as file:
        file.writestr("archive/data.pkl", b"\x80\x02}.")
        with pytest.warns(UserWarning, match="Duplicate name"):
            file.writestr("archive/data.pkl", b"\x80\x02}.")
    with pytest.raises(UserError, match="two records of one name"):
        read_torch_file(tmp_path / "file.pt")


def test_torchscript_and_other_archives_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="TorchScript"):
        read_torch_file(archive(tmp_path / "script.pt", b"\x80\x02}.", {"constants.pkl": b""}))
    with zipfile.ZipFile(tmp_path / "other.pt", "w") as file:
        file.writestr("readme", "")
    with pytest.raises(UserError, match="not one of torch's"):
        read_torch_file(tmp_path / "other.pt")


def saved(path: Path) -> tuple[Path, FileTensor]:
    torch.save({"a": torch.arange(1000.0)}, path)
    return path, read_torch_file(path)["a"]


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.9, 0.999])
def test_a_file_that_was_cut_off_is_damaged(tmp_path: Path, keep: float) -> None:
    path, _ = saved(tmp_path / "file.pt")
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])
    with pytest.raises(UserError, match=r"file\.pt"):
        read_torch_file(path)


def test_a_record_that_points_beyond_the_file_is_damaged(tmp_path: Path) -> None:
    path, _ = saved(tmp_path / "file.pt")
    data = bytearray(path.read_bytes())
    entry = data.rindex(b"PK\x01\x02", 0, data.rindex(b"/data/0"))
    struct.pack_into("<II", data, entry + 20, 2**30, 2**30)
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"its record file/data/0 lies beyond its end"):
        read_torch_file(path)


def test_a_flipped_bit_is_found_by_the_archive_s_own_checksums(tmp_path: Path) -> None:
    path, tensor = saved(tmp_path / "file.pt")
    assert damaged_records(path) == []
    data = bytearray(path.read_bytes())
    data[tensor.offset + 1234] ^= 4
    path.write_bytes(data)
    assert damaged_records(path) == ["file/data/0"]


def test_only_the_bytes_of_a_tensor_are_read(tmp_path: Path) -> None:
    path, tensor = saved(tmp_path / "file.pt")
    with path.open("r+b") as file:
        file.truncate(tensor.offset + 16)
    head = StoredTensor("a", torch.float32, (4,), as_stored("a", tensor).pieces)  # type: ignore[union-attr]
    assert isinstance(head, StoredTensor)
    with pytest.raises(EOFError):
        as_stored("a", tensor).read()


def test_random_bytes_never_do_more_than_fail(tmp_path: Path) -> None:
    path, _ = saved(tmp_path / "file.pt")
    with zipfile.ZipFile(path) as file:
        data = file.read("file/data.pkl")
    draw = torch.Generator().manual_seed(0)
    for _ in range(300):
        changed = bytearray(data)
        for place in torch.randint(len(data), (3,), generator=draw).tolist():
            changed[place] = int(torch.randint(256, (1,), generator=draw))
        target = archive(tmp_path / "changed.pt", bytes(changed), {"data/0": bytes(4000)})
        with suppress(UserError):
            read_torch_file(target)
