"""What an error that memory ran out is known by, and the account of the process that goes with it."""

from __future__ import annotations

SAID = ("out of memory", "can't allocate memory", "cannot allocate memory")
"""How torch, CUDA, HIP, CANN and vLLM put it."""
HELD = "held then: "
"""How the note begins that a worker adds to the error."""


def ran_out(error: BaseException) -> bool:
    """Return whether an error says that memory was not enough."""
    if type(error).__name__ == "OutOfMemoryError":  # torch has one, Ray another
        return True
    return isinstance(error, RuntimeError | MemoryError) and any(word in str(error) for word in SAID)


def account(error: BaseException) -> str | None:
    """Return what the worker held when memory ran out, where it could tell."""
    notes = getattr(error, "__notes__", [])
    return next((note.removeprefix(HELD) for note in notes if note.startswith(HELD)), None)
