"""From a short run and measured rates to the constants that correct the planner on this machine."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from statistics import median

from rlctl_hw.memory import OVERHEADS
from rlctl_hw.types import Corrections, DeviceKind, Plan

from rlctl.held import Held
from rlctl_train.config import RunConfig
from rlctl_train.config.errors import FAILED, UserError

TORCH_NAMES: dict[DeviceKind, str] = {"cuda": "cuda", "rocm": "cuda", "ascend": "npu", "cpu": "cpu"}
MEASURE_LIMIT_S = 300
LEAST_FACTOR = 0.1
"""An overhead factor below this would say that processes hold nothing: something else went wrong."""


def shortened(config: RunConfig, num_steps: int) -> RunConfig:
    """Return the run cut to a few steps: no look at held-out prompts beyond the least, nothing kept."""
    optim = config.trainer.optim.model_copy(update={"warmup_steps": 0})
    trainer = config.trainer.model_copy(update={"num_steps": num_steps, "optim": optim})
    return config.model_copy(
        update={
            "trainer": trainer,
            "warm_start": None,
            "validation": config.validation.model_copy(update={"every_steps": 0, "max_prompts": 1}),
            "checkpoint": config.checkpoint.model_copy(update={"every_steps": 0, "export_hf": False, "keep_last": 1}),
            "telemetry": config.telemetry.model_copy(update={"trackers": ()}),
        }
    )


def measured_rates(kind: DeviceKind, threads: int, environ: Mapping[str, str]) -> Corrections:
    """Measure matrix products and memory of one device, in a process that may import torch."""
    command = [sys.executable, "-m", "rlctl_train.measure", TORCH_NAMES[kind]]
    environment = {**environ, "OMP_NUM_THREADS": str(threads)}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=MEASURE_LIMIT_S, env=environment,
            stdin=subprocess.DEVNULL, check=True,
        )  # fmt: skip
        return Corrections(**json.loads(done.stdout))
    except (OSError, subprocess.SubprocessError, ValueError, TypeError) as error:
        said = str(getattr(error, "stderr", None) or error).strip().splitlines()
        last = said[-1] if said else "no answer"
        remedy = "try `rlctl doctor`; the torch of this environment must see the device"
        raise UserError(f"the device's rates cannot be measured: {last}", remedy, exit_code=FAILED) from error


def corrected(rates: Corrections, plan: Plan, rows: tuple[Held, ...]) -> Corrections:
    """Return rates with what the run adds; `plan` was made with the rates alone, `rows` hold it against the run."""
    rooflines = {time.phase: time.roofline_s for time in plan.times}
    factors = {
        row.phase: row.measured_s / rooflines[row.phase]
        for row in rows
        if row.measured_s is not None and rooflines.get(row.phase, 0.0) > 0
    }
    return replace(rates, time_factors=factors, overhead_factor=_overhead_factor(plan, rows))


def _overhead_factor(plan: Plan, rows: tuple[Held, ...]) -> float | None:
    """Return measured over assumed overhead, the median of the phases."""
    found = []
    for row in rows:
        if row.gib is None or row.measured_gib is None:
            continue
        assumed = sum(part.gib for part in plan.memory if part.phase == row.phase and part.part in OVERHEADS)
        rest = row.gib - assumed
        if assumed > 0:
            found.append(max(LEAST_FACTOR, (row.measured_gib - rest) / assumed))
    return median(found) if found else None
