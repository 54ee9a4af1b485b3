"""RunConfig: everything a run wants, in one frozen record."""

from __future__ import annotations

from typing import Annotated, Literal

from rlctl_train.config.algo import AlgoConfig, GrpoConfig, SftConfig
from rlctl_train.config.base import Choices, Config
from rlctl_train.config.data import DataConfig
from rlctl_train.config.engine import EngineConfig, Fsdp2Config
from rlctl_train.config.launch import LaunchConfig, LocalLaunch
from rlctl_train.config.model import ModelConfig
from rlctl_train.config.policy import Role
from rlctl_train.config.profile import ProfileConfig
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
    profile: ProfileConfig | None = None
    """Recording of a few steps, as `rlctl profile` asks for; unset records nothing."""
    ray: RayConfig = RayConfig()
    """The Ray cluster."""
    launch: LaunchConfig = LocalLaunch()
    """Where the run is launched."""

    def old_logprobs_needed(self) -> bool:
        """Return whether the trainer computes the policy's log-probabilities before the update of every step."""
        algo = self.algo
        if isinstance(algo, SftConfig):
            return False
        if algo.needs_sum_pi_squared:
            return True
        if algo.correction is not None:
            return algo.correction.mode != "bypass"
        updates = self.trainer.mini_batches_per_step * self.trainer.epochs_per_step
        return updates > 1 or algo.kl_in_reward is not None or algo.reads_old_logp()

    def roles(self) -> tuple[Role, ...]:
        """Return the model roles that workers hold: under LoRA the actor without its adapters is the reference."""
        roles = self.algo.roles()
        return roles if self.model.lora is None else tuple(role for role in roles if role != "reference")
