"""Sharding the frozen base over the ranks, for a model that does not fit one GPU."""

from __future__ import annotations

import torch

from layerloop.components.policy.model import LayeredPolicy
from layerloop.components.runtime.distributed import world_size


def shard_base(policy: LayeredPolicy, device: torch.device) -> None:
    """FSDP2 over all ranks: each block's frozen weights are gathered for its forward and again for its backward pass.

    The adapter's weights are left out: they are small, float32, and stay whole on every rank, so their gradients, norm
    and optimizer are those of plain data parallelism. The policy is loaded on the CPU and never whole on a GPU.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (world_size(),))
    adapter = set(policy.trainable_parameters().values())
    for parameter in adapter:
        parameter.data = parameter.data.to(device)
    for block in policy.transformer.transformer_blocks:
        fully_shard(block, mesh=mesh, ignored_params=adapter)
    fully_shard(policy.transformer, mesh=mesh, ignored_params=adapter)
