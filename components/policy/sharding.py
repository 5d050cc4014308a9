"""Sharding the frozen base over the ranks of a torchrun, for a model that does not fit one GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from layerloop.components.policy.model import LayeredPolicy


def shard_base(policy: LayeredPolicy, device: torch.device, *, ranks: int) -> None:
    """FSDP2 over all ranks: each block's frozen weights are gathered for its forward and again for its backward pass.

    The adapter's weights are left out: they are small, float32, and stay whole on every rank, so their gradients, norm
    and optimizer are those of plain data parallelism. So is the autoencoder. The policy is loaded on the CPU and its
    transformer never whole on a GPU. From here on the ranks must call it equally often.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (ranks,))
    adapter = set(policy.trainable_parameters().values())
    for parameter in adapter:
        parameter.data = parameter.data.to(device)
    for block in policy.transformer.transformer_blocks:
        fully_shard(block, mesh=mesh, ignored_params=adapter)
    fully_shard(policy.transformer, mesh=mesh, ignored_params=adapter)
    policy.sharded = True
    policy.vae.to(device)
    policy.decoder.to(device)
