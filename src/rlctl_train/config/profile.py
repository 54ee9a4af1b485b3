"""What a profiled run records: in which steps, of which workers, with which tool."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import NonNegativeInt, PositiveInt, model_validator

from rlctl_train.config.base import Choices, Config

Tool = Literal["auto", "torch", "memory", "ranges"]
TOOLS = Choices(
    {
        "auto": "torch",
        "torch": "torch.profiler: every operation and kernel, as a trace for Perfetto",
        "memory": "torch.profiler with allocations; on CUDA the allocator's own history too",
        "ranges": "nothing but phases and the ranges inside them, which costs next to nothing",
    }
)
Profiled = Literal["actor", "reference", "critic", "reward_model", "teacher", "rollout", "score"]


class ProfileConfig(Config):
    """A bounded profile."""

    tool: Annotated[Tool, TOOLS] = "auto"
    """What records, beside the ranges of phases, which are always kept."""
    first_step: PositiveInt = 3
    """First step that is recorded; earlier ones warm up."""
    last_step: PositiveInt = 3
    """Last step that is recorded."""
    roles: tuple[Profiled, ...] = ()
    """Roles whose workers are recorded by the tool; empty means all."""
    ranks: tuple[NonNegativeInt, ...] = (0,)
    """Ranks of each role that are recorded by the tool; empty means all."""
    shapes: bool = False
    """Record the shapes of every operation's arguments."""
    stacks: bool = False
    """Record the Python stack of every operation; traces grow several times."""

    @model_validator(mode="after")
    def _check(self) -> ProfileConfig:
        if self.last_step < self.first_step:
            raise ValueError(f"last_step={self.last_step} lies before first_step={self.first_step}")
        return self
