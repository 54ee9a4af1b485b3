"""Safetensors files written as a stream: the header first, then each tensor's bytes at their place, several at once.

Every tensor is read in small blocks, cast where asked, checksummed and written; none is held twice, and none at all
where its bytes lie in whole rows. What is finished is told only once it has reached the disk.
"""

from __future__ import annotations

import json
import os
import queue
import threading
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from rlctl_train.checkpoint.store import sync
from rlctl_train.checkpoint.stored import NamedTensor, StoredTensor

ALGORITHM = "crc32"
"""Of the checksums. Measured on one core: crc32 1700 MB/s, sha1 550, sha256 380, blake2b 260. It is slower than the
disk nowhere, and it finds every flipped bit and every burst of up to 32; it is no defence against forgery."""
BLOCK_BYTES = 2**18
"""Read, cast, checksummed and written at one time. A block stays in the processor's cache between these; with larger
ones, and with copy_file_range and a second read for the checksum, a copy took two to three times as long."""
HELD_BYTES = 2**28
"""Tensors that must be computed whole are admitted while together they are not larger; a larger one comes alone."""
SYNC_BYTES, SYNC_S = 2**28, 10.0
"""Finished tensors are synced to the disk, and told, after so many bytes or seconds."""
PROGRESS_S = 0.25
DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.int64: "I64", torch.int32: "I32",
    torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.uint16: "U16", torch.uint32: "U32",
    torch.uint64: "U64", torch.bool: "BOOL",
}  # fmt: skip
"""Names that the format has for dtypes."""


@dataclass(frozen=True)
class Output:
    """A tensor as it is to be written."""

    name: str
    dtype: torch.dtype
    tensor: NamedTensor

    @property
    def nbytes(self) -> int:
        """Return its size in the file."""
        return self.tensor.nbytes // self.tensor.dtype.itemsize * self.dtype.itemsize


@dataclass(frozen=True)
class WeightFile:
    """One file: its header and where each tensor's bytes begin."""

    name: str
    """Path below the folder."""
    header: bytes
    outputs: tuple[tuple[int, Output], ...]
    """Each with the offset of its first byte in the file."""

    @property
    def nbytes(self) -> int:
        """Return the size of the file."""
        return len(self.header) + sum(output.nbytes for _, output in self.outputs)


@dataclass(frozen=True)
class Finished:
    """A tensor whose bytes are written."""

    name: str
    file: str
    checksum: str
    """Eight hexadecimal digits over its bytes in the file."""
    nbytes: int


def arrange(outputs: Sequence[Output], stem: str, file_bytes: int) -> tuple[WeightFile, ...]:
    """Spread tensors over files of at most `file_bytes`, in order, and name these the way transformers looks for."""
    groups: list[list[Output]] = [[]]
    held = 0
    for output in outputs:
        if groups[-1] and held + output.nbytes > file_bytes:
            groups.append([])
            held = 0
        groups[-1].append(output)
        held += output.nbytes
    if len(groups) == 1:
        return (weight_file(f"{stem}.safetensors", groups[0]),)
    names = (f"{stem}-{number:05d}-of-{len(groups):05d}.safetensors" for number in range(1, len(groups) + 1))
    return tuple(weight_file(name, group) for name, group in zip(names, groups, strict=True))


def weight_file(name: str, outputs: Sequence[Output]) -> WeightFile:
    """Lay out one file: wide dtypes first, so that every tensor is aligned to its elements."""
    ordered = sorted(outputs, key=lambda output: -output.dtype.itemsize)
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    starts, at = [], 0
    for output in ordered:
        starts.append(at)
        at += output.nbytes
        entries[output.name] = {
            "dtype": DTYPES[output.dtype], "shape": list(output.tensor.shape), "data_offsets": [starts[-1], at],
        }  # fmt: skip
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    return WeightFile(name, header, tuple((len(header) + start, o) for start, o in zip(starts, ordered, strict=True)))


def write(
    folder: Path,
    files: Sequence[WeightFile],
    *,
    done: Mapping[str, str],
    on_finished: Callable[[Sequence[Finished]], None],
    on_progress: Callable[[int], None],
    num_threads: int | None = None,
) -> None:
    """Write what is not `done` (names of tensors); raises OSError naming the file, EOFError of a short
    source, OverflowError where float16 cannot hold a number.

    `on_finished` hears of tensors that have reached the disk, `on_progress` of the bytes written so far.
    """
    for file in files:
        _prepare(folder, file)
    for parent in {(folder / file.name).parent for file in files}:
        sync(parent)
    jobs = deque((file, at, output) for file in files for at, output in file.outputs if output.name not in done)
    work = _Work(folder, jobs)
    threads = [threading.Thread(target=work.run, daemon=True) for _ in range(num_threads or _num_threads())]
    num_results = len(jobs) + len(threads)
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # for a block, threads of torch's own below these cost more than they save
    for thread in threads:
        thread.start()
    try:
        _collect(work, num_results, folder, on_finished, on_progress)
    finally:
        work.stop.set()
        for thread in threads:
            thread.join()
        torch.set_num_threads(before)


