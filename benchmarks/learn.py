"""Does every family learn? Each quickstart preset, from one warm-started checkpoint, in a bounded number of steps.

For each seed a pupil who forgets to carry is trained once, and the teacher that distillation asks for; then every
preset named quickstart-* starts from that pupil. The table goes to benchmarks/learn.md, the numbers to
results/learn.json. The exit status is 1 where a preset gains less than 20 points of held-out accuracy.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
WANTED_GAIN = 0.20
RLCTL = str(Path(sys.executable).with_name("rlctl"))

HEAD = """\
# What each family learns

<!-- Made by `nox -s learn` (benchmarks/learn.py). -->

Measured {date} on {cores} CPU cores, {jobs} runs of one thread each at a time: `nox -s learn -- --seeds {words}`.
Other jobs ran on the same cores, so seconds are an upper bound; accuracies do not depend on them. For each seed
one pupil is warm-started, who forgets to carry in three sums of five; then every preset takes {steps} steps from
him, with its own settings otherwise. Accuracy is greedy, on 512 held-out sums, with the weights that the rollout
engine has after the last sync. The gain is in points; `steps to +20` is the first validation, one in five steps,
that was 20 points above the pupil.
"""


@dataclass(frozen=True)
class Run:
    """What one preset did with one seed: held-out accuracy by step, from 0 on, and seconds from start to end."""

    preset: str
    seed: int
    accuracy: dict[int, float]
    seconds: float

    @property
    def before(self) -> float:
        """Accuracy of the pupil."""
        return self.accuracy[0]

    @property
    def after(self) -> float:
        """Accuracy after the last step."""
        return self.accuracy[max(self.accuracy)]

    @property
    def steps_needed(self) -> int | None:
        """First measured step with the wanted gain; None without one."""
        return min((step for step, value in self.accuracy.items() if value - self.before >= WANTED_GAIN), default=None)


def main() -> int:
    """Run every preset with every seed, write the table, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--presets", nargs="+", choices=families(), default=families(), metavar="PRESET")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=40, help="steps that each preset may take")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, of one thread each")
    parser.add_argument("--folder", type=Path, help="where runs are kept; those that it has are not repeated")
    parser.add_argument("--out", type=Path, default=HERE / "learn.md")
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp(prefix="rlctl-learn-"))
    folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(lambda seed: make_models(folder, seed), options.seeds))
        cases = [(preset, seed) for seed in options.seeds for preset in options.presets]
        runs = list(pool.map(lambda case: learn(folder, case[0], case[1], options.steps), cases))
    text = report(runs, options)
    print(text)
    options.out.write_text(text)
    numbers = HERE / "results" / "learn.json" if options.out == HERE / "learn.md" else options.out.with_suffix(".json")
    numbers.write_text(json.dumps([asdict(run) for run in runs], indent=1) + "\n")
    return int(any(run.after - run.before < WANTED_GAIN for run in runs))


def families() -> list[str]:
    """Return the names of the quickstart and its relatives."""
    return sorted(file.stem for file in (HERE.parent / "presets").glob("quickstart*.toml"))


def make_models(folder: Path, seed: int) -> None:
    """Train the pupil, who forgets to carry in three sums of five, and the teacher, who does not."""
    careless = "data.careless_demonstrations=0.6"
    launch(folder, "quickstart-sft", f"pupil-{seed}", [careless, f"seed={seed}"])
    launch(folder, "quickstart-sft", f"teacher-{seed}", [f"seed={seed}"])


def learn(folder: Path, preset: str, seed: int, steps: int) -> Run:
    """Let a preset teach the pupil of a seed."""
    start = folder / "runs" / f"pupil-{seed}" / "hf"
    settings = ["warm_start=none", "model.type=pretrained", f"model.path={start}", f"seed={seed}"]
    settings += [f"trainer.num_steps={steps}", "validation.every_steps=5", "checkpoint.every_steps=0"]
    if preset == "quickstart-distill":
        settings.append(f"algo.teacher_path={folder / 'runs' / f'teacher-{seed}' / 'hf'}")
    name = f"{preset}-{seed}"
    launch(folder, preset, name, settings)
    run = Run(preset, seed, dict(_curve(folder / "runs" / name)), _summary(folder, name)["wall_s"])
    print(f"{name}: {run.before:.3f} -> {run.after:.3f}", file=sys.stderr, flush=True)
    return run


def launch(folder: Path, preset: str, name: str, settings: Sequence[str]) -> None:
    """Make a run as a user would, unless the folder has it."""
    if (folder / "runs" / name / "summary.json").exists():
        return
    command = [RLCTL, "launch", preset, "--name", name, "--yes", *settings]
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout[-2000:]}{done.stderr[-4000:]}")


def report(runs: Sequence[Run], options: argparse.Namespace) -> str:
    """Return the page: a line for each preset, its seeds side by side."""
    seeds = ", ".join(str(seed) for seed in options.seeds)
    lines = [
        HEAD.format(
            date=time.strftime("%Y-%m-%d"),
            cores=os.cpu_count(),
            jobs=options.jobs,
            steps=options.steps,
            words=" ".join(map(str, options.seeds)),
        ),
        f"| preset | before (seeds {seeds}) | after | least gain | steps to +20 | seconds |",
        "|---|---|---|---|---|---|",
    ]
    for preset in dict.fromkeys(run.preset for run in runs):
        mine = [run for run in runs if run.preset == preset]
        gain = min(run.after - run.before for run in mine)
        lines.append(
            f"| {preset} | {_each(f'{run.before:.3f}' for run in mine)} | {_each(f'{run.after:.3f}' for run in mine)} "
            f"| {100 * gain:.1f} | {_each(str(run.steps_needed or 'never') for run in mine)} "
            f"| {_each(f'{run.seconds:.0f}' for run in mine)} |"
        )
    return "\n".join(lines) + "\n"


def _each(values: Iterable[str]) -> str:
    return ", ".join(values)


def _curve(run: Path) -> Iterable[tuple[int, float]]:
    for line in (run / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        if row["phase"] == "validation":
            yield row["step"], row["val/accuracy"]


def _summary(folder: Path, name: str) -> dict[str, Any]:
    return json.loads((folder / "runs" / name / "summary.json").read_text())


if __name__ == "__main__":
    sys.exit(main())
