"""What the algorithm layer costs: advantages and loss glue, in a step of the quickstart and at 1,024 x 8,192 tokens.

The layer is timed alone, in one process of one thread, on batches of the right sizes: everything between rewards and
advantages as `ScoreWorker.advantages` does it, and objective with backward pass down to the log-probabilities, in as
many micro-batches as the plan makes. A real run of the quickstart gives the step that it is a share of, and the time of
the `advantages` phase, which has Ray's transport in it. The page goes to benchmarks/algorithm_cost.md.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter

from rlctl_train.algos import ops
from rlctl_train.algos.gdpo import PART
from rlctl_train.algos.mismatch import rollout_correction
from rlctl_train.algos.objective import PolicyObjective, WholeBatchLoss
from rlctl_train.batch import Batch
from rlctl_train.config.algo import AlgoConfig
from rlctl_train.config.losses import PolicyLossConfig
from rlctl_train.registry import ALGOS, LOSSES, load
from rlctl_train.telemetry.batch_metrics import batch_metrics

HERE = Path(__file__).parent
RLCTL = str(Path(sys.executable).with_name("rlctl"))
GROUP = 8
PAIRS = ("dpo", "ipo", "sppo")
"""Losses of SPIN and SPPO, which read columns of their own; their glue is no more than that of `clip`."""
HEAD = """\
# The cost of the algorithm layer

<!-- Made by `nox -s bench` (benchmarks/algorithm_cost.py). -->

Measured {date} on one CPU core, in float32. A step of the quickstart (512 responses) took {seconds:.3f} s at median;
its phase `adv`, transport by Ray included, {adv_ms:.1f} ms or {adv_share:.1%}. Below is the layer alone: all between
rewards and advantages with the metrics of the batch, and objective with KL loss and backward pass down to the
log-probabilities, over all micro-batches. At 1,024 x 8,192 tokens responses are 4,096 to 8,192 long, and the loss is
taken in 128 micro-batches.
"""


def main() -> None:
    """Measure both sizes and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=30, help="steps of the quickstart whose median is taken")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=HERE / "algorithm_cost.md")
    options = parser.parse_args()
    torch.set_num_threads(1)
    step = quickstart_step(options.steps)
    small = measure(make_batch(512, 5), 2 * step["micro_batches"], max(options.rounds, 50))
    large = measure(make_batch(1024, 8192), 128, options.rounds)
    options.out.write_text(page(step, small, large))
    print(options.out.read_text())


