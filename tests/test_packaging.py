"""What is shipped: versions that agree, and folders that the build really finds."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import rlctl

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS = PROJECT["project"]["optional-dependencies"]


def pins() -> dict[str, tuple[int, ...]]:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line]
    return {line.partition("==")[0]: version(line.partition("==")[2]) for line in lines}


def version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("."))


def requirements() -> dict[str, str]:
    """Return each requirement's range, by name."""
    lists = [PROJECT["project"]["dependencies"], *EXTRAS.values()]
    parsed = [re.fullmatch(r"([\w-]+)(?:\[[\w,]+\])?(.*)", line) for lines in lists for line in lines]
    return {match[1]: match[2] for match in parsed if match}


def allows(bounds: str, pin: tuple[int, ...]) -> bool:
    tests = {
        ">=": lambda limit: pin >= limit,
        "<": lambda limit: pin < limit,
        "==": lambda limit: pin == limit,
    }
    parts = re.findall(r"(>=|<|==)([\d.]+)", bounds)
    return all(tests[sign](version(limit)) for sign, limit in parts)


def test_every_constraint_is_one_the_project_allows() -> None:
    ranges = requirements()
    assert [name for name, pin in pins().items() if not allows(ranges.get(name, ""), pin)] == []


def test_the_package_and_the_distribution_have_one_version() -> None:
    assert PROJECT["project"]["version"] == rlctl.__version__


def test_the_core_installs_without_the_heavy_packages() -> None:
    core = {re.split(r"[\[<>=]", line)[0] for line in PROJECT["project"]["dependencies"]}
    assert not core & {"torch", "ray", "transformers", "numpy", "pyarrow"}


def test_every_promised_extra_is_there() -> None:
    promised = "train vllm vllm-cpu sglang megatron ascend flash profile sky math dev"
    assert set(promised.split()) <= EXTRAS.keys()


def test_every_folder_the_build_takes_is_in_the_checkout() -> None:
    build = PROJECT["tool"]["hatch"]["build"]["targets"]
    named = [*build["wheel"]["only-include"], *(path.lstrip("/") for path in build["sdist"]["include"])]
    assert [path for path in named if not (ROOT / path).exists()] == []


def test_packages_are_typed_and_containers_are_no_packages() -> None:
    for package in ("rlctl", "hw/rlctl_hw", "src/rlctl_train"):
        assert (ROOT / package / "py.typed").is_file()
    for container in ("hw", "src", "sky", "presets"):
        assert not (ROOT / container / "__init__.py").exists()
