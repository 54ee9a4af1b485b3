"""FSDP2 over all ranks: sharding, sums over ranks, and views of what one rank holds."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import HashStore
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from rlctl_train.device import COLLECTIVES
from rlctl_train.engines.models import Decoder


def num_ranks() -> int:
    """Return how many ranks train together; 1 where no process group exists."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Return this process's rank."""
    return dist.get_rank() if dist.is_initialized() else 0


def shard(model: Decoder, device: torch.device, compute_dtype: torch.dtype, reshard_after_forward: bool) -> None:
    """Shard every layer, then the rest, over all ranks, with float32 master weights; rank 0's weights go to all.

    A rank never holds more than one whole layer on the device besides its shards. Gradients come out as sums over
    ranks, in float32, whatever the communication backend.
    """
    mesh = _mesh(device)
    policy = MixedPrecisionPolicy()
    if compute_dtype != torch.float32:
        policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32)
    for layer in model.layers:
        _receive(layer, device)
        fully_shard(layer, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard_after_forward)
    _receive(model, device)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # Losses are divided by global counts already. Gloo has no averaging, hence plain sums.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def local(tensor: Tensor) -> Tensor:
    """Return the part of a tensor that this rank holds, sharing its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full(tensor: Tensor) -> Tensor:
    """Return the whole tensor; every rank must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def fill(held: Tensor, whole: Tensor) -> None:
    """Write the whole tensor's values, or this rank's part of them, into what the rank holds."""
    if isinstance(held, DTensor):
        whole = distribute_tensor(whole, held.device_mesh, held.placements, src_data_rank=None)
    local(held.detach()).copy_(local(whole))


def let_go(model: nn.Module) -> None:
    """Drop whole layers that a pass has left gathered: the next one gathers them anew."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def like(part: Tensor, whole: Tensor) -> Tensor:
    """Return this rank's `part` as a tensor sharded as `whole` is, sharing its memory."""
    if not isinstance(whole, DTensor):
        return part
    return DTensor.from_local(
        part, whole.device_mesh, whole.placements, run_check=False, shape=whole.shape, stride=whole.stride()
    )


def sum_over_ranks(values: Tensor) -> Tensor:
    """Add `values` over all ranks, in place, and return them."""
    if num_ranks() > 1:
        dist.all_reduce(values)
    return values


def max_over_ranks(value: int, device: torch.device) -> int:
    """Return the largest `value` of any rank."""
    if num_ranks() == 1:
        return value
    tensor = torch.tensor(value, device=device)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return int(tensor)


def gather_over_ranks(rows: Tensor) -> Tensor:
    """Return the rows [n, K] of all ranks, one below the other, on the host; every rank may have another n."""
    if num_ranks() == 1:
        return rows
    everyone: list[Tensor] = [rows] * num_ranks()
    dist.all_gather_object(everyone, rows)
    return torch.cat(everyone)


def _mesh(device: torch.device) -> DeviceMesh:
    if not dist.is_initialized():
        # FSDP wants a group even for one rank, where it serves mixed precision; this one opens no connection.
        dist.init_process_group(COLLECTIVES[device.type], store=HashStore(), rank=0, world_size=1)
    return init_device_mesh(device.type, (dist.get_world_size(),), mesh_dim_names=("data",))


def _receive(module: nn.Module, device: torch.device) -> None:
    """Move a module to the device and give its parameters, those not sharded yet, the values of rank 0."""
    for parameter in module.parameters():
        if not isinstance(parameter, DTensor):
            parameter.data = parameter.data.to(device)
            if dist.get_world_size() > 1:
                dist.broadcast(parameter.data, src=0)
    for buffer in module.buffers():
        buffer.data = buffer.data.to(device)
