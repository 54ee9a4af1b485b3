"""How fast the command feels: `rlctl --help` and `rlctl preset ls` against `python -c "import typer"`, in turns."""

from __future__ import annotations

import json
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


def main() -> None:
    """Print and write medians in milliseconds, and ratios to `import typer` pair by pair."""
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
    record = {"command": "python benchmarks/startup.py", "date": time.strftime("%Y-%m-%d"), "rows": rows}
    text = json.dumps(record, indent=2)
    print(text)
    results = Path(__file__).parent / "results"
    results.mkdir(exist_ok=True)
    (results / "startup.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
