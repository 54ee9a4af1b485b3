"""The links and islands among the devices that a process may use, out of those of the whole machine."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rlctl_hw.topology import among, is_complete, islands
from rlctl_hw.types import Device, Fact, Link


@dataclass(frozen=True)
class Wiring:
    """Links between places in the list of devices, the islands they make, and where that was read."""

    links: tuple[Link, ...]
    islands: tuple[tuple[int, ...], ...]
    facts: dict[str, Fact]


def wire(devices: Sequence[Device], links: Iterable[Link], source: str) -> Wiring:
    """Keep the links (by `Device.index`) between these devices; there are no islands where a pair is unknown."""
    if len(devices) < 2:
        return Wiring((), tuple((place,) for place in range(len(devices))), {})
    indices, name = [device.index for device in devices], f"{devices[0].kind}.islands"
    kept = among(indices, links)
    if not is_complete(len(devices), kept):
        return Wiring(kept, (), {name: Fact(None, source, "no link is told for some pairs of devices")})
    groups = islands(len(devices), kept)
    return Wiring(kept, groups, {name: Fact([[indices[place] for place in group] for group in groups], source)})
