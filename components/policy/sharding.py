"""Sharding the frozen base over the ranks of a torchrun, for a model that does not fit one GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from layerloop.components.policy.lora import lora_parameters
from layerloop.components.policy.model import Condition

if TYPE_CHECKING:
    from layerloop.components.policy.model import LayeredPolicy


def shard_base(policy: LayeredPolicy, device: torch.device | str) -> None:
    """FSDP2 over all ranks of the process group: each block's frozen weights are gathered for its forward and again for
    its backward pass.

    The adapter's weights are left out: they are small, float32, and complete on every rank, so their gradients, norm
    and optimizer are those of plain data parallelism. So is the autoencoder. The policy is loaded on the CPU and its
    transformer is never complete on one GPU. From here on the ranks must call it equally often; adapters may be put
    on and taken off as before.
    """
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(torch.device(device).type, (dist.get_world_size(),))
    adapter = set(lora_parameters(policy.transformer))
    for parameter in adapter:
        parameter.data = parameter.data.to(device)
    for block in policy.transformer.transformer_blocks:
        fully_shard(block, mesh=mesh, ignored_params=adapter)
    fully_shard(policy.transformer, mesh=mesh, ignored_params=adapter)
    policy.sharded = True
    policy.vae.to(device)
    policy.decoder.to(device)


@torch.no_grad()
def dummy_forwards(policy: LayeredPolicy, prompt_embeds: torch.Tensor, calls: int) -> None:
    """Run dummy forwards on the smallest input, so that FSDP's all-gathers match across ranks with unequal work.

    Args:
        prompt_embeds: `prompt_embeds[T, E]`.
        calls: how many forward passes this rank lacks.
    """
    side = policy.pixel_multiple
    prompt = prompt_embeds[None].to(policy.device, policy.dtype)
    condition = Condition(policy.noise(0, 0, side, side).to(policy.device), prompt, side, side)
    for _ in range(calls):
        policy.velocity(policy.noise(0, 1, side, side).to(policy.device), 1.0, condition)
