"""The learning rate of each optimizer step."""

from __future__ import annotations

import math

from rlctl_train.config.optim import OptimConfig


def learning_rate(step: int, num_steps: int, config: OptimConfig) -> float:
    """Return the rate of step 0, 1, ... of `num_steps`; later steps stay at the schedule's end.

    Warm-up rises linearly and reaches the peak at its last step, so that the first step already learns. Cosine and
    linear schedules fall from there to `min_lr_ratio` times the peak.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    progress = min((step - config.warmup_steps) / max(num_steps - config.warmup_steps, 1), 1.0)
    match config.schedule:
        case "constant":
            return config.lr
        case "cosine":
            above_end = 0.5 * (1 + math.cos(math.pi * progress))
        case "linear":
            above_end = 1 - progress
    return config.lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * above_end)
