"""The verbs a flow is written in. The controller implements them; a test may implement them without Ray."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol

from rlctl_train.data.loader import PromptRow

BatchRef = Any
"""A handle: references to columns that lie with the workers, plus lengths. Only the run can open it."""


class SupervisedRun(Protocol):
    """What a supervised flow may ask for."""

    def read(self, rows: Sequence[PromptRow]) -> BatchRef:
        """Tokenise rows with their given responses."""
        ...

    def update_supervised(self, batch: BatchRef) -> None:
        """Take the optimizer steps of a supervised batch."""
        ...


class RolloutRun(Protocol):
    """What a reinforcement-learning flow may ask for."""

    def generate(self, prompts: Sequence[PromptRow]) -> BatchRef:
        """Sample the algorithm's group of responses for each prompt."""
        ...

    def score(self, batch: BatchRef) -> BatchRef:
        """Add `score` and `rewards`."""
        ...

    def logprobs(self, batch: BatchRef) -> BatchRef:
        """Add `old_logp` and `ref_logp` where the algorithm needs them."""
        ...

    def values(self, batch: BatchRef) -> BatchRef:
        """Add `values` when there is a critic."""
        ...

    def advantages(self, batch: BatchRef) -> BatchRef:
        """Add `advantages` and `returns`, and check the health of the batch."""
        ...

    def resample(self, batch: BatchRef) -> BatchRef:
        """Choose which responses to learn from, and how often, where the algorithm says so."""
        ...

    def update_critic(self, batch: BatchRef) -> None:
        """Take the critic's optimizer steps, when there is a critic."""
        ...

    def update_actor(self, batch: BatchRef) -> None:
        """Take the policy's optimizer steps."""
        ...

    def sync(self) -> None:
        """Hand the policy's weights to the rollout engines."""
        ...


class GreedyRun(RolloutRun, Protocol):
    """What a flow may ask for that compares with what the policy finds likeliest."""

    def greedy_baseline(self, batch: BatchRef, prompts: Sequence[PromptRow]) -> BatchRef:
        """Add `baseline`: the score of one greedy response to each prompt of the batch."""
        ...


class TaughtRun(RolloutRun, Protocol):
    """What a flow may ask for that has a teacher."""

    def teach(self, batch: BatchRef) -> BatchRef:
        """Add what the teacher says: `teacher_logp`, or `teacher_ids` and `teacher_top_logp`."""
        ...


class SelfPlayRun(RolloutRun, Protocol):
    """What a flow may ask for that compares the policy with an earlier one."""

    def refresh_reference(self) -> None:
        """Make the policy the reference, in the steps in which the algorithm says so."""
        ...


class ResamplingRun(RolloutRun, Protocol):
    """What a flow may ask for that generates several times a step and chooses from what came."""

    @property
    def max_rounds(self) -> int:
        """The most times a step may generate."""
        ...

    def more_prompts(self, num: int) -> Sequence[PromptRow]:
        """Draw the next prompts of the training data; a checkpoint remembers how far it was read."""
        ...

    def scores(self, batch: BatchRef) -> list[list[float]]:
        """Return the score of every response, one list a prompt."""
        ...

    def choose(self, groups: Sequence[tuple[BatchRef, Sequence[int]]]) -> BatchRef:
        """Make one batch of the named groups (by number) of several batches, in the order given."""
        ...

    def record(self, metrics: Mapping[str, float]) -> None:
        """Add metrics of the step."""
        ...


class RewardModelRun(ResamplingRun, Protocol):
    """What a flow may ask for that has a reward model to train."""

    @property
    def reward_update(self) -> Literal["before", "after", "none"]:
        """When the reward model learns: before it rewards a step's tokens, after it, or never."""
        ...

    @property
    def accuracy_bounds(self) -> tuple[float, float]:
        """The smallest and the largest share of right responses of a group to learn from."""
        ...

    def accuracies(self, batch: BatchRef) -> list[float]:
        """Return the share of right responses to each prompt."""
        ...

    def update_reward_model(self, batch: BatchRef) -> None:
        """Take the reward model's optimizer steps."""
        ...

    def reward_logprobs(self, batch: BatchRef) -> BatchRef:
        """Add `reward_logp`."""
        ...
