"""Hosts with accelerators that are not here: file trees, device files and a table of what commands print."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlctl_hw.host import CommandResult, Host

FIXTURES = Path(__file__).parent / "fixtures" / "hw"
NODES = "/sys/class/kfd/kfd/topology/nodes"
GIB = 2**30


def fixture(name: str) -> str:
    return (FIXTURES / name).read_text(encoding="utf-8")


@dataclass(frozen=True)
class MadeUpHost(Host):
    """A host without NVIDIA's library; `locked` are files that its user may not open."""

    locked: tuple[str, ...] = ()

    def answer(self, name: str, question: Callable[[], Any]) -> Any:
        if name == "nvml":
            return None
        return False if name.removeprefix("access") in self.locked else question()


def make_host(
    root: Path,
    files: Mapping[str, str],
    commands: Mapping[str, str] | None = None,
    env: Mapping[str, str] | None = None,
    locked: tuple[str, ...] = (),
) -> Host:
    """Lay out files and answer commands, all with exit code 0, by the whole line; others are not installed."""
    for name, text in files.items():
        path = root / name.lstrip("/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    printed = dict(commands or {})

    def run(argv: Sequence[str]) -> CommandResult:
        line = " ".join(argv)
        if line in printed:
            return CommandResult(printed[line], 0)
        return CommandResult("", None, f"{argv[0]} is not installed")

    return MadeUpHost(root, dict(env or {}), run, locked)


def kfd_node(**changes: int) -> str:
    """Return the properties of an MI300X's node with some of them changed."""
    lines = [line.split() for line in fixture("amd/kfd_mi300x_node.txt").splitlines()]
    return "".join(f"{name} {changes.get(name, value)}\n" for name, value in lines)


def kfd_files(gpus: Sequence[Mapping[str, int]], memory_gib: float | None, num_cpus: int = 2) -> dict[str, str]:
    """Return the tree of a machine: CPU nodes, then GPUs by their changed properties, and the device files."""
    files = {"/dev/kfd": "", "/sys/module/amdgpu/version": "6.12.12\n", "/opt/rocm/.info/version": "6.4.1-83\n"}
    for cpu in range(num_cpus):
        files[f"{NODES}/{cpu}/properties"] = kfd_node(simd_count=0, vendor_id=0, device_id=0, gfx_target_version=0)
        files[f"{NODES}/{cpu}/mem_banks/0/properties"] = f"heap_type 0\nsize_in_bytes {64 * GIB}\n"
    for i, gpu in enumerate(gpus):
        node, minor = f"{NODES}/{num_cpus + i}", 128 + i
        files[f"{node}/properties"] = kfd_node(**{"drm_render_minor": minor, "location_id": (i + 1) << 8, **gpu})
        files[f"/dev/dri/renderD{minor}"] = ""
        if memory_gib is not None:
            size = int(memory_gib * GIB)
            files[f"{node}/mem_banks/0/properties"] = f"heap_type 1\nsize_in_bytes {size}\nflags 0\nwidth 8192\n"
    return files


def io_links(node: int, others: Mapping[int, int]) -> dict[str, str]:
    """Return the links of a node: type by the node at the other end."""
    return {
        f"{NODES}/{node}/io_links/{i}/properties": f"type {kind}\nnode_from {node}\nnode_to {other}\nweight 15\n"
        for i, (other, kind) in enumerate(others.items())
    }
