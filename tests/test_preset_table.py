"""docs/presets.md against the planner: a sample of its cells is planned anew, and what it promises is looked up."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

from rlctl import catalog

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "presets.md").read_text(encoding="utf-8")
FITS = re.compile(r"\d+ GiB(, \d+ (s|min|h))?")
WRITE = "run `nox -s presets`"


def load_generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("rlctl_docs_preset_table", ROOT / "docs" / "preset_table.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


generator = load_generator()
MACHINES = list(generator.MACHINES)
SAMPLE = [(name, MACHINES[place % len(MACHINES)]) for place, name in enumerate(catalog.names())][::3]


def cells_of(name: str) -> dict[str, str]:
    fits = PAGE.split("## Where each one fits")[1]
    line = next(line for line in fits.splitlines() if line.startswith(f"| `{name}` |"))
    return dict(zip(MACHINES, (cell.strip() for cell in line.strip("|").split("|")[1:]), strict=True))


def refusals_of(name: str) -> list[str]:
    blocks = PAGE.split("## What would make the others fit")[1].split("\n\n`")
    return next((block.splitlines()[2:] for block in blocks if block.strip("`\n").startswith(f"{name}`")), [])


@pytest.mark.parametrize(("name", "machine"), SAMPLE)
def test_the_page_says_what_the_planner_says(name: str, machine: str) -> None:
    cell = generator.cell(name, machine)
    assert cells_of(name)[machine] == cell.text, WRITE
    if cell.plan is None:
        assert generator.refusal_line(machine, cell) in refusals_of(name), WRITE


def test_the_page_describes_every_preset() -> None:
    for name in catalog.names():
        assert f"| `{name}` | {catalog.load_preset(name).header['title']} |" in PAGE, WRITE


@pytest.mark.parametrize("name", catalog.names())
def test_every_preset_fits_or_has_a_change_that_makes_it_fit(name: str) -> None:
    refused = [machine for machine, cell in cells_of(name).items() if cell == "-"]
    assert all(FITS.fullmatch(cell) for machine, cell in cells_of(name).items() if machine not in refused)
    lines = refusals_of(name)
    assert [line[2:].partition(":")[0] for line in lines] == refused
    assert all(re.search(rf"\({FITS.pattern} on ", line) for line in lines)


def test_a_671b_mixture_of_experts_fits_on_32_nodes() -> None:
    plan = generator.cell("deepseek-v3-grpo", "32x8 H100").plan
    assert plan is not None
    assert (plan.engine, plan.mesh.ep > 1) == ("megatron", True)


def test_adapters_of_a_7b_model_fit_a_24_gb_card() -> None:
    assert generator.cell("qwen2.5-7b-grpo-lora", "1 RTX 4090").plan is not None
