"""Why the search chose what it chose: one line a key, by comparing with what else was tried."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from rlctl_hw.layouts import Candidate
from rlctl_hw.placing import Counts
from rlctl_hw.search import Tried
from rlctl_hw.types import Choice, Workload

Reader = Callable[[Candidate], Any]

ROLLOUT_KEY = "rollout.tensor_parallel"
SAVING_KEYS: dict[str, tuple[str, Reader]] = {
    "engine.offload_params": ("offload_params", lambda c: c.savings.offload_params),
    "engine.offload_optimizer": ("offload_optimizer", lambda c: c.savings.offload_optimizer),
}
FSDP2_KEYS: dict[str, tuple[str, Reader]] = {
    "engine.gradient_checkpointing": ("recompute", lambda c: c.savings.recompute == "full"),
    **SAVING_KEYS,
    "engine.reshard_after_forward": ("reshard_after_forward", lambda c: c.savings.reshard_after_forward),
}
MEGATRON_KEYS: dict[str, tuple[str, Reader]] = {
    "engine.tensor_parallel": ("tensor_parallel", lambda c: c.mesh.tp),
    "engine.pipeline_parallel": ("pipeline_parallel", lambda c: c.mesh.pp),
    "engine.context_parallel": ("context_parallel", lambda c: c.mesh.cp),
    "engine.expert_parallel": ("expert_parallel", lambda c: c.mesh.ep),
    "engine.sequence_parallel": ("sequence_parallel", lambda c: c.mesh.sequence_parallel),
    "engine.recompute": ("recompute", lambda c: c.savings.recompute),
    **SAVING_KEYS,
    "engine.host_optimizer_share": ("host_optimizer_share", lambda c: c.savings.host_optimizer_share),
}


def counts(workload: Workload, counted: Counts) -> list[Choice]:
    """Return why so many devices are on either side, where nobody pinned them."""
    sides = (
        ("trainer.num_devices", workload.pins.trainer_devices, counted.trainer),
        ("rollout.num_devices", workload.pins.rollout_devices, counted.rollout),
    )
    return [Choice(key, count, counted.reason, "assumed") for key, pin, count in sides if pin is None]


def layout(workload: Workload, chosen: Tried, found: list[Tried]) -> Iterator[Choice]:
    """Yield a choice for every key of layout and savings that nobody pinned."""
    keys = FSDP2_KEYS if workload.engine == "fsdp2" else MEGATRON_KEYS
    if workload.rollout == "vllm":
        keys = keys | {ROLLOUT_KEY: ("rollout_tensor_parallel", lambda c: c.rollout.tensor)}
    for key, (pin, read) in keys.items():
        if getattr(workload.pins, pin) is None:
            yield Choice(key, read(chosen.candidate), _why(read, chosen, found), "formula")


def _why(read: Reader, chosen: Tried, found: list[Tried]) -> str:
    value = read(chosen.candidate)
    others = [one for one in found if read(one.candidate) != value]
    if not others:
        return "nothing to gain from another value here"
    fitting = [one for one in others if one.plan is not None]
    if not fitting:
        return "nothing else fits"
    if chosen.step_s is None:
        return "enough memory as it is" if value in (False, "none", 1, 0.0, True) else "the first that fits"
    rival = min(fitting, key=lambda one: one.step_s or 0.0)
    lost = (rival.step_s or 0.0) - chosen.step_s
    other = str(read(rival.candidate)).lower()
    if lost < 0.005 * chosen.step_s:
        return f"as fast as {other}, and simpler"
    return f"predicted {lost:.3g} s a step faster than {other}"
