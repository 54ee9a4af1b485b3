r"""Find the answer a LaTeX solution puts in a box."""

from __future__ import annotations

import re

MARK = re.compile(r"\\(?:boxed|fbox)\s*(?:\{|(?P<bare>[^\s{}\\$]))")


def last_boxed(text: str) -> str | None:
    r"""Return the content of the last complete `\boxed{...}` (or `\fbox{...}`, `\boxed 7`), None without one."""
    for match in reversed(list(MARK.finditer(text))):
        content = match["bare"] or _braced(text, match.end())
        if content is not None:
            return content.strip()
    return None


def _braced(text: str, start: int) -> str | None:
    """Return what stands before the brace that closes the one opened just before `start`."""
    depth, escaped = 1, False
    for i in range(start, len(text)):
        char = text[i]
        if escaped:
            escaped = False
        elif char == "\\":
            escaped = True
        elif char == "{":
            depth += 1
        elif char == "}":
            depth -= 1
            if depth == 0:
                return text[start:i]
    return None
