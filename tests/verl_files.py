"""Checkpoints as verl writes them: a file a rank, made in this one process, which is each of the ranks in turn."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.debug import _clear_sharding_prop_cache
from torch.testing._internal.distributed.fake_pg import FakeStore


@contextmanager
def being_rank(rank: int, num_ranks: int, replicas: int = 1) -> Iterator[DeviceMesh]:
    """Be one rank of a group that has no others; gives the mesh that verl makes for it."""
    _clear_sharding_prop_cache()  # what it remembers holds the mesh of the rank that this process was before
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=num_ranks)
    try:
        if replicas == 1:
            yield init_device_mesh("cpu", (num_ranks,), mesh_dim_names=("fsdp",))
        else:
            yield init_device_mesh("cpu", (replicas, num_ranks // replicas), mesh_dim_names=("ddp", "fsdp"))
    finally:
        dist.destroy_process_group()


def shard(whole: Tensor, mesh: DeviceMesh) -> DTensor:
    """Return this rank's part of a tensor, cut by rows as FSDP does; one without dimensions is whole everywhere."""
    outer = [Replicate()] * (mesh.ndim - 1)
    shape: dict[str, Any] = {"run_check": False, "shape": whole.shape, "stride": whole.stride()}
    if not whole.ndim:
        return DTensor.from_local(whole.clone(), mesh, [*outer, Replicate()], **shape)
    rank, num_parts = mesh.get_local_rank(mesh.ndim - 1), mesh.size(mesh.ndim - 1)
    parts = whole.chunk(num_parts)
    own = parts[rank].clone() if rank < len(parts) else whole[:0].clone()
    return DTensor.from_local(own, mesh, [*outer, Shard(0)], **shape)


def write_shards(
    folder: Path,
    tensors: dict[str, Tensor],
    *,
    num_ranks: int = 4,
    replicas: int = 1,
    optimizer: Callable[[int, DeviceMesh], Any] | None = None,
) -> Path:
    """Write the ranks' files of named tensors, and of an optimizer's state if there is one."""
    folder.mkdir(parents=True, exist_ok=True)
    for rank in range(num_ranks):
        with being_rank(rank, num_ranks, replicas) as mesh:
            held = OrderedDict((name, shard(tensor, mesh)) for name, tensor in tensors.items())
            torch.save(held, folder / f"model_world_size_{num_ranks}_rank_{rank}.pt")
            if optimizer is not None:
                torch.save(optimizer(rank, mesh), folder / f"optim_world_size_{num_ranks}_rank_{rank}.pt")
    write_settings(folder, num_ranks)
    return folder


def write_plain(folder: Path, ranks: list[dict[str, Tensor]]) -> Path:
    """Write the ranks' files where each holds plain tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    for rank, tensors in enumerate(ranks):
        torch.save(OrderedDict(tensors), folder / f"model_world_size_{len(ranks)}_rank_{rank}.pt")
    write_settings(folder, len(ranks))
    return folder


def write_fsdp2(folder: Path, make_model: Callable[[], nn.Module], num_ranks: int = 4, replicas: int = 1) -> Path:
    """Shard a model with `fully_shard` itself, take one optimizer step, and write what each rank then has."""
    folder.mkdir(parents=True, exist_ok=True)
    for rank in range(num_ranks):
        with being_rank(rank, num_ranks, replicas) as mesh:
            model = make_model()
            fully_shard(model, mesh=mesh)
            adamw = torch.optim.AdamW(model.parameters(), lr=1e-3)
            for parameter in model.parameters():
                parameter.grad = parameter.detach().clone()
            adamw.step()
            torch.save(model.state_dict(), folder / f"model_world_size_{num_ranks}_rank_{rank}.pt")
            torch.save(adamw.state_dict(), folder / f"optim_world_size_{num_ranks}_rank_{rank}.pt")
    write_settings(folder, num_ranks)
    return folder


def write_settings(folder: Path, num_ranks: int) -> None:
    """Write verl's own note of how a folder was made."""
    (folder / "fsdp_config.json").write_text(json.dumps({"FSDP_version": 2, "world_size": num_ranks}))