def _num_threads() -> int:
    return min(4, len(os.sched_getaffinity(0)))


def blocks(output: Output) -> Iterator[Tensor]:
    """Yield the bytes of a tensor as it is to be written, as flat uint8 tensors whose memory is used again."""
    narrows = output.dtype == torch.float16 and output.tensor.dtype != torch.float16
    for chunk in output.tensor.chunks(BLOCK_BYTES):
        cast = chunk.to(output.dtype)
        if narrows and not torch.equal(cast.isfinite(), chunk.isfinite()):
            raise OverflowError(f"{output.name} holds numbers beyond 65504, which float16 has not")
        yield cast.view(torch.uint8)


class _Work:
    """What the writing threads share."""

    def __init__(self, folder: Path, jobs: deque[tuple[WeightFile, int, Output]]) -> None:
        self._folder, self._jobs = folder, jobs
        self._room = _Room(HELD_BYTES)
        self.stop = threading.Event()
        self.written = 0
        self.results: queue.SimpleQueue[Finished | Exception | None] = queue.SimpleQueue()

    def run(self) -> None:
        """Write tensor after tensor; put each in `results`, what fails too, and None at the end."""
        try:
            while self._jobs and not self.stop.is_set():
                try:
                    file, at, output = self._jobs.popleft()
                except IndexError:  # another thread took the last one
                    break
                with self._room.held(_whole_bytes(output.tensor)):
                    self.results.put(self._write(file, at, output))
        except Exception as error:  # the boundary of a thread: the one that waits raises it
            self.results.put(error)
        finally:
            self.results.put(None)

    def _write(self, file: WeightFile, at: int, output: Output) -> Finished:
        path, checksum = self._folder / file.name, 0
        descriptor = os.open(path, os.O_RDWR)
        try:
            for block in blocks(output):
                if self.stop.is_set():
                    break
                view = block.numpy().data
                checksum = zlib.crc32(view, checksum)
                _pwrite(descriptor, view, at, path)
                at += len(view)
                self.written += len(view)  # a lost update of two threads only shows a little less progress
        finally:
            os.close(descriptor)
        return Finished(output.name, file.name, f"{checksum:08x}", output.nbytes)


class _Room:
    """Memory for tensors that are held whole, given out in bytes."""

    def __init__(self, num_bytes: int) -> None:
        self._limit, self._used = num_bytes, 0
        self._changed = threading.Condition()

    @contextmanager
    def held(self, num_bytes: int) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: not num_bytes or not self._used or self._used + num_bytes <= self._limit)
            self._used += num_bytes
        try:
            yield
        finally:
            with self._changed:
                self._used -= num_bytes
                self._changed.notify_all()


def _whole_bytes(tensor: NamedTensor) -> int:
    """Return what a tensor takes while it is read; next to nothing where it is read in blocks."""
    return 0 if isinstance(tensor, StoredTensor) and tensor.in_rows() is not None else tensor.nbytes


def _collect(
    work: _Work,
    num_results: int,
    folder: Path,
    on_finished: Callable[[Sequence[Finished]], None],
    on_progress: Callable[[int], None],
) -> None:
    """Take `num_results` results as they come; sync the tensors to the disk in batches and tell of them."""
    batch: list[Finished] = []
    synced = time.monotonic()
    while num_results:
        try:
            result = work.results.get(timeout=PROGRESS_S)
            num_results -= 1
        except queue.Empty:
            result = None
        if isinstance(result, Exception):
            raise result
        if result is not None:
            batch.append(result)
        late = time.monotonic() - synced > SYNC_S or sum(done.nbytes for done in batch) > SYNC_BYTES
        if batch and (late or not num_results):
            for name in {done.file for done in batch}:
                sync(folder / name)
            on_finished(batch)
            batch, synced = [], time.monotonic()
        on_progress(work.written)


def _prepare(folder: Path, file: WeightFile) -> None:
    """Make a file that is not there in its full length: header alone, the rest a hole."""
    path = folder / file.name
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        if os.fstat(descriptor).st_size != file.nbytes:
            _pwrite(descriptor, memoryview(file.header), 0, path)
            os.ftruncate(descriptor, file.nbytes)
    finally:
        os.close(descriptor)


def _pwrite(descriptor: int, view: memoryview, offset: int, path: Path) -> None:
    done = 0
    try:
        while done < len(view):
            done += os.pwrite(descriptor, view[done:], offset + done)
    except OSError as error:
        raise OSError(error.errno, os.strerror(error.errno or 0), str(path)) from error
