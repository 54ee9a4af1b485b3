"""`rlctl plan search` ranks every way to run one thing; `rlctl plan compare` sets plans of several side by side."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rlctl_hw import ranking
from rlctl_hw.memory import peak_gib
from rlctl_hw.ranking import Ranked
from rlctl_hw.timing import step_seconds
from rlctl_hw.types import Plan

from rlctl import planning, render
from rlctl.commands import _plan_view, _request
from rlctl.commands._request import FilesOption, HardwareOption, PriceOption, RequestArgument
from rlctl.render import OutputOption
from rlctl_train.config.errors import DOES_NOT_FIT, UserError

MOST_ROWS = 12


def search(
    ctx: typer.Context,
    words: RequestArgument = None,
    files: FilesOption = None,
    hw: HardwareOption = None,
    show_all: Annotated[bool, typer.Option("--all", "-a", help="Show every layout, also those refused.")] = False,
    output: OutputOption = "text",
) -> None:
    """Rank every engine, placement and layout by predicted step time, with the reason why each loser lost."""
    hardware = planning.hardware_named(hw)
    request = _request.read_for(words, files, ctx, hardware)
    ranked = ranking.rank(planning.workload_of(request.resolved.config), hardware)
    fitting = [one for one in ranked if one.tried is not None and one.tried.plan is not None]
    shown = ranked if show_all else fitting[:MOST_ROWS]
    if not render.document(output, name=request.name, hardware=hw, ranked=[_row(one) for one in shown]):
        rows = [(place, *_cells(one)) for place, one in enumerate(shown, start=1)]
        render.table(("RANK", "STEP S", "PEAK GIB", "LAYOUT", "WHY NOT FIRST"), rows)
        render.say(f"\n{len(fitting)} ways fit, {len(ranked) - len(fitting)} do not (--all shows them)")
    if not fitting:
        raise UserError(
            "no layout fits: " + (ranked[0].lost if ranked else "none is legal"),
            "`rlctl plan NAME --fix` looks for the smallest change that does",
            exit_code=DOES_NOT_FIT,
        )


def compare(
    ctx: typer.Context,
    names: Annotated[list[str], typer.Argument(metavar="NAME... [KEY=VALUE]...", help="Presets or files.")],
    hw: Annotated[
        list[str] | None, typer.Option("--hw", help="A machine, such as h100-80gb:8; may be repeated.")
    ] = None,
    price: PriceOption = None,
    output: OutputOption = "text",
) -> None:
    """Set plans side by side: several presets or files on one machine, or one on several machines."""
    from rlctl.overrides import parse_arguments

    arguments = parse_arguments(names, _request.options_of(ctx))
    settings = [word for word in names if word not in arguments.names]
    money = _plan_view.Price(price) if price else None
    columns: dict[str, dict[str, Any]] = {}
    for name in arguments.names:
        for spec in hw or [None]:
            title = " on ".join(word for word in (name if len(arguments.names) > 1 else None, spec) if word) or name
            columns[title] = _summary(ctx, [name, *settings], spec, money)
    if not render.document(output, plans=columns):
        keys = list(dict.fromkeys(key for column in columns.values() for key in column))
        render.table(("", *columns), [(key, *(column.get(key) for column in columns.values())) for key in keys])


def _summary(ctx: typer.Context, words: list[str], spec: str | None, money: _plan_view.Price | None) -> dict[str, Any]:
    hardware = planning.hardware_named(spec)
    request = _request.read_for(words, None, ctx, hardware)
    try:
        plan = planning.plan_for(planning.workload_of(request.resolved.config), hardware)
    except UserError as refusal:
        return {"fits": False, "why": refusal.what}
    times = step_seconds(plan)
    phase, peak = peak_gib(plan.memory)
    summary: dict[str, Any] = {
        "fits": True,
        "devices": f"{_plan_view.num_devices(plan)} x {hardware.devices[0].name}",
        "layout": _plan_view.layout_words(plan),
        "tokens per micro-batch": plan.max_tokens_per_micro_batch,
        "peak": f"{peak:.1f} of {plan.device_memory_gib:.1f} GiB in {phase}",
        "step s": None if times is None else f"{times[0]:.3g} ({times[1]:.3g} to {times[2]:.3g})",
    }
    cost = money.of_step(plan) if money else None
    if money and cost:
        summary["step costs"] = f"{cost[0]:.3g} to {cost[1]:.3g} (price of {money.day})"
    return summary


def _cells(one: Ranked) -> tuple[str, str, str, str]:
    plan = one.tried.plan if one.tried is not None else None
    if plan is None:
        return "-", "-", f"{one.engine} {one.placement}{_split_words(one)}", one.lost
    times = step_seconds(plan)
    step = "-" if times is None else f"{times[0]:.3g} ({times[1]:.3g} to {times[2]:.3g})"
    return step, f"{peak_gib(plan.memory)[1]:.1f}", _plan_view.layout_words(plan), one.lost


def _split_words(one: Ranked) -> str:
    if one.tried is None:
        return ""
    mesh, rollout = one.tried.candidate.mesh, one.tried.candidate.rollout
    return f" tp{mesh.tp} pp{mesh.pp} cp{mesh.cp} ep{mesh.ep}, rollout tp{rollout.tensor} pp{rollout.pipeline}"


def _row(one: Ranked) -> dict[str, Any]:
    plan: Plan | None = one.tried.plan if one.tried is not None else None
    return {
        "engine": one.engine,
        "placement": one.placement,
        "fits": plan is not None,
        "lost": one.lost,
        "plan": plan.to_json() if plan is not None else None,
    }
