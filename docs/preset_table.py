"""Write docs/presets.md: what every preset is, and what each of eleven machines makes of it. `nox -s presets`.

A machine either runs a preset, or the planner refuses and names a change; the change is applied and planned again.
These are hundreds of plans, and so a script of its own; tests hold a sample of them against the page.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rlctl_hw.plan import plan
from rlctl_hw.remedies import Remedy, remedies
from rlctl_hw.timing import step_seconds
from rlctl_hw.types import DoesNotFit, Hardware, Plan

from rlctl import catalog, evidence, planning, resolve
from rlctl.workload import shape_of, workload_from_config

MACHINES = {
    "1 L4": "l4:1",
    "1 RTX 4090": "rtx4090:1",
    "1 A100-80": "a100-80gb:1",
    "8 A100-80": "a100-80gb:8",
    "8 H100": "h100-80gb:8",
    "8 H200": "h200:8",
    "8 B200": "b200:8",
    "8 MI300X": "mi300x:8",
    "8 Ascend 910B": "ascend-910b:8",
    "4x8 H100": "h100-80gb:8x4",
    "32x8 H100": "h100-80gb:8x32",
}
PAGE = Path(__file__).parent / "presets.md"
NOTE = "<!-- Made by docs/preset_table.py (`nox -s presets`); edit the presets, not this page. -->\n"
HEAD = """Every preset is a TOML file of intent: model, data, algorithm, sizes. The planner completes it for a machine:
`rlctl preset NAME` shows what it becomes here, `rlctl plan NAME --hw h100-80gb:8` what it would become elsewhere.
`rlctl preset cp NAME FILE` makes it your own.

Two more tables may stand in such a file. `[hardware.ID]` holds settings for one device of the catalogue (`ID` is its
name, such as `h100-80gb`) and a `reason`; they apply where all accelerators are that device, and show as
`preset NAME [hardware.ID]`. `[[verified]]` records a measured run: `date`, `commit`, `hardware`, `command`, `versions`,
`numbers`. A preset without one is `planned`: nobody has run it yet, and what follows are predictions.
"""
FITS_HEAD = """## Where each one fits

Predicted GiB of the fullest phase on the fullest device, and time of a step. A dash is a refusal: the next section
has the change that makes the preset fit, tried on the planner.
"""
REFUSED_HEAD = """## What would make the others fit

"""


@dataclass(frozen=True)
class Cell:
    """One preset on one machine: its plan, or the refusal with the change that was tried and the plan it gives."""

    plan: Plan | None = None
    refusal: str = ""
    remedy: Remedy | None = None
    mended: Plan | None = None

    @property
    def text(self) -> str:
        """Return the cell of the table of fits."""
        return "-" if self.plan is None else _numbers(self.plan)


def page() -> str:
    """Return the whole page."""
    cells = {name: {machine: cell(name, machine) for machine in MACHINES} for name in catalog.names()}
    parts = [f"# Presets\n\n{NOTE}\n{HEAD}", _overview(), FITS_HEAD, _fits(cells), REFUSED_HEAD + _refusals(cells)]
    return "\n".join(parts)


def cell(name: str, machine: str) -> Cell:
    """Plan a preset for a machine; where it does not fit, apply the smallest change that the planner names."""
    hardware = planning.hardware_named(MACHINES[machine])
    config = resolve.build(name, device=planning.device_key(hardware)).config
    workload = workload_from_config(config, shape_of(config))
    try:
        return Cell(plan(workload, hardware))
    except DoesNotFit as refusal:
        for remedy in remedies(workload, hardware)[:1]:
            return Cell(None, refusal.what, remedy, plan(remedy.workload, remedy.hardware))
        return Cell(None, refusal.what)


def fits_row(name: str, cells: dict[str, Cell]) -> str:
    """Return one line of the table of fits."""
    return f"| `{name}` | {' | '.join(cells[machine].text for machine in MACHINES)} |"


def refusal_line(machine: str, refused: Cell) -> str:
    """Return one line of the list of refusals."""
    remedy, mended = refused.remedy, refused.mended
    if remedy is None or mended is None:
        return f"- {machine}: {refused.refusal}; no single change helps"
    return f"- {machine}: {remedy.text} ({_numbers(mended)} on {_machine(remedy.hardware)})"


def _overview() -> str:
    rows = ["| preset | what | meant for | status | settings |", "|---|---|---|---|---|"]
    for document in map(catalog.load_preset, catalog.names()):
        header = document.header
        status = evidence.status(document.verified)
        rows.append(
            f"| `{document.name}` | {header['title']} | {header['hardware']} | {status} | {header['evidence']} |"
        )
    return "\n".join(rows) + "\n"


def _fits(cells: dict[str, dict[str, Cell]]) -> str:
    head = [f"| preset | {' | '.join(MACHINES)} |", "|---" * (len(MACHINES) + 1) + "|"]
    return "\n".join([*head, *(fits_row(name, row) for name, row in cells.items())]) + "\n"


def _refusals(cells: dict[str, dict[str, Cell]]) -> str:
    blocks = []
    for name, row in cells.items():
        lines = [refusal_line(machine, refused) for machine, refused in row.items() if refused.plan is None]
        if lines:
            blocks.append("\n".join([f"`{name}`\n", *lines]) + "\n")
    return "\n".join(blocks)


def _numbers(made: Plan) -> str:
    peak = max(band.gib for band in made.bands)
    seconds = step_seconds(made)
    return f"{peak:.0f} GiB" + ("" if seconds is None else f", {_duration(seconds[0])}")


def _duration(seconds: float) -> str:
    if seconds < 600:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.0f} h"


def _machine(hardware: Hardware) -> str:
    device = hardware.devices[0]
    nodes = f"{hardware.num_nodes} nodes of " if hardware.num_nodes > 1 else ""
    return f"{nodes}{len(hardware.devices)} x {device.catalogue or device.name}"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
