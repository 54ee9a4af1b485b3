"""Small real runs for tests: a run folder, the driver process, and what one may want to know of it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from rlctl_hw.types import Plan

from rlctl_train.config import RunConfig
from rlctl_train.config.layout import RunFiles, write_json
from rlctl_train.config.model import RandomModel
from rlctl_train.model_factory import make_random_model

PLAN = Plan(
    device="cpu",
    num_nodes=1,
    trainer_devices=1,
    rollout_devices=1,
    threads_per_worker=1,
    compute_dtype="float32",
    rollout_dtype="float32",
    max_tokens_per_micro_batch=256,
    rollout_max_concurrent=64,
    rollout_gpu_memory_share=0.5,
    object_store_gib=0.2,
)
CONFIG: dict[str, Any] = {
    "model": {"type": "random", "hidden_size": 32, "num_layers": 1, "intermediate_size": 64, "max_position": 64},
    "data": {"type": "arithmetic", "max_operand": 9, "num_train": 32, "num_val": 8, "max_prompt_tokens": 16},
    "reward": {"type": "custom", "path": f"{Path(__file__).with_name('digit_reward.py')}:digits"},
    "algo": {"type": "grpo", "group_size": 4},
    "rollout": {"type": "hf", "max_response_tokens": 6},
    "trainer": {"num_steps": 6, "prompts_per_step": 4, "optim": {"lr": 1e-3}},
    "validation": {"every_steps": 3, "max_prompts": 8},
    "checkpoint": {"every_steps": 2},
}


def make_run(root: Path, plan: dict[str, Any] | None = None, **sections: Any) -> RunFiles:
    """Write a run folder; `sections` are merged into the base config one level deep, None removes one."""
    config = {**CONFIG}
    for name, section in sections.items():
        config[name] = {**config.get(name, {}), **section} if isinstance(section, dict) else section
    for name in ("algo", "data", "model", "reward"):
        if isinstance(sections.get(name), dict) and "type" in sections[name]:
            config[name] = sections[name]
    root.mkdir(parents=True)
    files = RunFiles(root)
    made = RunConfig.model_validate(config)
    write_json(files.config, json.loads(made.model_dump_json()))
    write_json(files.plan, replace(PLAN, **(plan or {})).to_json())
    if isinstance(made.model, RandomModel):  # what the driver would do; this process has imported the model classes
        make_random_model(made.model, files.model, made.seed)
    return files


def start(files: RunFiles) -> subprocess.Popen[bytes]:
    """Start the driver in a process group of its own, its output in logs/driver.log."""
    files.logs.mkdir(exist_ok=True)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with (files.logs / "driver.log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "rlctl_train", str(files.root)],
            stdout=log, stderr=log, start_new_session=True, env=environment,
        )  # fmt: skip


def run(files: RunFiles) -> int:
    """Run the driver to its end and return its exit code; one that does not end is killed."""
    process = start(files)
    try:
        return process.wait(300)
    finally:
        process.kill()


def log(files: RunFiles) -> str:
    """Return the driver's output."""
    return (files.logs / "driver.log").read_text()


def status(files: RunFiles) -> dict[str, Any]:
    """Return the status file, or an empty record before there is one."""
    return json.loads(files.status.read_text()) if files.status.exists() else {}


def wait_for_step(files: RunFiles, process: subprocess.Popen[bytes], step: int) -> None:
    """Wait until the run works on `step`."""
    wait_until(lambda: status(files).get("state") == "running" and status(files)["step"] >= step, files, process)


def wait_until(condition: Callable[[], bool], files: RunFiles, process: subprocess.Popen[bytes]) -> None:
    """Wait for something that a live run does, with a limit; not for a length of time."""
    deadline = time.monotonic() + 240
    while not condition():
        assert process.poll() is None, f"the driver ended early:\n{log(files)}"
        assert time.monotonic() < deadline, f"it did not happen:\n{log(files)}"
        time.sleep(0.02)


def lines(files: RunFiles, phase: str = "train") -> list[dict[str, Any]]:
    """Return the metric lines of one phase."""
    every = [json.loads(line) for line in files.metrics.read_text().splitlines()]
    return [line for line in every if line["phase"] == phase]


def learning_trace(files: RunFiles) -> list[tuple[float, ...]]:
    """Return what must repeat bit for bit: loss, gradient norm, reward and length of every step."""
    names = ("step", "actor/pg_loss", "actor/grad_norm", "critic/score/mean", "response_length/mean")
    return [tuple(line[name] for name in names) for line in lines(files)]


def kill(pid: int) -> None:
    """Kill a process as `kill -9` does."""
    os.kill(pid, signal.SIGKILL)
