"""One GRPO step after another with rlctl's controller, under Ray, as a launched run takes them."""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

from rlctl_hw.types import Plan
from workloads import GROUP_SIZE, NUM_PROMPTS, PROMPTS, WORKLOADS, Turn, report, turns

from rlctl_train.cluster import connect
from rlctl_train.config import RunConfig
from rlctl_train.config.layout import RunFiles
from rlctl_train.controller import Controller
from rlctl_train.crew import Crew
from rlctl_train.data.loader import PromptRow
from rlctl_train.fleet import Fleet
from rlctl_train.flows.on_policy import step
from rlctl_train.placement import lay_out
from rlctl_train.prepare import Materials
from rlctl_train.recovery import Restarts
from rlctl_train.status import Status
from rlctl_train.workers import WorkerSpec

REWARD = """
def count_digits(response, ground_truth, **extra):
    return sum(ch.isdigit() for ch in response) / (1 + len(response))
"""
UPDATE = ("update_actor", "old_log_prob", "ref")


def main() -> None:
    """Set up the controller for one workload and serve turns."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("workload", choices=WORKLOADS)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    from transformers import AutoTokenizer

    folder = Path(tempfile.mkdtemp())
    (folder / "reward.py").write_text(REWARD)
    workload = WORKLOADS[options.workload]
    config = RunConfig.model_validate(
        {
            "model": {"type": "pretrained", "path": options.model},
            "data": {"type": "arithmetic", "max_prompt_tokens": 32},
            "reward": {"type": "custom", "path": f"{folder}/reward.py:count_digits"},
            "algo": {"type": "grpo", "group_size": GROUP_SIZE},
            "rollout": {"type": "hf", "max_response_tokens": workload.max_tokens, "ignore_eos": workload.fixed},
            "trainer": {"prompts_per_step": NUM_PROMPTS, "num_steps": 1_000_000},
        }
    )
    plan = Plan(
        device="cpu", num_nodes=1, trainer_devices=1, rollout_devices=1, threads_per_worker=options.threads,
        compute_dtype="float32", rollout_dtype="float32", max_tokens_per_micro_batch=4096,
        rollout_max_concurrent=NUM_PROMPTS * GROUP_SIZE, rollout_gpu_memory_share=0.5, object_store_gib=0.3,
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    layout = lay_out(plan, config)
    connect(config.ray, needed=layout.needed, object_store_gib=plan.object_store_gib)
    materials = Materials(options.model, options.model, tokenizer, folder, None)
    status = Status(RunFiles(folder), config.trainer.num_steps)
    rows = [_row(tokenizer, text) for text in PROMPTS]
    spec = WorkerSpec(config, plan, options.model, options.model, 1_000_000)
    crew = Crew(spec, layout, tokenizer, folder / "workers.json")
    fleet = Fleet(crew, spec, status, Restarts(0, status))
    run = Controller(crew, fleet, spec, materials, status, draw=lambda num: rows[:num])
    crew.start()
    run.sync()
    run.take_metrics()
    for steps in turns():
        turn, start = Turn(steps), time.perf_counter()
        for _ in range(steps):
            run.step += 1
            step(run, rows)
            metrics = run.take_metrics() | fleet.memory()
            turn.generation_s += metrics["timing_s/gen"]
            turn.update_s += sum(metrics.get(f"timing_s/{name}", 0.0) for name in UPDATE)
            turn.response_tokens += int(metrics["perf/response_tokens"])
        turn.seconds = time.perf_counter() - start
        report(turn)
    crew.stop()


def _row(tokenizer: object, text: str) -> PromptRow:
    messages = [{"role": "user", "content": text}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]  # type: ignore[attr-defined]
    return PromptRow(ids, {"prompt": messages, "data_source": "bench", "ground_truth": "0", "extra_info": {}})


if __name__ == "__main__":
    main()
