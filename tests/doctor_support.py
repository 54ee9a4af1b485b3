"""A healthy machine for the doctor's tests, every way to the outside replaced; each test breaks one thing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rlctl_hw.host import CommandResult, Host
from rlctl_hw.probe import parse_hardware
from rlctl_hw.types import Fact, Hardware, MemoryPart, Plan

from rlctl.doctor.case import Case
from rlctl.doctor.tools import Tools
from rlctl_train.config import RunConfig
from tests.runs import CONFIG, PLAN

GIB = 2**30
NOW = 1_800_000_000.0


def answers(**texts: CommandResult) -> Any:
    """Return a `run` that knows commands by their first word; others are not installed."""

    def run(argv: Sequence[str]) -> CommandResult:
        return texts.get(argv[0], CommandResult("", None, f"{argv[0]} is not installed"))

    return run


def tools(**changes: Any) -> Tools:
    healthy = Tools(
        python=lambda code, arguments, limit_s: CommandResult("", 0),
        version=lambda name: None,
        requirements=lambda name: (),
        folder=lambda name: Path("/site") / name,
        free=lambda path: 1000 * GIB,
        may_write=lambda folder: True,
        open_files=lambda: (65536, 65536),
        interfaces=lambda: {"lo": ("127.0.0.1",), "eth0": ("10.0.0.1",)},
        addresses=lambda host: ("10.0.0.1",),
        connect=lambda host, port, limit_s: None,
        listen=lambda host: None,
        http=lambda url, token, limit_s: 200,
        hostname=lambda: "me",
        now=lambda: NOW,
    )
    return replace(healthy, **changes)


def machine(spec: str = "cpu:8", facts: Mapping[str, Any] | None = None, **changes: Any) -> Hardware:
    """Return a machine by name with further facts; a pair is a value with its error."""
    made = parse_hardware(spec)
    given = {
        name: Fact(value[0], "test", value[1]) if isinstance(value, tuple) else Fact(value, "test")
        for name, value in (facts or {}).items()
    }
    return replace(made, facts=made.facts | given, **changes)


def config(**sections: Any) -> RunConfig:
    """Return the usual small run; a section with a `type` replaces that of the base."""
    merged = {**CONFIG, "reward": {"type": "arithmetic"}}
    for name, section in sections.items():
        base = merged.get(name, {})
        whole = not isinstance(section, dict) or "type" in section
        merged[name] = section if whole else {**base, **section}
    return RunConfig.model_validate(merged)


def plan(device: str = "cpu", **changes: Any) -> Plan:
    memory = (MemoryPart("actor_update", "weights", 2.0, "formula"),)
    return replace(PLAN, **{"device": device, "memory": memory, "device_memory_gib": 80.0, **changes})


def case(hardware: Hardware | None = None, *, env: Mapping[str, str] | None = None, **changes: Any) -> Case:
    """Return a case; `root`, `run` go to its host, other changes to the case itself."""
    host = Host(Path(changes.pop("root", "/nowhere")), env or {}, changes.pop("run", answers()))
    made = Case(host, hardware or machine(), tools=changes.pop("tools", tools()))
    return replace(made, **changes)


def torch_folder(root: Path, version: str, *, cuda: str | None = None, hip: str | None = None) -> Any:
    """Write what torch says of its build; return a `folder` that finds it."""
    package = root / "torch"
    package.mkdir(parents=True)
    lines = ["from typing import Optional", f"__version__ = {version!r}"]
    lines += [f"{name}: Optional[str] = {value!r}" for name, value in (("cuda", cuda), ("hip", hip))]
    (package / "version.py").write_text("\n".join(lines))
    return lambda name: root / name if (root / name).is_dir() else None
