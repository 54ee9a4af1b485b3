"""The loop: how long, how much per step, how often to look and to save."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from rlctl_train.config.base import Choices, Config
from rlctl_train.config.optim import OptimConfig


class TrainerConfig(Config):
    """Length and size of the training loop."""

    num_steps: PositiveInt = 100
    """Steps to train; one step generates (or reads) one batch and learns from it."""
    prompts_per_step: PositiveInt = 64
    """Prompts (supervised: rows) per step."""
    mini_batches_per_step: PositiveInt = 1
    """Optimizer steps per pass over the step's batch."""
    epochs_per_step: PositiveInt = 1
    """Passes over the step's batch."""
    optim: OptimConfig = OptimConfig()
    """Optimizer of the policy."""
    num_devices: PositiveInt | None = None
    """Devices that train (CPU: worker processes); unset lets the planner choose."""
    threads_per_worker: PositiveInt | None = None
    """CPU threads of each worker process; unset lets the planner choose."""


class WarmStartConfig(Config):
    """Supervised steps on the training rows' `response` column before reinforcement learning begins."""

    num_steps: PositiveInt = 50
    """Steps; one step reads one batch of rows and learns from it."""
    rows_per_step: PositiveInt = 64
    """Rows per step."""
    mini_batches_per_step: PositiveInt = 1
    """Optimizer steps per step; many small ones in one step save the overhead of a step each."""
    optim: OptimConfig = OptimConfig(lr=1e-3)
    """Optimizer of the warm start; its state is dropped afterwards."""


class ValidationConfig(Config):
    """Measuring on held-out prompts."""

    every_steps: NonNegativeInt = 10
    """Validate after every so many steps; 0 means only before and after training."""
    max_prompts: PositiveInt = 256
    """Held-out prompts used each time."""
    temperature: NonNegativeFloat = 0.0
    """Sampling temperature; 0 is greedy."""
    num_samples_kept: NonNegativeInt = 8
    """Samples written to `samples/` each time, for reading."""


class CheckpointConfig(Config):
    """Saving and resuming."""

    every_steps: NonNegativeInt = 50
    """Save after every so many steps; 0 means only at the end and when told to stop."""
    keep_last: PositiveInt = 2
    """Checkpoints kept; older ones are removed once a newer one is complete."""
    keep_best: NonNegativeInt = 0
    """Checkpoints kept beside those for what they reached in `best_metric`, the best of all so far."""
    best_metric: str = "val/accuracy"
    """Metric of a validation by which checkpoints are held against each other."""
    best_mode: Annotated[
        Literal["max", "min"], Choices({"max": "the higher the better", "min": "the lower the better"})
    ] = "max"
    """Which values of `best_metric` are better."""
    asynchronous: bool = True
    """Train on while a checkpoint is written; costs host memory for one copy of what is saved."""
    remote: str | None = None
    """Place to which each checkpoint is copied and from which a run without any fetches its last, an fsspec URL such as
    s3://bucket/runs (gs://, hdfs://, file:///); unset keeps them in the run folder alone."""
    export_hf: bool = True
    """Write a Hugging Face folder at the end."""


class HealthConfig(Config):
    """Checks that stop or warn before a run goes silently wrong, or stands still."""

    logprob_gap: PositiveFloat | None = None
    """Largest gap between sampled and recomputed log-probabilities at the first step, in nats.

    Unset takes 1e-4 in float32 and 0.2 in bfloat16."""
    probs_diff: PositiveFloat | None = 0.01
    """Largest mean difference of sampled and recomputed probabilities in any step; unset turns the gate off.

    Below 0.005 is usual; beyond 0.01 one side computes something else."""
    rollout_kl: PositiveFloat | None = 0.05
    """Largest KL between rollout and trainer (`rollout_corr/k3_kl`) in any step, in nats; unset turns the gate off."""
    chi_square: PositiveFloat | None = 1.0
    """Largest `rollout_corr/chi2_token` in any step; unset turns the gate off.

    At 1 plain importance weights leave half of the tokens' worth."""
    on_failure: Annotated[
        Literal["stop", "warn"], Choices({"stop": "end the run with exit code 3", "warn": "say so and go on"})
    ] = "stop"
    """What happens when `logprob_gap` fails."""
    on_mismatch: Annotated[
        Literal["stop", "warn"], Choices({"stop": "end the run with exit code 3", "warn": "say so once and go on"})
    ] = "warn"
    """What happens when `probs_diff`, `rollout_kl` or `chi_square` fails."""
    stall_after_s: PositiveFloat | None = 1800.0
    """Longest time without any progress, in seconds; unset waits for ever.

    A phase that begins or ends is progress, and a rollout engine that has sampled its share. While workers start,
    ray.start_timeout_s comes on top. Then the stacks of all processes are written to `logs/`, and the workers that
    stand still count as lost."""


class TelemetryConfig(Config):
    """Where metrics go besides `metrics.jsonl`."""

    trackers: Annotated[
        tuple[Literal["tensorboard", "wandb", "mlflow", "swanlab"], ...],
        Choices(
            {
                "tensorboard": "event files in the run folder",
                "wandb": "Weights & Biases, with your account",
                "mlflow": "MLflow, by its own environment variables",
                "swanlab": "SwanLab, with your account",
            }
        ),
    ] = ("tensorboard",)
    """Trackers that receive every metric."""
    project: str = "rlctl"
    """Project name under which trackers file the run."""


class SyncConfig(Config):
    """Moving weights from trainer to rollout."""

    bucket_mib: Annotated[float, Field(gt=0)] = 256.0
    """Size of the buckets in which weights travel, in MiB; a larger tensor travels alone."""


CLUSTER_VARIABLE = "RLCTL_RAY_ADDRESS"
"""Variable in which a launcher names the cluster that it has started for this run, HOST:PORT."""

NODES_VARIABLE = "RLCTL_RAY_NODES"
"""Variable in which a launcher names the nodes of that cluster, by comma; the driver waits until all have joined."""
PROCESS_ENVIRONMENT = {
    "TOKENIZERS_PARALLELISM": "false",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_worker_niceness": "0",
    "OMP_WAIT_POLICY": "PASSIVE",
    "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
}
"""Set for Ray and the driver unless the person has set them.

Ray's niceness of 15 starves workers beside the user's own jobs. Threads that spin while they wait cost 15 times and
more as soon as anything else runs on the same cores.
"""


class RayConfig(Config):
    """The Ray cluster that carries the run."""

    address: str | None = None
    """HOST:PORT of an existing cluster; unset starts a private one for this run."""
    start_timeout_s: PositiveFloat = 120.0
    """Longest wait for the cluster and for its resources, in seconds."""
    object_store_gib: PositiveFloat | None = None
    """Size of a private cluster's object store, in GiB; unset lets the planner choose."""

    def to_join(self, environ: Mapping[str, str]) -> str | None:
        """Return the cluster to join: the one named here, or that of the launcher; None starts a private one."""
        return self.address or environ.get(CLUSTER_VARIABLE)
