"""Learning at times of the forward process from final latents, for algorithms without likelihoods of steps.

Shapes: P points (a candidate at a drawn time), S packed tokens, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from layerloop.components.schema.recipe import Recipe
from layerloop.components.schema.seeds import seed_for
from layerloop.components.update_lora.algorithm import Batch, assemble, timesteps_of
from layerloop.components.update_lora.plan import Microbatch
from layerloop.components.update_lora.trajectories import Trajectories


def forward_process(x0: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Noised latents x_t = (1-t) x0 + t eps and their velocity v = eps - x0, both `[P, S, C]`; `t[P]` in (0, 1]."""
    time = t.view(-1, 1, 1)
    return (1 - time) * x0 + time * noise, noise - x0


def forward_batch(microbatch: Microbatch, group: Trajectories, prompt_embeds: Tensor, recipe: Recipe) -> Batch:
    """Points are times of the forward process from a candidate's final latents; times and noise from hashed seeds."""
    record, count = group.record, timesteps_of(recipe)
    drawn = {
        candidate: draw(
            recipe.seed, record.iteration, record.image_key, record.group, candidate, recipe.update.algorithm,
            count=count, sigmas=record.sigmas, shape=group.trajectories[candidate].latents.shape,
        )
        for candidate in {p.candidate for p in microbatch.points}
    }  # fmt: skip
    x0 = torch.stack([group.trajectories[p.candidate].latents for p in microbatch.points])
    noise = torch.stack([drawn[p.candidate][1][p.timestep] for p in microbatch.points])
    t = torch.stack([drawn[p.candidate][0][p.timestep] for p in microbatch.points])
    latents, target = forward_process(x0, noise, t)
    return assemble(microbatch, group, prompt_embeds, latents=latents, target=target, sigma=t)


def draw(*seed: int | str, count: int, sigmas: tuple[float, ...], shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Times and noise of one candidate, from a hashed seed: `t[count]` and `eps[count, S, C]`, float32 on the CPU.

    Times are distributed as the sampler spends its steps: u is stratified over [0, 1), one draw in each of `count`
    equal parts, and t is the schedule `sigmas` (falling from 1 to 0) at the fraction u of its steps, between two of
    them linearly.
    """
    generator = torch.Generator().manual_seed(seed_for(*seed))
    u = (torch.arange(count) + torch.rand(count, generator=generator)).double() / count
    t = np.interp(u.numpy() * (len(sigmas) - 1), np.arange(len(sigmas)), sigmas)
    noise = torch.randn(count, *shape, generator=generator)
    return torch.from_numpy(t).float(), noise


def velocity_error(velocity: Tensor, other: Tensor) -> Tensor:
    """Mean squared difference of two velocities `[P, S, C]` over their D = S C dimensions, `[P]`.

    To the frozen base it is the KL term of the forward process, up to a factor of the time alone.
    """
    return ((velocity - other) ** 2).flatten(1).mean(1)
