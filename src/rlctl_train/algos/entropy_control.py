"""The coefficient of the entropy bonus: fixed, or steered towards a target entropy (arXiv:2505.22312)."""

from __future__ import annotations

from rlctl_train.config.algo import AlgoConfig, SftConfig


class EntropyController:
    """Holds the coefficient c that is steered; `coef` is what the next update uses.

    After a step whose update saw the entropy e, c moves by `step_size`: up where e is below the target and down, not
    under 0, where it is above. The bonus is paid only while e is not above the target: it lifts an entropy that falls
    and leaves a high one alone.
    """

    def __init__(self, config: AlgoConfig) -> None:
        supervised = isinstance(config, SftConfig)
        self._control = None if supervised else config.entropy_control
        self._coef = 0.0 if supervised else config.entropy_coef
        self._is_paid = True

    @property
    def coef(self) -> float:
        """Factor on the entropy bonus."""
        return self._coef if self._is_paid else 0.0

    def update(self, entropy: float) -> None:
        """Take in the mean entropy of a token, in nats, that a step's update saw."""
        if self._control is None:
            return
        self._is_paid = entropy <= self._control.target
        move = self._control.step_size if entropy < self._control.target else -self._control.step_size
        self._coef = max(0.0, self._coef + move)

    def state(self) -> dict[str, float]:
        """Return what a checkpoint must hold."""
        return {"coef": self._coef, "is_paid": self._is_paid}

    def load_state(self, state: dict[str, float]) -> None:
        """Continue from a checkpoint's state."""
        self._coef, self._is_paid = state["coef"], bool(state["is_paid"])
