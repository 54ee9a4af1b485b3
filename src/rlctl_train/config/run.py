"""RunConfig: everything a run wants, in one frozen record."""

from __future__ import annotations

from typing import Annotated, Literal

from rlctl_train.config.algo import AlgoConfig, GrpoConfig
from rlctl_train.config.base import Choices, Config
from rlctl_train.config.data import DataConfig
from rlctl_train.config.engine import EngineConfig, Fsdp2Config
from rlctl_train.config.model import ModelConfig
from rlctl_train.config.policy import Role
from rlctl_train.config.reward import GraderConfig, RewardConfig
from rlctl_train.config.rollout import HfRollout, RolloutConfig
from rlctl_train.config.trainer import (
    CheckpointConfig,
    HealthConfig,
    RayConfig,
    SyncConfig,
    TelemetryConfig,
    TrainerConfig,
    ValidationConfig,
    WarmStartConfig,
)


class RunConfig(Config):
    """What the user wants. Facts about the machine and everything derived live in the plan."""

    seed: int = 0
    """Seed of data order, initial weights and sampling."""
    model: ModelConfig
    """The model that is trained."""
    data: DataConfig
    """Where prompts come from."""
    reward: RewardConfig | None = None
    """How responses are scored; required by every algorithm but `sft`."""
    grader: GraderConfig = GraderConfig()
    """The processes that score."""
    algo: AlgoConfig = GrpoConfig()
    """The algorithm."""
    engine: EngineConfig = Fsdp2Config()
    """The training engine."""
    rollout: RolloutConfig = HfRollout()
    """The rollout engine."""
    placement: Annotated[
        Literal["colocated", "split"],
        Choices(
            {
                "colocated": "on the same devices, in turns: none waits, and each leaves its memory to the other",
                "split": "on different devices, each with all of its memory; one side waits while the other works",
            }
        ),
    ] = "colocated"
    """Trainer and rollout on the same devices in turns, or on different ones."""
    trainer: TrainerConfig = TrainerConfig()
    """Length and size of the loop."""
    warm_start: WarmStartConfig | None = None
    """Supervised steps before reinforcement learning; unset skips them."""
    validation: ValidationConfig = ValidationConfig()
    """Measuring on held-out prompts."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Saving and resuming."""
    health: HealthConfig = HealthConfig()
    """Checks that stop or warn."""
    sync: SyncConfig = SyncConfig()
    """Moving weights from trainer to rollout."""
    telemetry: TelemetryConfig = TelemetryConfig()
    """Where metrics go."""
    ray: RayConfig = RayConfig()
    """The Ray cluster."""

    def roles(self) -> tuple[Role, ...]:
        """Return the model roles that workers hold: under LoRA the actor without its adapters is the reference."""
        roles = self.algo.roles()
        return roles if self.model.lora is None else tuple(role for role in roles if role != "reference")
