"""Showing a resolved run and its plan, as text or as a document."""

from __future__ import annotations

from rlctl_hw.types import Hardware, Plan

from rlctl import planning, render
from rlctl.commands import _plan_view
from rlctl.commands._request import Request
from rlctl.render import Output
from rlctl.resolve import DEFAULT
from rlctl_train.config.errors import UserError


def request(request: Request, hardware: Hardware, *, output: Output, show_all: bool) -> None:
    """Print every value that is not a default (all with `show_all`) with its origin, and the plan for the hardware."""
    resolved = request.resolved
    if output != "text":
        _request_document(request, hardware, output)
        return
    shown = [(k, o.value, o.source) for k, o in resolved.origins.items() if show_all or o.source != DEFAULT]
    render.table(("KEY", "VALUE", "FROM"), shown)
    hidden = len(resolved.origins) - len(shown)
    if hidden:
        render.say(f"\n{hidden} values are defaults (--all shows them)")
    render.text("")
    _plan_view.show(planning.plan_here(resolved.config, hardware))
    render.say(f"\n{_next_command(request, hardware)}")


def _next_command(request: Request, hardware: Hardware) -> str:
    """Return what to do with a run that fits: start it where it can train, or look at the machine that it needs."""
    if request.resolved.config.engine.type != "fsdp2":
        return "this version plans for Megatron; it trains with engine.type=fsdp2"
    if any(fact.source.startswith("devices.toml") for fact in hardware.facts.values()):
        return f"on such a machine, start it with `rlctl launch {request.name}`"
    return f"start it with `rlctl launch {request.name}`"


def _request_document(request: Request, hardware: Hardware, output: Output) -> None:
    """Print the document also when the run does not fit here, without a plan, and then say so."""
    resolved = request.resolved
    values = {key: {"value": o.value, "source": o.source} for key, o in resolved.origins.items()}
    try:
        made, refusal = planning.plan_here(resolved.config, hardware).to_json(), None
    except UserError as error:
        made, refusal = None, error
    render.document(output, name=request.name, values=values, notes=list(resolved.notes), plan=made)
    if refusal is not None:
        raise refusal


def plan(made: Plan) -> None:
    """Print what the planner chose and why, without memory and time."""
    _plan_view.choices(made)
    for line in made.notes:
        render.note(line)
