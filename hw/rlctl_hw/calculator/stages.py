"""The stages of a pipeline: which layers each has, whether embedding and head, how many micro-batches it holds."""

from __future__ import annotations

from dataclasses import dataclass

from rlctl_hw import params
from rlctl_hw.setup import Setup


@dataclass(frozen=True)
class Stage:
    """One pipeline stage; without a pipeline, the whole model."""

    num_dense: int
    num_moe: int
    first: bool
    last: bool
    in_flight: float
    """Micro-batches whose activations the stage holds at one time, over all of its layers."""

    @property
    def num_layers(self) -> int:
        """Return the layers of the stage."""
        return self.num_dense + self.num_moe

    @property
    def kinds(self) -> tuple[bool, ...]:
        """Return whether its layers have experts: one kind, or both."""
        return tuple(moe for moe, count in ((False, self.num_dense), (True, self.num_moe)) if count)


def stages(setup: Setup) -> tuple[Stage, ...]:
    """Return the stages that can hold most: first and last, and the second, which lacks the embedding.

    Dense layers of a model with experts come first.
    """
    pp, num_layers = setup.mesh.pp, setup.shape.num_layers
    per_stage = -(-num_layers // pp)
    dense = num_layers - params.num_sparse_layers(setup.shape)
    made = []
    for index in sorted({0, min(1, pp - 1), pp - 1}):
        begin, end = index * per_stage, min((index + 1) * per_stage, num_layers)
        num_dense = max(0, min(end, dense) - begin)
        made.append(
            Stage(
                num_dense=num_dense,
                num_moe=end - begin - num_dense,
                first=index == 0,
                last=index == pp - 1,
                in_flight=_in_flight(setup, index),
            )
        )
    return tuple(made)


def _in_flight(setup: Setup, index: int) -> float:
    """1F1B: stage r of p holds min(m, p - r) micro-batches. Interleaved with v chunks a stage, of L/v layers each:
    the first holds vp + p - 1 chunks, the last (v - 1)p + 1 (Narayanan et al., arXiv:2104.04473)."""
    mesh, batches = setup.mesh, setup.num_micro_batches
    if mesh.virtual_stages == 1:
        return min(batches, mesh.pp - index)
    v = mesh.virtual_stages
    chunks = (v - 1) * mesh.pp + 2 * (mesh.pp - index - 1) + 1
    return min(batches, chunks / v)
