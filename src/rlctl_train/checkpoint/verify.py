"""Whether a checkpoint is what was written: against its manifest where it has one, else as far as its form can tell.

Findings name the tensor or file and what happened to it: flipped bits, a cut end, a file that is gone, contents that
lie under each other's names.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from rlctl_train.checkpoint import kinds
from rlctl_train.checkpoint.store import MANIFEST
from rlctl_train.checkpoint.stored import Checkpoint, NamedTensor, StoredTensor
from rlctl_train.checkpoint.torch_zip import damaged_records
from rlctl_train.config.errors import FAILED, UserError

BLOCK_BYTES = 2**20
ZIPPED = (".pt", ".pth", ".bin", ".ckpt")
"""Files that torch.save writes: archives with a checksum for each of their records."""
Fault = Literal["missing", "truncated", "size", "changed", "swapped", "incomplete", "unreadable"]
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong."""

    fault: Fault
    where: str
    """A file below the folder, or a tensor."""
    what: str


@dataclass(frozen=True)
class Verdict:
    """What a verification found."""

    path: Path
    manifest: Path | None
    """What it was held against, or None where only the form could be looked at."""
    num_files: int
    num_tensors: int
    """Whose checksums, or without a manifest completeness, were looked at."""
    num_bytes: int
    """That were read and held against a checksum, or read alone."""
    findings: tuple[Finding, ...]


@dataclass(frozen=True)
class Range:
    """Bytes of a tensor in a file, and their checksum."""

    tensor: str
    file: str
    offset: int
    nbytes: int
    checksum: str
    algorithm: Literal["crc32", "sha256"]


@dataclass
class Reading:
    """Counts bytes as they are read."""

    total: int
    tell: Progress
    done: int = 0
    findings: list[Finding] = field(default_factory=list)

    def find(self, fault: Fault, where: str, what: str) -> None:
        """Put down a finding."""
        self.findings.append(Finding(fault, where, what))

    def blocks(self, path: Path, offset: int, num_bytes: int) -> Iterator[memoryview]:
        """Yield bytes of a file, fewer where it ends; their memory is used again."""
        buffer = memoryview(bytearray(min(BLOCK_BYTES, max(num_bytes, 1))))
        with path.open("rb", buffering=0) as file:
            while num_bytes > 0:
                count = os.preadv(file.fileno(), [buffer[:num_bytes]], offset)
                if not count:
                    return
                yield buffer[:count]
                offset, num_bytes, self.done = offset + count, num_bytes - count, self.done + count
                self.tell(min(self.done, self.total), self.total)


def verify(path: Path, kind: str | None = None, *, on_progress: Progress = lambda done, total: None) -> Verdict:
    """Verify a checkpoint; `on_progress` hears of the bytes that are read, and of all that will be."""
    manifest = path / MANIFEST
    if not manifest.is_file():
        return _verify_form(path, kind, on_progress)
    content = _read(manifest)
    files: dict[str, dict[str, Any]] = content.get("files") or {}
    ranges = _ranges(content, manifest)
    hashed = {name: entry["bytes"] for name, entry in files.items() if entry.get("sha256")}
    beside = sum(one.nbytes for one in ranges if one.file not in hashed)
    reading = Reading(sum(hashed.values()) + beside, on_progress)
    _verify_files(path, files, reading)
    faults = {finding.where: finding.fault for finding in reading.findings}
    gone = {name for name, fault in faults.items() if fault in ("missing", "truncated", "swapped")}
    # What lies in a file that is as it was written is so too: only where a file has changed are its tensors told apart.
    whole = {name for name, entry in files.items() if entry.get("sha256") and name not in faults}
    _verify_ranges(path, [one for one in ranges if one.file not in gone | whole], reading)
    covered = {one.file for one in ranges} | {name for name, entry in files.items() if entry.get("sha256")}
    _verify_zipped(path, [path / name for name in files if name not in covered | gone], reading)
    num_tensors = len({one.tensor for one in ranges})
    return Verdict(path, manifest, len(files), num_tensors, reading.done, tuple(reading.findings))


