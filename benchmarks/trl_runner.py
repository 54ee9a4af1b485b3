"""One GRPO step after another with TRL's GRPOTrainer. Runs in an environment of its own: trl==1.16.0."""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer
from workloads import GROUP_SIZE, NUM_PROMPTS, PROMPTS, WORKLOADS, Turn, report, turns


class Meter:
    """Adds up the turn under way."""

    def __init__(self) -> None:
        self.turn = Turn(0)


class TimedTrainer(GRPOTrainer):
    """The trainer as it is, with a clock around generation and around forward and backward."""

    meter: Meter

    def _generate(self, *args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        result = super()._generate(*args, **kwargs)
        self.meter.turn.generation_s += time.perf_counter() - start
        return result

    def _generate_and_score_completions(self, *args: Any, **kwargs: Any) -> Any:
        result = super()._generate_and_score_completions(*args, **kwargs)
        self.meter.turn.response_tokens += int(result["completion_mask"].sum())
        return result

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        before = self.meter.turn.generation_s
        scoring = time.perf_counter()
        result = super().training_step(*args, **kwargs)
        self.meter.turn.update_s += time.perf_counter() - scoring - (self.meter.turn.generation_s - before)
        return result


class Turns(TrainerCallback):
    """Waits for the race between turns."""

    def __init__(self, meter: Meter, asked: Iterator[int], out: Any) -> None:
        self.meter, self.asked, self.out = meter, asked, out
        self.left = 0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.left:
            return
        with contextlib.redirect_stdout(self.out):
            if self.meter.turn.steps:
                self.meter.turn.seconds = time.perf_counter() - self.start
                report(self.meter.turn)
            self.left = next(self.asked, 0)
        if not self.left:
            sys.exit(0)
        self.meter.turn = Turn(self.left)
        self.start = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.left -= 1


def count_digits(completions: list[Any], **_: Any) -> list[float]:
    """Reward that costs nothing and differs between responses."""
    texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
    return [sum(ch.isdigit() for ch in text) / (1 + len(text)) for text in texts]


def main() -> None:
    """Set up TRL for one workload and serve turns."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("workload", choices=WORKLOADS)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    workload = WORKLOADS[options.workload]
    config = GRPOConfig(
        output_dir="/tmp/trl-bench",
        per_device_train_batch_size=NUM_PROMPTS * GROUP_SIZE,
        num_generations=GROUP_SIZE,
        max_completion_length=workload.max_tokens,
        temperature=1.0,
        beta=0.0,
        learning_rate=1e-6,
        max_steps=1_000_000,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to=[],
        logging_strategy="no",
        save_strategy="no",
        disable_tqdm=True,
        generation_kwargs={"min_new_tokens": workload.max_tokens} if workload.fixed else None,
    )
    meter, out = Meter(), sys.stdout
    tokenizer = AutoTokenizer.from_pretrained(options.model, padding_side="left")
    rows = [{"prompt": [{"role": "user", "content": text}]} for text in PROMPTS]
    trainer = TimedTrainer(
        model=AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32),
        reward_funcs=count_digits,
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[Turns(meter, turns(), out)],
    )
    trainer.meter = meter
    with contextlib.redirect_stdout(io.StringIO()):
        trainer.train()


if __name__ == "__main__":
    main()
