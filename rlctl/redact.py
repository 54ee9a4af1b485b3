"""Keeping secrets out of what is printed: names of variables that hold them, logins inside addresses."""

from __future__ import annotations

import re
from collections.abc import Mapping

SECRET = re.compile(r"TOKEN|KEY|SECRET|PASSW|CREDENTIAL|AUTH", re.IGNORECASE)
LOGIN = re.compile(r"//[^/@\s]+@")
REDACTED = "(removed)"
LEAST_LENGTH = 6
"""Shorter values (`RAY_AUTH_MODE=token` has five letters) are words, and removing them would garble a message."""


def message(text: str, environ: Mapping[str, str]) -> str:
    """Return a message without the values of secret variables and without logins inside addresses."""
    values = (value for name, value in environ.items() if SECRET.search(name))
    for value in sorted({v for v in values if len(v) >= LEAST_LENGTH}, key=len, reverse=True):
        text = text.replace(value, REDACTED)
    return LOGIN.sub(f"//{REDACTED}@", text)
