"""The writer of safetensors files: exact bytes, whatever dtype and pieces, and memory that does not grow."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import zlib
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from rlctl_train.checkpoint import safetensors_writer, store
from rlctl_train.checkpoint.safetensors_writer import BLOCK_BYTES, DTYPES, Finished, Output, WeightFile, arrange, write
from rlctl_train.checkpoint.stored import DerivedTensor, Piece, StoredTensor
from tests.stored_checkpoints import in_files, read_file


def written(folder: Path, files: Sequence[WeightFile], done: dict[str, str] | None = None) -> list[Finished]:
    finished: list[Finished] = []
    folder.mkdir(exist_ok=True)
    write(folder, files, done=done or {}, on_finished=finished.extend, on_progress=lambda num_bytes: None)
    return finished


def kept(tensors: dict[str, StoredTensor | DerivedTensor]) -> list[Output]:
    return [Output(name, tensor.dtype, tensor) for name, tensor in tensors.items()]


def of_every_dtype() -> dict[str, Tensor]:
    bits = torch.arange(48, dtype=torch.uint8)
    return {name: bits.view(dtype).clone() if name != "BOOL" else bits % 2 == 0 for dtype, name in DTYPES.items()}


def test_every_dtype_is_written_to_the_bit_and_aligned(tmp_path: Path) -> None:
    tensors = of_every_dtype() | {"empty": torch.empty(0, 3), "number": torch.tensor(7), "odd": torch.ones(3).bool()}
    written(tmp_path / "out", arrange(kept(in_files(tmp_path, tensors)), "model", 10**9))  # type: ignore[arg-type]
    again = load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in tensors.items():
        flat = tensor.contiguous().view(-1)
        assert again[name].shape == tensor.shape and again[name].dtype == tensor.dtype
        assert torch.equal(again[name].view(-1).view(torch.uint8), flat.view(torch.uint8))
    stored = read_file(tmp_path / "out" / "model.safetensors")
    assert all(tensor.pieces[0].offset % tensor.dtype.itemsize == 0 for tensor in stored.values())  # type: ignore[attr-defined]


@pytest.mark.parametrize("num_pieces", [1, 3])
def test_large_tensors_in_pieces_come_out_whole_with_their_checksum(tmp_path: Path, num_pieces: int) -> None:
    tensor = torch.randn(300, 1025)
    assert tensor.nbytes > 4 * BLOCK_BYTES
    files = arrange(kept(in_files(tmp_path, {"x": tensor}, num_pieces)), "model", 10**9)  # type: ignore[arg-type]
    (done,) = written(tmp_path / "out", files)
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")["x"], tensor)
    assert done.checksum == f"{zlib.crc32(tensor.numpy().tobytes()):08x}"


def test_pieces_that_are_no_whole_rows_come_out_whole(tmp_path: Path) -> None:
    tensor = torch.randn(6, 8)
    halves = in_files(tmp_path, {"left": tensor[:, :5].contiguous(), "right": tensor[:, 5:].contiguous()})
    pieces = [
        Piece(half.pieces[0].file, 6, (0, start), (6, width))  # type: ignore[attr-defined]
        for half, start, width in ((halves["left"], 0, 5), (halves["right"], 5, 3))
    ]
    stored = StoredTensor("x", torch.float32, (6, 8), tuple(pieces))
    written(tmp_path / "out", arrange([Output("x", torch.float32, stored)], "model", 10**9))
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")["x"], tensor)


def test_a_cast_is_that_of_torch(tmp_path: Path) -> None:
    tensor = torch.randn(400, 400)
    (stored,) = in_files(tmp_path, {"x": tensor}, 3).values()
    written(tmp_path / "out", arrange([Output("x", torch.bfloat16, stored)], "model", 10**9))
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")["x"], tensor.bfloat16())


def test_files_are_split_by_size_and_named_for_transformers(tmp_path: Path) -> None:
    stored = in_files(tmp_path, {name: torch.zeros(100) for name in "abcde"})
    files = arrange(kept(stored), "model", 800)  # type: ignore[arg-type]
    assert [file.name for file in files] == [f"model-{number:05d}-of-00003.safetensors" for number in (1, 2, 3)]
    assert [[output.name for _, output in file.outputs] for file in files] == [["a", "b"], ["c", "d"], ["e"]]
    assert all(len(file.header) % 8 == 0 for file in files)


def test_what_is_done_is_not_written_again(tmp_path: Path) -> None:
    files = arrange(kept(in_files(tmp_path, {"a": torch.ones(3), "b": torch.ones(3)})), "model", 10**9)  # type: ignore[arg-type]
    assert [one.name for one in written(tmp_path / "out", files, {"a": "x"})] == ["b"]


def test_tensors_are_told_only_after_a_sync_of_their_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    original = store.sync
    monkeypatch.setattr(safetensors_writer, "sync", lambda path: (events.append(path.name), original(path)))
    files = arrange(kept(in_files(tmp_path, {"a": torch.ones(3)})), "model", 10**9)  # type: ignore[arg-type]
    (tmp_path / "out").mkdir()
    write(tmp_path / "out", files, done={}, on_finished=lambda batch: events.append("told"), on_progress=lambda n: None)
    assert events[-2:] == ["model.safetensors", "told"]


def test_tensors_that_are_computed_are_held_together_only_up_to_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(safetensors_writer, "HELD_BYTES", 2500)
    lock, pair, now, most = threading.Lock(), threading.Barrier(2, timeout=60), [0], [0]

    def make() -> Tensor:
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        pair.wait()
        with lock:
            now[0] -= 1
        return torch.zeros(250)

    tensors = {str(number): DerivedTensor(str(number), torch.float32, (250,), make) for number in range(12)}
    (tmp_path / "out").mkdir()
    files = arrange([Output(name, torch.float32, tensor) for name, tensor in tensors.items()], "model", 10**9)
    write(tmp_path / "out", files, done={}, on_finished=lambda batch: None, on_progress=lambda n: None, num_threads=6)
    assert most[0] == 2


def test_a_failure_in_a_thread_stops_all_and_is_raised(tmp_path: Path) -> None:
    def fail() -> Tensor:
        raise EOFError("x ends early")

    good = in_files(tmp_path, {str(number): torch.zeros(9) for number in range(50)})
    outputs = [Output("bad", torch.float32, DerivedTensor("bad", torch.float32, (3,), fail)), *kept(good)]  # type: ignore[arg-type]
    with pytest.raises(EOFError, match="ends early"):
        written(tmp_path / "out", arrange(outputs, "model", 10**9))


MERGE = """
import json, resource, sys
from pathlib import Path
import torch
from rlctl_train.checkpoint.safetensors_writer import Output, arrange, write
from rlctl_train.checkpoint.stored import Piece, StoredTensor
source, out, dtype = Path(sys.argv[1]), Path(sys.argv[2]), getattr(torch, sys.argv[3])
rows, columns = 4096, 1024
size = rows * columns * 4
tensors = [
    StoredTensor(str(n), torch.float32, (rows, columns), (Piece(source, n * size, (0, 0), (rows, columns)),))
    for n in range(source.stat().st_size // size)
]
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
files = arrange([Output(tensor.name, dtype, tensor) for tensor in tensors], "model", 10**12)
write(out, files, done={}, on_finished=lambda batch: None, on_progress=lambda n: None)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_memory_stays_at_the_buffers_whatever_the_size(tmp_path: Path, dtype: str) -> None:
    source = tmp_path / "source"
    with source.open("wb") as file:
        file.truncate(256 * 2**20)
    (tmp_path / "out").mkdir()
    words = [sys.executable, "-c", MERGE, str(source), str(tmp_path / "out"), dtype]
    done = subprocess.run(words, check=True, capture_output=True, text=True, env=os.environ)
    assert int(done.stdout) < 32 * 1024, "KiB beyond what the imports take"
    header = json.loads((tmp_path / "out" / "model.safetensors").read_bytes()[8:2000].split(b"}}")[0] + b"}}")
    assert header["0"]["shape"] == [4096, 1024]
