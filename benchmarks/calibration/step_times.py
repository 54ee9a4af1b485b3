"""Predicted against published times of a step's phases: writes docs/step_times.md; `--check` tells whether it is stale.

Nothing here is fitted to the rows. What a row does not state (prompt and response lengths, most of all) is assumed as
the planner assumes it, which is part of the error.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from rlctl_hw.generation_time import generation
from rlctl_hw.lengths import lengths
from rlctl_hw.model_catalogue import known_shape
from rlctl_hw.probe import parse_hardware
from rlctl_hw.speeds import speeds_of
from rlctl_hw.timing import FASTEST, SLOWEST
from rlctl_hw.training_time import Work, training_seconds
from rlctl_hw.types import EngineName, Hardware, Layout, Mesh, Recompute, Savings, Workload

HERE = Path(__file__).parent
PAGE = HERE.parent.parent / "docs" / "step_times.md"
UPDATES = ("actor_update", "critic_update", "training")
ROLLOUT_SHARE = 0.4
"""Of a device, for a colocated vLLM: what the rows that state it have."""
HEAD = f"""# How good the predicted times are

<!-- Made by benchmarks/calibration/step_times.py (`nox -s calibration`); edit that, not this page. -->

`rlctl plan` gives {FASTEST:g} to {SLOWEST:g} times a roofline as the range of a phase, until `rlctl calibrate` has
measured the machine. These are published times beside our rooflines: facts of other projects, with their source in
`benchmarks/calibration/step_times.csv`. Ratio is measured over roofline.

- Where lengths are stated (the 1.5B rows, and training alone without experts) the ratio is 1.0 to 1.3.
- Where they are not (the 7B rows), half of the longest prompt and 0.4 of the longest response are assumed, as a plan
  does: GSM8K's are shorter, so passes over them look faster than the roofline. `rlctl plan --mean-response N` tells it.
- The 7B rows generated with a vLLM of early 2025 on ROCm: short answers, and a decode step of tens of milliseconds.
- Training with experts is tuned by its vendor, who hides the traffic between experts behind computing; here it adds.
- Of a step of reinforcement learning these are the phases; what lies between them (rewards, waiting for the slowest
  worker, waking and sleeping) is the reason for the range's upper end.
"""


@dataclass(frozen=True)
class Row:
    """One published time with what we would say."""

    run: str
    phase: str
    measured_s: float
    roofline_s: float

    @property
    def ratio(self) -> float:
        """Return measured over roofline."""
        return self.measured_s / self.roofline_s

    @property
    def inside(self) -> bool:
        """Say whether the range of the plan holds the measured time."""
        return FASTEST <= self.ratio <= SLOWEST


def main(arguments: Sequence[str]) -> int:
    """Write the page, or compare; return 1 where it is out of date."""
    text = page(rows())
    stale = not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != text
    if not stale:
        return 0
    if "--check" in arguments:
        print(f"docs/{PAGE.name} is out of date: run `nox -s calibration`", file=sys.stderr)
        return 1
    PAGE.write_text(text, encoding="utf-8")
    print(f"wrote docs/{PAGE.name}")
    return 0


def rows() -> list[Row]:
    """Return every row of the table with its roofline."""
    with (HERE / "step_times.csv").open(encoding="utf-8") as file:
        return [
            Row(row["run"], row["phase"], float(row["measured_s"]), roofline_s(row)) for row in csv.DictReader(file)
        ]


def roofline_s(row: dict[str, str]) -> float:
    """Return our roofline of one row's phase."""
    hardware = parse_hardware(row["hardware"])
    workload, layout = _asked(row, hardware)
    speeds = speeds_of(hardware)
    assert speeds is not None, row["hardware"]
    if row["phase"] == "generation":
        return generation(workload, layout, speeds)[0]
    step = lengths(workload)
    length, square = (step.prompt + step.mean, step.square)
    if row["phase"] == "training":
        length, square = float(row["prompt"]), float(row["prompt"]) ** 2
    work = Work(tokens=step.num * length, squares=step.num * square)
    role = "critic" if row["phase"] in ("values", "critic_update") else "actor"
    return training_seconds(work, role, row["phase"] in UPDATES, workload, hardware, layout, speeds)[0]


def page(found: list[Row]) -> str:
    """Return the page: a summary, then every row."""
    lines = [HEAD, "| rows | n | median ratio | least | most | inside the range |", "|---|---|---|---|---|---|"]
    for name, group in _groups(found).items():
        ratios = [row.ratio for row in group]
        inside = sum(row.inside for row in group)
        lines.append(
            f"| {name} | {len(group)} | {median(ratios):.2f} | {min(ratios):.2f} | {max(ratios):.2f} | {inside} |"
        )
    lines += ["", "| run | phase | measured s | roofline s | ratio |", "|---|---|---|---|---|"]
    lines += [f"| {r.run} | {r.phase} | {r.measured_s:.3g} | {r.roofline_s:.3g} | {r.ratio:.2f} |" for r in found]
    return "\n".join(lines) + "\n"


def _groups(found: list[Row]) -> dict[str, list[Row]]:
    return {
        "generation": [row for row in found if row.phase == "generation"],
        "forward passes": [row for row in found if row.phase in ("logprobs", "values")],
        "updates": [row for row in found if row.phase in ("actor_update", "critic_update")],
        "training alone": [row for row in found if row.phase == "training"],
        "all": found,
    }


def _asked(row: dict[str, str], hardware: Hardware) -> tuple[Workload, Layout]:
    shape = known_shape(row["model"])
    assert shape is not None, row["model"]
    tp, pp, cp, ep = (int(row[name]) for name in ("tp", "pp", "cp", "ep"))
    count = len(hardware.devices) * hardware.num_nodes
    engine: EngineName = "megatron" if row["engine"] == "megatron" else "fsdp2"
    recompute: Recompute = "full" if row["recompute"] == "full" else "none"
    workload = Workload(
        shape=shape,
        roles=("actor",),
        group_size=1,
        prompts_per_step=int(row["sequences"]),
        mini_batches=int(row["mini_batches"]),
        max_prompt_tokens=int(row["prompt"]),
        max_response_tokens=max(1, int(row["response"])),
        rollout="vllm",
        engine=engine,
        mean_response_tokens=int(row["mean_response"]) if row["mean_response"] else None,
    )
    layout = Layout(
        device=hardware.kind,
        memory_gib=hardware.devices[0].memory_gib,
        trainer_devices=count,
        rollout_devices=count,
        compute_dtype="bfloat16",
        rollout_dtype="bfloat16",
        max_tokens_per_micro_batch=int(row["tokens_per_pass"]),
        max_concurrent=1024,
        gpu_memory_share=ROLLOUT_SHARE,
        mesh=Mesh(dp_shard=count // (tp * pp * cp), tp=tp, pp=pp, cp=cp, ep=ep, sequence_parallel=tp > 1),
        savings=Savings(recompute=recompute),
    )
    return workload, layout


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
