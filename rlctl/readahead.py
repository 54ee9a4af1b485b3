"""Reading ahead: files that a command is about to read come into the kernel's cache while it is still importing."""

from __future__ import annotations

import os
import threading
from contextlib import suppress
from pathlib import Path

import psutil

BLOCK_BYTES = 2**19
"""Asked for at one time: what the kernel takes at once, at the least."""


def read_ahead(folder: Path) -> None:
    """Have the kernel read a folder's files, in the background, where half of the free memory holds them all."""
    if not hasattr(os, "posix_fadvise"):
        return
    files = sorted(path for path in [folder, *folder.rglob("*")] if path.is_file())
    sizes = {path: path.stat().st_size for path in files}
    if sum(sizes.values()) < psutil.virtual_memory().available / 2:
        threading.Thread(target=_ask, args=(sizes,), daemon=True).start()


def _ask(sizes: dict[Path, int]) -> None:
    for path, size in sizes.items():
        with suppress(OSError), path.open("rb") as file:  # whoever reads it then will say what is wrong
            for offset in range(0, size, BLOCK_BYTES):
                os.posix_fadvise(file.fileno(), offset, BLOCK_BYTES, os.POSIX_FADV_WILLNEED)
