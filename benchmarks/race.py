"""Race rlctl against TRL's GRPOTrainer on this machine, turn by turn, and write the ratios.

    python benchmarks/race.py --trl-python .nox/bench_trl/bin/python [--models 1m 5m] [--workloads fixed spread]

Both systems get the same model folder, prompts, group size, sampling, precision and threads, and take turns on the
same cores. A pair of turns during which other processes took more than a tenth of a core is discarded.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import secrets
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from floor import floor, matmul_flops_per_s
from workloads import MODELS, WORKLOADS

HERE = Path(__file__).parent
FOREIGN_SHARE = 0.10


@dataclass
class Runner:
    """One system's process."""

    name: str
    process: subprocess.Popen[str]

    def read(self) -> dict[str, Any]:
        """Return the next JSON line; other output is passed on."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise SystemExit(f"{self.name} ended before its turn was over")

    def turn(self, steps: int) -> dict[str, Any]:
        """Let it take `steps` steps; add the share of a core that other processes took meanwhile."""
        assert self.process.stdin is not None
        own, busy, start = self._cpu_s(), _machine_cpu_s(), time.perf_counter()
        self.process.stdin.write(f"{steps}\n")
        self.process.stdin.flush()
        result = self.read()
        wall = time.perf_counter() - start
        foreign = (_machine_cpu_s() - busy) - (self._cpu_s() - own)
        return result | {"foreign_share": foreign / wall}

    def _cpu_s(self) -> float:
        total = 0.0
        for process in [psutil.Process(self.process.pid), *psutil.Process(self.process.pid).children(recursive=True)]:
            try:
                times = process.cpu_times()
                total += times.user + times.system
            except psutil.NoSuchProcess:
                continue
        return total


def main() -> None:
    """Run every model and workload, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trl-python", required=True)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--workloads", nargs="+", choices=list(WORKLOADS), default=list(WORKLOADS))
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cores", default="0", help="processors both systems are pinned to, e.g. 0 or 0,1")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "race.json")
    options = parser.parse_args()
    os.sched_setaffinity(0, {int(core) for core in options.cores.split(",")})
    rate = matmul_flops_per_s(options.threads)
    rows = []
    for model in options.models:
        folder = make_model(model)
        for workload in options.workloads:
            row = race(model, workload, folder, options)
            if "rlctl" in row:
                row["rlctl"]["floor"] = _floor(model, row["rlctl"], rate)
            rows.append(row)
            print(json.dumps(row, indent=2), flush=True)
    record = {
        "command": "python benchmarks/race.py " + " ".join(sys.argv[1:]).replace(options.trl_python, "TRL_PYTHON"),
        "date": time.strftime("%Y-%m-%d"),
        "processor": _processor(),
        "python": platform.python_version(),
        "matmul_gflop_per_s": round(rate / 1e9, 1),
        "rows": rows,
    }
    options.out.parent.mkdir(exist_ok=True)
    options.out.write_text(json.dumps(record, indent=2) + "\n")


def make_model(name: str) -> str:
    """Write the model folder both systems load."""
    from rlctl_train.config.model import RandomModel
    from rlctl_train.model_factory import make_random_model

    hidden, layers, heads, kv_heads, inner = MODELS[name]
    folder = Path(tempfile.mkdtemp()) / name
    config = RandomModel(
        hidden_size=hidden, num_layers=layers, num_heads=heads, num_kv_heads=kv_heads, intermediate_size=inner
    )
    make_random_model(config, folder, seed=0)
    return str(folder)


def race(model: str, workload: str, folder: str, options: argparse.Namespace) -> dict[str, Any]:
    """Give both systems turns; return medians of the pairwise ratios."""
    environment = os.environ | {"OMP_NUM_THREADS": str(options.threads), "HF_HUB_OFFLINE": "1"}
    environment |= {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "0",
    }
    runners = [
        _start(name, [python, str(HERE / script), folder, workload, "--threads", str(options.threads)], environment)
        for name, python, script in (
            ("rlctl", sys.executable, "rlctl_runner.py"),
            ("trl", options.trl_python, "trl_runner.py"),
        )
    ]
    for runner in runners:
        runner.turn(3)  # warm-up
    pairs, discarded = [], 0
    steps = 10 if WORKLOADS[workload].fixed else 2
    for _ in range(options.rounds):
        ours, theirs = (runner.turn(steps) for runner in runners)
        if max(ours["foreign_share"], theirs["foreign_share"]) > FOREIGN_SHARE:
            discarded += 1
        else:
            pairs.append((ours, theirs))
    for runner in runners:
        assert runner.process.stdin is not None
        runner.process.stdin.close()
        runner.process.wait(60)
    return {"model": model, "workload": workload, "pairs": len(pairs), "discarded": discarded, **_compare(pairs)}


def _compare(pairs: list[tuple[dict[str, Any], dict[str, Any]]]) -> dict[str, Any]:
    def rate(turn: dict[str, Any]) -> float:
        return turn["response_tokens"] / turn["seconds"]

    def per_token(turn: dict[str, Any], part: str) -> float:
        rest = turn["seconds"] - turn["generation_s"] - turn["update_s"]
        return (rest if part == "rest_s" else turn[part]) / turn["response_tokens"]

    if not pairs:
        return {"note": "every pair was contended"}
    out: dict[str, Any] = {"tokens_per_s_ratio": round(statistics.median(rate(a) / rate(b) for a, b in pairs), 3)}
    for index, name in enumerate(("rlctl", "trl")):
        turns = [pair[index] for pair in pairs]
        out[name] = {
            "tokens_per_s": round(statistics.median(rate(t) for t in turns), 1),
            "step_s": round(statistics.median(t["seconds"] / t["steps"] for t in turns), 4),
            "tokens_per_step": round(statistics.mean(t["response_tokens"] / t["steps"] for t in turns), 1),
            "share": {
                part: round(statistics.median(per_token(t, part) * rate(t) for t in turns), 4)
                for part in ("generation_s", "update_s", "rest_s")
            },
        }
    for part in ("generation_s", "update_s"):
        ratio = statistics.median(per_token(b, part) / per_token(a, part) for a, b in pairs)
        out[f"{part[:-2]}_ratio"] = round(ratio, 3)
    return out


def _floor(model: str, ours: dict[str, Any], rate: float) -> dict[str, float]:
    """Return the floor of each phase in seconds, and how many times it each phase takes."""
    least = floor(model, ours["tokens_per_step"], rate)
    taken = {phase: ours["share"][phase] * ours["step_s"] for phase in ("generation_s", "update_s")}
    return {
        "generation_s": round(least.generation_s, 4),
        "update_s": round(least.update_s, 4),
        "generation_times": round(taken["generation_s"] / least.generation_s, 2),
        "update_times": round(taken["update_s"] / least.update_s, 2),
    }


def _start(name: str, command: list[str], environment: dict[str, str]) -> Runner:
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=sys.stderr, text=True, env=environment, cwd=HERE
    )
    runner = Runner(name, process)
    runner.read()
    return runner


def _machine_cpu_s() -> float:
    times = psutil.cpu_times()
    return times.user + times.system + times.nice + times.irq + times.softirq


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


if __name__ == "__main__":
    main()