def _read(manifest: Path) -> dict[str, Any]:
    remedy = "move it away to have the form alone looked at"
    try:
        content = json.loads(manifest.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{manifest} cannot be read: {error}", remedy, exit_code=FAILED) from error
    if not isinstance(content, dict):
        raise UserError(f"{manifest} is no manifest", remedy, exit_code=FAILED)
    return content


def _ranges(content: Mapping[str, Any], manifest: Path) -> list[Range]:
    """Return where the listed tensors lie; a tensor is listed as one place, or as several."""
    listed, algorithm = content.get("tensors") or {}, content.get("checksum")
    if not listed:
        return []
    if algorithm not in ("crc32", "sha256"):
        what = f"{manifest} has checksums by {algorithm}, which this version does not know"
        raise UserError(what, "verify it with the rlctl that wrote it", exit_code=FAILED)
    return [
        Range(name, one["file"], one["offset"], one["bytes"], one["checksum"], algorithm)
        for name, places in listed.items()
        for one in (places if isinstance(places, list) else [places])
    ]


def _verify_files(folder: Path, listed: Mapping[str, Mapping[str, Any]], reading: Reading) -> None:
    """Hold files against their sizes and hashes. Of weight files the header alone is hashed: the rest is tensors."""
    wanted = {name: entry.get("sha256") or entry.get("header_sha256") for name, entry in listed.items()}
    for name, entry in listed.items():
        path = folder / name
        if not path.is_file():
            reading.find("missing", name, "the file is gone")
            continue
        size, found = path.stat().st_size, _hash_of(path, entry, reading)
        others = [other for other, sha in wanted.items() if sha is not None and sha == found and other != name]
        if found != wanted[name] and others:
            reading.find("swapped", name, f"it holds what belongs to {others[0]}")
        elif size != entry["bytes"]:
            fault: Fault = "truncated" if size < entry["bytes"] else "size"
            reading.find(fault, name, f"it has {size} bytes and should have {entry['bytes']}")
        elif found != wanted[name]:
            reading.find("changed", name, "its contents are not what was written")


def _hash_of(path: Path, entry: Mapping[str, Any], reading: Reading) -> str | None:
    size = path.stat().st_size
    if entry.get("sha256") is None and entry.get("header_sha256") is None:
        return None
    if entry.get("sha256") is None:
        with path.open("rb") as file:
            size = min(size, 8 + int.from_bytes(file.read(8), "little"))
    return _checksum(reading.blocks(path, 0, size), "sha256")


def _verify_ranges(folder: Path, ranges: Iterable[Range], reading: Reading) -> None:
    wrong: list[tuple[Range, str]] = []
    checksums: dict[str, list[Range]] = {}
    for one in ranges:
        checksums.setdefault(one.checksum, []).append(one)
        checksum = _checksum(reading.blocks(folder / one.file, one.offset, one.nbytes), one.algorithm)
        if checksum != one.checksum:
            wrong.append((one, checksum))
    for one, checksum in wrong:
        others = [other for other in checksums.get(checksum, ()) if other.nbytes == one.nbytes]
        where = f"{one.file}, bytes {one.offset} to {one.offset + one.nbytes}"
        if others:
            reading.find("swapped", one.tensor, f"{where} hold what belongs to {others[0].tensor} in {others[0].file}")
        else:
            reading.find("changed", one.tensor, f"{where} are not what was written")


def _checksum(blocks: Iterable[memoryview], algorithm: Literal["crc32", "sha256"]) -> str:
    if algorithm == "crc32":
        return f"{functools.reduce(lambda crc, block: zlib.crc32(block, crc), blocks, 0):08x}"
    sha = hashlib.sha256()
    for block in blocks:
        sha.update(block)
    return sha.hexdigest()


def _verify_zipped(folder: Path, files: Iterable[Path], reading: Reading) -> None:
    """Hold the records of torch's archives against the checksums in them."""
    archives = [file for file in files if file.suffix in ZIPPED and file.is_file()]
    if not archives:
        return
    for file in archives:
        for record in damaged_records(file):
            reading.find("changed", _below(folder, file), f"its record {record} is not what was written")


def _verify_form(path: Path, kind: str | None, on_progress: Progress) -> Verdict:
    """Look at what a checkpoint without a manifest can be held against: itself."""
    try:
        checkpoint = kinds.read(path, kind)
        parts = list(_parts(checkpoint))
    except UserError as error:
        if not path.exists():
            raise
        return Verdict(path, None, 0, 0, 0, (Finding("unreadable", path.name, error.what),))
    reading = Reading(sum(file.stat().st_size for file in checkpoint.files if file.is_file()), on_progress)
    short: dict[str, int] = {}
    for name, tensor in parts:
        _verify_pieces(name, tensor, reading, short)
    for file, num_bytes in short.items():
        reading.find(
            "truncated", _below(path, Path(file)), f"it ends {num_bytes} bytes before a tensor that should be in it"
        )
    for file in checkpoint.files:
        if not file.is_file():
            reading.find("missing", _below(path, file), "the file is gone")
        elif file.suffix not in ZIPPED:
            for _ in reading.blocks(file, 0, file.stat().st_size):
                pass
    _verify_zipped(path, [file for file in checkpoint.files if str(file) not in short], reading)
    return Verdict(path, None, len(checkpoint.files), len(parts), reading.done, tuple(reading.findings))


def _parts(checkpoint: Checkpoint) -> Iterator[tuple[str, NamedTensor]]:
    yield from checkpoint.tensors.items()
    if checkpoint.adapter is not None:
        yield from checkpoint.adapter.tensors.items()
    for part, tensors in checkpoint.others.items():
        yield from ((f"{part}: {name}", tensor) for name, tensor in tensors.items())


def _verify_pieces(name: str, tensor: NamedTensor, reading: Reading, short: dict[str, int]) -> None:
    """See that a tensor's pieces make up the whole, and lie within their files."""
    if not isinstance(tensor, StoredTensor):
        return
    if tensor.missing():
        what = f"{tensor.missing()} of its {math.prod(tensor.shape)} elements are in no file"
        reading.find("incomplete", name, what)
    for piece in tensor.pieces:
        if piece.file.is_file():
            beyond = piece.offset + piece.size * tensor.dtype.itemsize - piece.file.stat().st_size
            if beyond > 0:
                short[str(piece.file)] = max(short.get(str(piece.file), 0), beyond)


def _below(folder: Path, file: Path) -> str:
    return str(file.relative_to(folder)) if file.is_relative_to(folder) else str(file)
