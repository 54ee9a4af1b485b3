"""Files of a run inside the text that its job prints: the way home from a cluster that shares no folder.

A parcel is one line, `\\x1erlctl PATH OFFSET DATA`: bytes of the file PATH from OFFSET on, compressed; offset 0 begins
it anew. Whatever stands between parcels is what the driver printed.
"""

from __future__ import annotations

import base64
import re
import zlib

NAME = re.compile(r"[\w./-]+", re.ASCII)
"""Of files that can be sent."""
PARCEL = re.compile(r"\x1erlctl (?P<path>[\w./-]+) (?P<offset>[0-9]+) (?P<data>[A-Za-z0-9+/=]*)\n", re.ASCII)


def pack(path: str, offset: int, data: bytes) -> str:
    """Return the line that carries `data`."""
    return f"\x1erlctl {path} {offset} {base64.b64encode(zlib.compress(data)).decode()}\n"


def unpack(text: str) -> tuple[str, dict[str, bytes]]:
    """Return what the driver printed, and each file as far as it has come; one that lacks a piece is left out."""
    files: dict[str, bytes] = {}
    for match in PARCEL.finditer(text):
        path, offset = match["path"], int(match["offset"])
        before = files.get(path, b"")[:offset]
        if len(before) == offset:
            files[path] = before + zlib.decompress(base64.b64decode(match["data"]))
    return PARCEL.sub("", text), files
