"""Files of a run inside the text that its job prints: the way home from a cluster that shares no folder.

A parcel is one line, `MARK PATH OFFSET DATA`: bytes of the file PATH from OFFSET on, compressed; offset 0 begins
it anew. Whatever stands between parcels is what the driver printed.
"""

from __future__ import annotations

import base64
import re
import zlib

MARK = "\x1erlctl"
"""Where a job's output is kept byte by byte: it may come in the middle of a line."""
LINE_MARK = "rlctl::file"
"""Where it is kept line by line, and a control character might not pass."""
NAME = re.compile(r"[\w./-]+", re.ASCII)
"""Of files that can be sent."""


def pack(path: str, offset: int, data: bytes, mark: str = MARK) -> str:
    """Return the line that carries `data`."""
    return f"{mark} {path} {offset} {base64.b64encode(zlib.compress(data)).decode()}\n"


def unpack(text: str, mark: str = MARK) -> tuple[str, dict[str, bytes]]:
    """Return what the driver printed, and each file as far as it has come; one that lacks a piece is left out."""
    files: dict[str, bytearray] = {}
    parcel = re.compile(rf"{mark} (?P<path>[\w./-]+) (?P<offset>[0-9]+) (?P<data>[A-Za-z0-9+/=]*)\n", re.ASCII)
    for match in parcel.finditer(text):
        path, offset = match["path"], int(match["offset"])
        have = files.get(path, bytearray())
        if len(have) >= offset:
            have[offset:] = zlib.decompress(base64.b64decode(match["data"]))
            files[path] = have
    return parcel.sub("", text), {path: bytes(data) for path, data in files.items()}