def quickstart_step(num_steps: int) -> dict[str, Any]:
    """Return median seconds of a step of the quickstart and of its phase `adv`, and micro-batches per mini-batch."""
    with tempfile.TemporaryDirectory() as folder:
        command = [RLCTL, "launch", "quickstart", "--name", "run", "--yes"]
        command += [f"trainer.num_steps={num_steps}", "validation.every_steps=0", "checkpoint.every_steps=0"]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL, env=environment)
        run = Path(folder) / "runs" / "run"
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        limit = json.loads((run / "plan.json").read_text())["max_tokens_per_micro_batch"]
    steps = [line for line in lines if line["phase"] == "train"][2:]
    tokens = statistics.median(line["perf/total_num_tokens"] for line in steps)
    return {
        "seconds": statistics.median(line["timing_s/step"] for line in steps),
        "adv": statistics.median(line["timing_s/adv"] for line in steps),
        "micro_batches": -(-int(tokens / 2) // limit),
    }


def make_batch(num_rows: int, longest: int) -> Batch:
    """Return a batch with every column that an algorithm may read, responses of a half to the whole of `longest`."""
    chance = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=chance)

    lengths = torch.randint(longest // 2, longest + 1, (num_rows,), generator=chance)
    mask = (torch.arange(longest) < lengths[:, None]).float()
    logp = -normal(num_rows, longest).abs() * mask
    score = (normal(num_rows) > 0).float()
    rewards = torch.zeros_like(mask)
    rewards[torch.arange(num_rows), lengths - 1] = score
    near = logp + 0.01 * normal(num_rows, longest) * mask
    return Batch(
        {
            "response_mask": mask, "response_len": lengths, "prompt_len": torch.full_like(lengths, longest),
            "truncated": (lengths == longest).long(), "policy_version": torch.zeros_like(lengths),
            "group": torch.arange(num_rows) // GROUP, "row": torch.arange(num_rows),
            "score": score, "correct": score, "baseline": score.flip(0), "rewards": rewards, PART + "form": score,
            "rollout_logp": near, "old_logp": logp, "ref_logp": near, "reward_logp": near, "teacher_logp": near,
            "values": normal(num_rows, longest), "sum_pi_squared": logp.exp() * 0.5,
        }
    )  # fmt: skip


def measure(batch: Batch, micro_batches: int, rounds: int) -> dict[str, dict[str, float]]:
    """Return median seconds of the layer for a step over `batch`: by algorithm the advantages, by loss the glue."""
    advantages = {name: _median(_advantages(name, batch), rounds) for name in ALGOS if name != "distill"}
    made = load(ALGOS, "grpo")(_config("grpo")).advantages(batch).advantages
    batch = batch.with_columns(advantages=made)
    losses = {name: _median(_glue(name, batch, micro_batches), rounds) for name in _losses()}
    return {"advantages": advantages, "losses": losses}


def _config(name: str) -> Any:
    settings: dict[str, Any] = {"type": name}
    if name == "gdpo":
        settings["parts"] = {"form": 1.0}
    return TypeAdapter(AlgoConfig).validate_python(settings)


def _losses() -> Iterator[str]:
    return (name for name in LOSSES if name not in PAIRS)


def _advantages(name: str, batch: Batch) -> Callable[[], None]:
    algo = load(ALGOS, name)(_config(name))

    def once() -> None:
        columns, _ = rollout_correction(batch, None)
        result = algo.advantages(batch.with_columns(**columns))
        told = {"advantages": result.advantages} | ({} if result.returns is None else {"returns": result.returns})
        batch_metrics(batch.with_columns(**told))

    return once


def _glue(name: str, batch: Batch, micro_batches: int) -> Callable[[], None]:
    loss_config = TypeAdapter(PolicyLossConfig).validate_python({"type": name})
    config = _config("grpo").model_copy(update={"loss": loss_config, "kl_loss_coef": 0.001})
    objective = PolicyObjective(load(LOSSES, name)(loss_config), config, batch["response_mask"].shape[1])
    parts = torch.arange(len(batch)).chunk(micro_batches)

    def once() -> None:
        told, counts = batch, ops.count(batch["response_mask"])
        if isinstance(objective.loss, WholeBatchLoss):
            told = told.with_columns(**objective.statistics(batch["old_logp"], batch, lambda rows: rows))
        for rows in parts:
            micro = told.rows(rows)
            leaf = (micro["old_logp"] + 0.01).requires_grad_()
            loss, _ = objective(ops.TokenOutputs(logp=leaf, entropy=leaf.detach()), micro, counts)
            loss.backward()

    return once


def _median(once: Callable[[], None], rounds: int) -> float:
    once()
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        once()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def page(step: dict[str, Any], small: dict[str, dict[str, float]], large: dict[str, dict[str, float]]) -> str:
    """Return the tables."""
    share = step["adv"] / step["seconds"]
    lines = [HEAD.format(date=time.strftime("%Y-%m-%d"), adv_ms=1000 * step["adv"], adv_share=share, **step)]
    for part, title in (("advantages", "advantages of `algo.type`"), ("losses", "glue of `algo.loss.type`")):
        lines += [f"| {title} | quickstart, ms | share of the step | 1,024 x 8,192, s | ns a token |"]
        lines += ["|---|---|---|---|---|"]
        for name, seconds in small[part].items():
            lines.append(
                f"| `{name}` | {1000 * seconds:.2f} | {seconds / step['seconds']:.2%} | {large[part][name]:.2f} "
                f"| {large[part][name] / (1024 * 8192) * 1e9:.0f} |"
            )
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        main()
