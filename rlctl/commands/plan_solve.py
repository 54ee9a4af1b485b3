"""`rlctl plan solve`: how few devices, how long, how much at one time still fits."""

from __future__ import annotations

from typing import Annotated

import typer
from rlctl_hw import solving
from rlctl_hw.solving import QUANTITIES, Quantity

from rlctl import planning, render
from rlctl.commands import _plan_view, _request
from rlctl.commands._request import FilesOption, HardwareOption, RequestArgument
from rlctl.render import OutputOption


def solve(
    ctx: typer.Context,
    quantity: Annotated[Quantity, typer.Argument(metavar="QUANTITY", help=f"One of {', '.join(QUANTITIES)}.")],
    words: RequestArgument = None,
    files: FilesOption = None,
    hw: HardwareOption = None,
    output: OutputOption = "text",
) -> None:
    """Find the least devices, or the most of something else, that fits; one more (of devices, fewer) does not.

    Example: rlctl plan solve seq_len qwen2.5-7b-grpo --hw h100-80gb:8
    """
    hardware = planning.hardware_named(hw)
    request = _request.read_for(words, files, ctx, hardware)
    asked = planning.workload_of(request.resolved.config)
    with planning.refusing():
        found = solving.solve(quantity, asked, hardware)
    content = {"name": request.name, "hardware": hw, "quantity": quantity, "key": found.key, "value": found.value}
    if render.document(output, **content, limit=found.limit, plan=found.plan.to_json()):
        return
    render.text(f"{quantity} = {found.value:g}   ({found.key})")
    render.text(f"{'with fewer' if quantity == 'gpus' else 'beyond it'}: {found.limit}")
    render.text(_plan_view.layout_words(found.plan))
