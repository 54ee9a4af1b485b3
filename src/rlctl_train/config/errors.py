"""The one exception for what a person can mend: what is wrong, and the way out."""

from __future__ import annotations

OK, FAILED, USAGE, DOES_NOT_FIT, PREFLIGHT, LAUNCH, INTERRUPTED = 0, 1, 2, 3, 4, 5, 130

OUT_OF_MEMORY = "out of memory"
"""Kind of an error in the status file."""


class UserError(Exception):
    """A failure a person can mend. `exit_code` is one of the constants of this module."""

    def __init__(self, what: str, remedy: str, *, exit_code: int = USAGE) -> None:
        super().__init__(what)
        self.what = what
        self.remedy = remedy
        self.exit_code = exit_code

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (self.what, self.remedy, self.exit_code)


def _rebuild(what: str, remedy: str, exit_code: int) -> UserError:
    return UserError(what, remedy, exit_code=exit_code)


def first_line(error: BaseException) -> str:
    """Return the first line of what an error says; its class where it says nothing."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
