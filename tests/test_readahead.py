"""Reading ahead: whatever lies there, it asks for all of it or for nothing, and never fails."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from rlctl.readahead import BLOCK_BYTES, read_ahead


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """What the kernel is asked for, as (file, offset)."""
    found: list[tuple[str, int]] = []

    def note(descriptor: int, offset: int, length: int, advice: int) -> None:
        assert (length, advice) == (BLOCK_BYTES, os.POSIX_FADV_WILLNEED)
        found.append((Path(f"/proc/self/fd/{descriptor}").readlink().name, offset))

    monkeypatch.setattr(os, "posix_fadvise", note)
    return found


def go(folder: Path) -> None:
    before = set(threading.enumerate())
    read_ahead(folder)
    for thread in set(threading.enumerate()) - before:
        thread.join(30)


def test_every_block_of_every_file_is_asked_for(tmp_path: Path, asked: list[tuple[str, int]]) -> None:
    (tmp_path / "actor").mkdir()
    (tmp_path / "actor" / "b.pt").write_bytes(b"x" * (BLOCK_BYTES + 1))
    (tmp_path / "a.json").write_bytes(b"x")
    go(tmp_path)
    assert asked == [("a.json", 0), ("b.pt", 0), ("b.pt", BLOCK_BYTES)]
    asked.clear()
    go(tmp_path / "a.json")
    assert asked == [("a.json", 0)]


def test_what_memory_cannot_hold_is_left_to_the_reader(
    tmp_path: Path, asked: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").write_bytes(b"x" * 100)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=200))
    go(tmp_path)
    assert asked == []


def test_a_place_that_is_not_there_is_for_the_reader_to_say(tmp_path: Path, asked: list[tuple[str, int]]) -> None:
    go(tmp_path / "nowhere")
    assert asked == []
