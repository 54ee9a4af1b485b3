"""Per-user settings: what belongs to the person, not to a run. `settings.toml` in the settings folder, or `RLCTL_*`.

The folder is $RLCTL_HOME, else $XDG_CONFIG_HOME/rlctl, else ~/.config/rlctl.
"""

from __future__ import annotations

import os
import tomllib
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, ValidationError
from pydantic_settings import (
    BaseSettings,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
    TomlConfigSettingsSource,
)

from rlctl.overrides import ENV_PREFIX, Assignment
from rlctl.spelling import nearest
from rlctl_train.config.errors import UserError
from rlctl_train.config.trainer import CLUSTER_VARIABLE, NODES_VARIABLE

HOME_VARIABLE = "RLCTL_HOME"


def _words(value: Any) -> Any:
    return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value


class Settings(BaseSettings):
    """The person's own defaults."""

    model_config = SettingsConfigDict(env_prefix=ENV_PREFIX, extra="forbid", frozen=True, use_attribute_docstrings=True)

    runs_dir: Path = Path("runs")
    """Folder that holds the run folders."""
    cache_dir: Path | None = None
    """Folder for models and data downloaded from the hub (HF_HOME of the runs); unset leaves HF_HOME alone."""
    trackers: Annotated[tuple[str, ...] | None, NoDecode, BeforeValidator(_words)] = None
    """Default of `telemetry.trackers`."""
    project: str | None = None
    """Default of `telemetry.project`."""
    ray_address: str | None = None
    """Default of `ray.address`."""
    sky: Path | None = None
    """SkyPilot's command, in its own environment; unset takes the `sky` on the path."""

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Environment before file; nothing else."""
        return env_settings, TomlConfigSettingsSource(settings_cls, toml_file=settings_file())

    def assignments(self) -> list[Assignment]:
        """Return what concerns the configuration of a run, as its lowest layer above the defaults."""
        values = {
            ("telemetry", "trackers"): None if self.trackers is None else list(self.trackers),
            ("telemetry", "project"): self.project,
            ("ray", "address"): self.ray_address,
        }
        return [Assignment(path, value, "settings") for path, value in values.items() if value is not None]

    def runs_root(self) -> Path:
        """Return the folder of the run folders, absolute."""
        return self.runs_dir.expanduser().resolve()


def settings_file() -> Path:
    """Return the path of the person's settings file; it need not exist."""
    if home := os.environ.get(HOME_VARIABLE):
        return Path(home).expanduser() / "settings.toml"
    base = os.environ.get("XDG_CONFIG_HOME")
    return (Path(base) if base else Path.home() / ".config") / "rlctl" / "settings.toml"


def reserved_variables() -> list[str]:
    """Return the RLCTL_* variables that are no settings of a run."""
    return [
        HOME_VARIABLE,
        CLUSTER_VARIABLE,
        NODES_VARIABLE,
        *(f"{ENV_PREFIX}{name.upper()}" for name in Settings.model_fields),
    ]


def load() -> Settings:
    """Read the settings; what is wrong in them is a `UserError` that names the file and the key."""
    path = settings_file()
    try:
        return Settings()
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{path} is not valid TOML: {error}", "correct the file at that place") from error
    except (OSError, SettingsError) as error:
        raise UserError(f"the settings cannot be read: {error}", f"check {path} and the RLCTL_* variables") from error
    except ValidationError as error:
        detail = error.errors()[0]
        key = ".".join(str(part) for part in detail["loc"])
        if detail["type"] == "extra_forbidden":
            near = nearest(key, Settings.model_fields)
            hint = f"did you mean {near}?" if near else f"known are {', '.join(Settings.model_fields)}"
            raise UserError(f"{path}: {key} is not a setting", hint) from error
        raise UserError(f"{path}: {key}={detail['input']!r} is of the wrong type", "see docs/config.md") from error
