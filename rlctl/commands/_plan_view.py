"""A plan for the eye: who runs what, why, memory by phase as bars, time by phase, and what a step costs."""

from __future__ import annotations

from datetime import date
from typing import Any

from rlctl_hw.explain import PHASE_WORDS, memory_table, sentences
from rlctl_hw.timing import step_seconds
from rlctl_hw.types import Plan

from rlctl import render
from rlctl_train.config.errors import UserError

BAR_WIDTH = 44
LETTERS = {
    "weights": "w",
    "gradients": "g",
    "optimizer": "o",
    "activations": "a",
    "logits": "l",
    "kv_cache": "k",
    "cuda_graphs": "u",
    "buffers": "b",
    "checkpoint_copy": "s",
    "communication": "n",
    "context": "c",
    "fragmentation": "f",
    "overhead": "p",
}
SECONDS_PER_HOUR = 3600.0


class Price:
    """What one device costs an hour, and of which day that price is."""

    def __init__(self, text: str) -> None:
        amount, _, day = text.partition("@")
        try:
            self.per_device_hour = float(amount)
            self.day = (date.fromisoformat(day) if day else date.today()).isoformat()
        except ValueError as error:
            raise UserError(
                f"--price {text}: {error}", "give a price per device and hour, such as 2.5 or 2.5@2026-11-01"
            ) from error

    def of_step(self, plan: Plan) -> tuple[float, float] | None:
        """Return the least and the most that a step costs; None where no time is predicted."""
        times = step_seconds(plan)
        if times is None:
            return None
        rate = num_devices(plan) * self.per_device_hour / SECONDS_PER_HOUR
        return times[1] * rate, times[2] * rate

    def to_json(self, plan: Plan) -> dict[str, Any]:
        """Return the price and what a step costs as plain values."""
        cost = self.of_step(plan)
        step = None if cost is None else {"low": cost[0], "high": cost[1]}
        return {"per_device_hour": self.per_device_hour, "date": self.day, "step": step}


def num_devices(plan: Plan) -> int:
    """Return the devices that a plan takes."""
    if plan.placement == "split":
        return plan.trainer_devices + plan.rollout_devices
    return max(plan.trainer_devices, plan.rollout_devices)


def show(plan: Plan, price: Price | None = None) -> None:
    """Print everything a plan says."""
    render.text(sentences(plan)[0])
    render.text(layout_words(plan))
    render.text("")
    choices(plan)
    memory(plan)
    times(plan, price)
    for line in plan.notes:
        render.note(line)


def layout_words(plan: Plan) -> str:
    """Return engine, split of the trainer, split of a rollout engine and savings in one line."""
    mesh, savings = plan.mesh, plan.savings
    degrees = [("tp", mesh.tp), ("pp", mesh.pp), ("cp", mesh.cp), ("ep", mesh.ep)]
    split = " ".join([f"{name}{degree}" for name, degree in degrees if degree > 1] + [f"dp{mesh.dp_shard}"])
    saved = [f"recompute {savings.recompute}"] if savings.recompute != "none" else []
    saved += ["offload parameters"] if savings.offload_params else []
    saved += ["offload optimizer"] if savings.offload_optimizer else []
    saved += [f"{savings.host_optimizer_share:.0%} of moments on the host"] if savings.host_optimizer_share else []
    rollout = f"rollout tp{plan.rollout_tensor_parallel}"
    if plan.rollout_pipeline_parallel > 1:
        rollout += f" pp{plan.rollout_pipeline_parallel}"
    return (
        f"{plan.engine} {split}, {rollout}, {plan.placement}, {', '.join(saved) or 'nothing recomputed or offloaded'}"
    )


def choices(plan: Plan) -> None:
    """Print what the planner chose and why."""
    render.table(("PLAN", "VALUE", "ORIGIN", "WHY"), [(c.key, c.value, c.origin, c.reason) for c in plan.choices])


def memory(plan: Plan) -> None:
    """Print memory by phase as bars of the device (on CPU of the host), and the host's."""
    table = memory_table(plan)
    ranges = {band.phase: band for band in plan.bands}
    rows = []
    for phase, gib in zip(table.phases, table.gib, strict=True):
        band = ranges.get(phase)
        expected = f"{band.low_gib:.1f} to {band.high_gib:.1f}" if band else ""
        rows.append((PHASE_WORDS[phase], f"{sum(gib):.1f}", expected, bar(table.parts, gib, plan.device_memory_gib)))
    whose = "HOST" if plan.device == "cpu" else "DEVICE"
    render.text("")
    render.table(("PHASE", "GIB", "RANGE", f"OF THE {whose}'S {plan.device_memory_gib:.1f} GIB"), rows)
    render.text("  ".join(f"{LETTERS[part]} {part}" for part in table.parts))
    hosts = dict.fromkeys(part.phase for part in plan.host_memory)
    for phase in hosts:
        parts = [part for part in plan.host_memory if part.phase == phase]
        words = ", ".join(f"{part.part} {part.gib:.1f}" for part in parts)
        render.text(f"host memory of a node while {phase}: {sum(part.gib for part in parts):.1f} GiB ({words})")


def bar(parts: tuple[str, ...], gib: tuple[float, ...], whole_gib: float) -> str:
    """Return a bar of the whole, filled with each part's letter; what is over is cut at the end."""
    filled, text = 0.0, ""
    for part, size in zip(parts, gib, strict=True):
        filled += size
        text += LETTERS[part] * (round(BAR_WIDTH * filled / whole_gib) - len(text)) if whole_gib else ""
    return f"|{text[:BAR_WIDTH]:.<{BAR_WIDTH}}|"


def times(plan: Plan, price: Price | None) -> None:
    """Print the time of each phase, of a step, and what a step costs."""
    total = step_seconds(plan)
    render.text("")
    if total is None:
        render.text("no step time: the speed of this device is not known; `rlctl calibrate` measures it")
        return
    rows = [
        (PHASE_WORDS[t.phase], f"{t.seconds:.3g}", f"{t.low_s:.3g} to {t.high_s:.3g}", t.origin, t.why)
        for t in plan.times
    ]
    render.table(("PHASE", "SECONDS", "RANGE", "ORIGIN", "WHY"), rows)
    render.text(f"a step takes about {total[0]:.3g} s ({total[1]:.3g} to {total[2]:.3g}), checkpoints apart")
    cost = price.of_step(plan) if price else None
    if price and cost:
        render.text(
            f"a step costs {cost[0]:.3g} to {cost[1]:.3g}, at {price.per_device_hour:g} a device and hour "
            f"(price of {price.day})"
        )
