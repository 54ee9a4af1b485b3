"""Inverse questions: how few devices, how long, how much at one time still fits. One more of the answer does not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, get_args

from rlctl_hw.plan import plan
from rlctl_hw.types import Device, DoesNotFit, Hardware, Pins, Plan, Workload

Quantity = Literal["gpus", "seq_len", "micro_batch_tokens", "lora_rank", "gpu_memory_utilization"]
QUANTITIES: tuple[Quantity, ...] = get_args(Quantity)

Asked = tuple[Workload, Hardware]
MOST_NODES, MOST_TOKENS, MOST_RANK = 128, 1 << 22, 1 << 14
SHARE_STEPS = 100


@dataclass(frozen=True)
class Solved:
    """The answer to an inverse question: its plan, and why the next value is too much (or, of devices, too few)."""

    quantity: Quantity
    key: str
    value: float
    plan: Plan
    limit: str


def solve(quantity: Quantity, workload: Workload, hardware: Hardware) -> Solved:
    """Return the least number of devices, or the most of anything else, that fits; DoesNotFit where none does."""
    return {
        "gpus": _gpus,
        "seq_len": _seq_len,
        "micro_batch_tokens": _micro_batch_tokens,
        "lora_rank": _lora_rank,
        "gpu_memory_utilization": _gpu_memory_share,
    }[quantity](workload, hardware)


def _gpus(workload: Workload, hardware: Hardware) -> Solved:
    """Count devices up to a node, then whole nodes."""
    if hardware.kind == "cpu":
        raise DoesNotFit("there are no accelerators to count", ("name some with --hw, such as h100-80gb:8",))
    per_node = len(hardware.devices)
    free = replace(workload, pins=replace(workload.pins, trainer_devices=None, rollout_devices=None))
    sizes = [(count, 1) for count in range(1, per_node + 1)] + [(per_node, n) for n in range(2, MOST_NODES + 1)]
    before: DoesNotFit | None = None
    for count, num_nodes in sizes:
        found = _planned((free, _with_devices(hardware, count, num_nodes)))
        if isinstance(found, Plan):
            return Solved("gpus", "trainer.num_devices", count * num_nodes, found, _words(before, "one is the least"))
        before = found
    assert before is not None
    raise before


def _seq_len(workload: Workload, hardware: Hardware) -> Solved:
    """The longest response beside the longest prompt; the answer is the sum."""
    prompt = workload.max_prompt_tokens
    reach = workload.shape.max_position or MOST_TOKENS

    def asked(tokens: int) -> Asked:
        return replace(workload, max_response_tokens=tokens - prompt), hardware

    value, found, limit = _most(
        asked, least=prompt + 1, most=max(prompt + 1, reach), end="the model reaches no further"
    )
    return Solved("seq_len", "rollout.max_response_tokens", value, found, limit)


def _micro_batch_tokens(workload: Workload, hardware: Hardware) -> Solved:
    def asked(tokens: int) -> Asked:
        return _pinned(workload, max_tokens_per_micro_batch=tokens), hardware

    sequences = max(workload.step_sequences, workload.mini_batch_sequences)
    most = workload.longest_tokens * sequences
    value, found, limit = _most(asked, least=workload.longest_tokens, most=most, end="that is a whole step's batch")
    return Solved("micro_batch_tokens", "engine.max_tokens_per_micro_batch", value, found, limit)


def _lora_rank(workload: Workload, hardware: Hardware) -> Solved:
    roles = tuple(role for role in workload.roles if role != "reference")

    def asked(rank: int) -> Asked:
        return replace(workload, lora_rank=rank, roles=roles, has_reference=workload.reference_needed), hardware

    most = min(MOST_RANK, workload.shape.hidden_size)
    value, found, limit = _most(asked, least=1, most=most, end="a larger rank than the model's width adds nothing")
    return Solved("lora_rank", "model.lora.rank", value, found, limit)


def _gpu_memory_share(workload: Workload, hardware: Hardware) -> Solved:
    if workload.rollout != "vllm":
        raise DoesNotFit(
            f"rollout.type={workload.rollout} takes what it needs, not a share", ("set rollout.type=vllm",)
        )

    def asked(hundredths: int) -> Asked:
        return _pinned(workload, gpu_memory_share=hundredths / SHARE_STEPS), hardware

    value, found, limit = _most(asked, least=1, most=SHARE_STEPS - 1, end="vLLM takes less than the whole", scan=True)
    return Solved("gpu_memory_utilization", "rollout.gpu_memory_share", value / SHARE_STEPS, found, limit)


def _most(
    asked: Callable[[int], Asked], *, least: int, most: int, end: str, scan: bool = False
) -> tuple[int, Plan, str]:
    """Return the largest value that fits, its plan, and why the next one does not; DoesNotFit where `least` does not.

    `scan` is for quantities of which too little does not fit either: the values are tried from above.
    """
    if scan:
        low = next((value for value in range(most, least, -1) if isinstance(_planned(asked(value)), Plan)), least)
    else:
        low, high = least, most
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if isinstance(_planned(asked(middle)), Plan) else (low, middle - 1)
    found = _planned(asked(low))
    if not isinstance(found, Plan):
        raise found
    return low, found, end if low == most else _words(_planned(asked(low + 1)), end)


def _planned(asked: Asked) -> Plan | DoesNotFit:
    try:
        return plan(*asked, with_remedies=False)
    except DoesNotFit as refusal:
        return refusal


def _words(refusal: Plan | DoesNotFit | None, otherwise: str) -> str:
    return refusal.what if isinstance(refusal, DoesNotFit) else otherwise


def _pinned(workload: Workload, **pins: float) -> Workload:
    changed: Pins = replace(workload.pins, **pins)
    return replace(workload, pins=changed)


def _with_devices(hardware: Hardware, count: int, num_nodes: int) -> Hardware:
    """Return a machine of so many of these devices; links and islands of fewer are those between the ones that stay."""
    devices: tuple[Device, ...] = hardware.devices[:count]
    links = tuple(link for link in hardware.links if link.first < count and link.second < count)
    islands = tuple(tuple(place for place in island if place < count) for island in hardware.islands)
    return replace(
        hardware,
        devices=devices,
        num_nodes=num_nodes,
        links=links,
        islands=tuple(island for island in islands if len(island) > 1),
    )
