"""Which AMD GPUs a process is shown: `ROCR_VISIBLE_DEVICES` first, then `HIP_VISIBLE_DEVICES` among what that left.

HIP reads `CUDA_VISIBLE_DEVICES` only where `HIP_VISIBLE_DEVICES` is not set.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rlctl_hw.vendors.amd_gpu import Gpu
from rlctl_hw.visibility import Name, select

ROCR, HIP, CUDA = "ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES"


@dataclass(frozen=True)
class Visible:
    """The GPUs in the order in which HIP counts them, the variables that decided, and what is odd about them."""

    gpus: tuple[Gpu, ...]
    source: str
    notes: tuple[str, ...] = ()


def select_visible(gpus: Sequence[Gpu], env: Mapping[str, str]) -> Visible:
    """Apply the three variables to the GPUs that the process can open."""
    left, first_note = _apply(ROCR, env.get(ROCR), gpus)
    variable = HIP if HIP in env else CUDA
    chosen, second_note = _apply(variable, env.get(variable), left)
    settings = [f"{name}={env[name]}" for name in (ROCR, HIP, CUDA) if name in env]
    notes = [note for note in (first_note, second_note, *_contradictions(env)) if note]
    return Visible(tuple(chosen), ", ".join(settings) or "all", tuple(notes))


def _apply(variable: str, setting: str | None, gpus: Sequence[Gpu]) -> tuple[list[Gpu], str | None]:
    names = [Name(place, gpu.uuid) for place, gpu in enumerate(gpus)]
    # UUIDs are compared whatever their case.
    plain = (
        None if setting is None else re.sub(r"(?i)gpu-[0-9a-f]*", lambda found: f"GPU-{found[0][4:].lower()}", setting)
    )
    selection = select(variable, plain, names, repeats="end" if variable == ROCR else "skip")
    return [gpus[place] for place in selection.places], selection.note


def _spelled_plainly(uuid: re.Match[str]) -> str:
    return f"GPU-{uuid[0][4:].lower()}"


def _contradictions(env: Mapping[str, str]) -> list[str]:
    rocr, hip, cuda = (env.get(name) for name in (ROCR, HIP, CUDA))
    notes = []
    if hip is not None and cuda is not None and hip != cuda:
        notes.append(f"{HIP}={hip} and {CUDA}={cuda} differ: HIP follows the first; unset one of them")
    if rocr is not None and hip is None:
        notes.append(f"Ray refuses {ROCR} without {HIP}: set {HIP} to places among the devices that are left")
    if rocr and hip and len(hip.split(",")) > len(rocr.split(",")):
        notes.append(f"{HIP} has more entries than {ROCR} leaves devices: PyTorch refuses that")
    # The runtime takes an empty list for none at all, Ray and PyTorch for no device.
    if hip == "" or (hip is None and cuda == ""):
        notes.append(f"{HIP if hip == '' else CUDA} is empty: HIP ignores an empty list; -1 hides every device")
    return notes
