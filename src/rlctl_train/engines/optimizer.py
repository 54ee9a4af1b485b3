"""AdamW over the shards of one rank, with global-norm clipping, a schedule, and steps that refuse bad gradients."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from rlctl_train.config.optim import OptimConfig
from rlctl_train.device import has_fused_adamw
from rlctl_train.engines.schedule import learning_rate
from rlctl_train.engines.sharding import like, local, sum_over_ranks

MOMENTS = ("exp_avg", "exp_avg_sq")


class ShardedAdamW:
    """Steps the parameters of a model; moments are in float32 beside the shards they belong to."""

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], config: OptimConfig, num_updates: int, device: torch.device
    ) -> None:
        """`parameters` by Hugging Face name; `num_updates` is the length of the schedule, in optimizer steps."""
        self._parameters, self._config, self._num_updates, self._device = parameters, config, num_updates, device
        self._num_steps = 0
        # torch's AdamW sees plain tensors that share memory with the shards: it is much faster on them.
        self._shards = {name: nn.Parameter(local(p.detach())) for name, p in parameters.items()}
        self._adamw = torch.optim.AdamW(
            self._shards.values(),
            lr=config.lr,
            betas=config.betas,
            eps=config.eps,
            weight_decay=config.weight_decay,
            fused=has_fused_adamw(device),
        )
        for shard in self._shards.values():
            self._adamw.state[shard] = {
                "step": torch.zeros((), dtype=torch.float32, device=device),
                **{moment: torch.zeros_like(shard) for moment in MOMENTS},
            }

    def step(self) -> dict[str, float]:
        """Take one step and drop the gradients; a gradient that is not finite changes nothing but the schedule.

        Returns the L2 norm of the whole gradient before clipping, the rate, and whether the step was skipped.
        """
        rate = learning_rate(self._num_steps, self._num_updates, self._config)
        self._num_steps += 1
        grads = [local(p.grad) for p in self._parameters.values() if p.grad is not None]
        norm = self._global_norm(grads)
        finite = math.isfinite(norm)
        if finite:
            if norm > self._config.max_grad_norm:
                for grad in grads:
                    grad.mul_(self._config.max_grad_norm / norm)
            self._apply(rate)
        for parameter in self._parameters.values():
            parameter.grad = None
        return {"grad_norm": norm, "lr": rate, "skipped": float(not finite)}

    def rebind(self) -> None:
        """Follow the parameters after they moved to another device."""
        for name, parameter in self._parameters.items():
            self._shards[name].data = local(parameter.detach())

    def move_state(self, device: torch.device) -> None:
        """Move the moments to a device."""
        for state in self._adamw.state.values():
            for moment in MOMENTS:
                state[moment] = state[moment].to(device)

    def moments(self) -> list[Tensor]:
        """Return the moments of every shard."""
        return [state[moment] for state in self._adamw.state.values() for moment in MOMENTS]

    def state(self) -> dict[str, Tensor]:
        """Return the state by name, moments sharded as their parameters are; all but `schedule` shares memory."""
        state: dict[str, Tensor] = {"schedule": torch.tensor(self._num_steps)}
        for name, shard in self._shards.items():
            own = self._adamw.state[shard]
            state[f"optim.{name}.step"] = own["step"]
            for moment in MOMENTS:
                state[f"optim.{name}.{moment}"] = like(own[moment], self._parameters[name])
        return state

    def after_load(self, num_steps: int) -> None:
        """Continue the schedule after `num_steps` steps; the rest of the state was loaded in place."""
        self._num_steps = num_steps

    def _global_norm(self, grads: list[Tensor]) -> float:
        own = nn.utils.get_total_norm(grads, foreach=True).to(self._device)
        return math.sqrt(float(sum_over_ranks(own.square())))

    def _apply(self, rate: float) -> None:
        for name, shard in self._shards.items():
            grad = self._parameters[name].grad
            shard.grad = None if grad is None else local(grad)
        for group in self._adamw.param_groups:
            group["lr"] = rate
        self._adamw.step()
        self._adamw.zero_grad()
