"""How fast the command feels, and what the processes of a run import before they work.

`rlctl --help` and `rlctl preset ls` against `python -c "import typer"`, in turns; of the imports, seconds of processor
time, which other work on the machine changes less than seconds on the clock.
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

RLCTL = str(Path(sys.executable).with_name("rlctl"))
COMMANDS = {
    "import typer": [sys.executable, "-c", "import typer"],
    "rlctl --help": [RLCTL, "--help"],
    "rlctl preset ls": [RLCTL, "preset", "ls"],
}
ROUNDS = 15
RESTING = "from rlctl_train.importing import uncollected\nwith uncollected():\n    import "
LOADING = "import rlctl_train.workers\nfrom rlctl_train.registry import ENGINES, ROLLOUTS, load\n"
IMPORTS = {
    "torch alone": "import torch",
    "driver": f"{RESTING}rlctl_train.driver, rlctl_train.telemetry.report",
    "trainer rank": f"{LOADING}load(ENGINES, 'fsdp2')",
    "rollout worker, hf": f"{LOADING}load(ROLLOUTS, 'hf')",
    "score worker": "import rlctl_train.scoring",
    "grader": "import rlctl_train.rewards.worker",
}
IMPORT_ROUNDS = 3


def main() -> None:
    """Print and write medians in milliseconds, ratios to `import typer` pair by pair, and seconds of imports."""
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for round_number in range(ROUNDS + 1):
        for name, command in COMMANDS.items():
            start = time.perf_counter()
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            if round_number:  # the first round fills caches
                times[name].append(1000 * (time.perf_counter() - start))
    base = times["import typer"]
    rows = {
        name: {
            "median_ms": round(statistics.median(values), 1),
            "ratio": round(statistics.median(v / b for v, b in zip(values, base, strict=True)), 2),
        }
        for name, values in times.items()
    }
    record = {
        "command": "python benchmarks/startup.py",
        "date": time.strftime("%Y-%m-%d"),
        "rows": rows,
        "imports_cpu_s": {name: round(_import_cpu_s(code), 1) for name, code in IMPORTS.items()},
    }
    text = json.dumps(record, indent=2)
    print(text)
    results = Path(__file__).parent / "results"
    results.mkdir(exist_ok=True)
    (results / "startup.json").write_text(text + "\n")


def _import_cpu_s(code: str) -> float:
    """Return the median of the processor time that a Python with this code takes, in seconds."""
    taken = []
    for _ in range(IMPORT_ROUNDS):
        before = _children_cpu_s()
        subprocess.run([sys.executable, "-c", code], check=True, stderr=subprocess.DEVNULL)
        taken.append(_children_cpu_s() - before)
    return statistics.median(taken)


def _children_cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    main()
