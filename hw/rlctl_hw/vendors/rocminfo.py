"""`rocminfo`, the last fallback: what the ROCm runtime itself sees, and why it sees nothing."""

from __future__ import annotations

import re
from collections.abc import Iterator

from rlctl_hw.host import Host
from rlctl_hw.vendors.amd_gpu import Answer, Gpu
from rlctl_hw.vendors.kfd import pci_address
from rlctl_hw.vendors.loose_json import number, words
from rlctl_hw.vendors.tools import ROCM_FOLDERS, run_tool

KIB_PER_GIB = 2**20
TROUBLE = re.compile(r"not loaded|unable to open|permission denied|not member of|failed|error", re.IGNORECASE)


def read(host: Host) -> Answer:
    """Ask the runtime; its complaints about the driver and permissions become the errors."""
    result = run_tool(host, ["rocminfo"], ROCM_FOLDERS)
    answer = parse(result.stdout)
    if not answer.gpus and not answer.errors and result.error:
        return Answer((), "rocminfo", (result.error,))
    return answer


def parse(text: str) -> Answer:
    """Read the agents of type GPU, and lines of complaint where there are none."""
    agents = [agent for agent in _agents(text) if agent.get("device type") == "GPU"]
    if agents:
        return Answer(tuple(_gpu(place, agent) for place, agent in enumerate(agents)), "rocminfo")
    complaints = [line.strip() for line in text.splitlines() if TROUBLE.search(line)]
    return Answer((), "rocminfo", tuple(f"rocminfo: {line}" for line in complaints[:2]))


def _agents(text: str) -> Iterator[dict[str, str]]:
    """Yield the fields of each agent; the first of a kind counts, so later pools and ISAs overwrite nothing."""
    agent: dict[str, str] = {}
    for line in text.splitlines():
        key, colon, value = line.strip().partition(":")
        key, value = key.strip().lower(), value.strip()
        if not colon:
            continue
        # The names of instruction sets stand below an agent; every other name opens one.
        if key == "name" and not value.startswith("amdgcn-"):
            if agent:
                yield agent
            agent = {}
        agent.setdefault(key, value)
    if agent:
        yield agent


def _gpu(place: int, agent: dict[str, str]) -> Gpu:
    size = number(_leading(agent.get("size")))
    location = number(agent.get("bdfid"))
    uuid = agent.get("uuid", "")
    return Gpu(
        index=place,
        name=words(agent.get("marketing name")),
        memory_gib=size / KIB_PER_GIB if size else None,
        architecture=words(agent.get("name")),
        device_id=number(_leading(agent.get("chip id"))),
        compute_units=number(agent.get("compute unit")),
        # A part without a serial number is printed as GPU-XX.
        uuid=uuid if re.fullmatch(r"GPU-[0-9a-f]{16}", uuid) else None,
        pci=pci_address(number(agent.get("domain")) or 0, location) if location else None,
    )


def _leading(cell: str | None) -> str:
    """Return the number before its other spelling: `29857(0x74a1)`."""
    return (cell or "").partition("(")[0].strip()
