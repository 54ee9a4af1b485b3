"""What `data` and `reward` share: the way into the training library, and a reward named on the command line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from pydantic import TypeAdapter

from rlctl.spelling import unknown
from rlctl_train.config.errors import PREFLIGHT, UserError
from rlctl_train.config.reward import CustomReward, RewardConfig

PLAIN_REWARDS = ("arithmetic", "gsm8k", "math")
"""Rewards that need no more than their name."""


@contextmanager
def train_extra() -> Iterator[None]:
    """Turn a missing package of the extra `train` into one line and the way out."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise UserError(
            f"this command needs the package {error.name}", "pip install 'rlctl[train]'", exit_code=PREFLIGHT
        ) from error


def reward_config(name: str, method: str | None = None) -> RewardConfig:
    """Return the reward section for a name or for `FILE.py:FUNCTION`."""
    if method is not None and name != "gsm8k":
        raise UserError(f"--method does not apply to --reward {name}", "use it with --reward gsm8k, or leave it out")
    if ".py" in name:
        return CustomReward(path=name)
    if name not in PLAIN_REWARDS:
        raise unknown("reward", name, PLAIN_REWARDS, f"name one of {', '.join(PLAIN_REWARDS)}, or FILE.py:FUNCTION")
    section = {"type": name} if method is None else {"type": name, "method": method}
    return TypeAdapter[RewardConfig](RewardConfig).validate_python(section)
