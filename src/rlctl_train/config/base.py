"""What every config class shares: frozen, strict, unknown keys refused. No torch here."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import BaseModel, ConfigDict


class Config(BaseModel):
    """Base of all config classes: a frozen record of what the user wants."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, validate_default=True, allow_inf_nan=False
    )


class Choices:
    """What each value of an enumeration means, a line each; it stands in the `Annotated` of the field."""

    def __init__(self, meanings: Mapping[str, str]) -> None:
        self.meanings = dict(meanings)


DTYPES = Choices(
    {
        "float32": "exact, and four bytes a number",
        "bfloat16": "half the bytes and several times as fast where the device has units for it; three digits",
    }
)
