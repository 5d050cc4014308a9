"""From planned points and stored trajectories to the tensors of one forward pass, for either algorithm.

Shapes: P points, S packed tokens, C channels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from layerloop.components.policy.model import Condition
from layerloop.components.policy.sampling import COEFFICIENTS
from layerloop.components.schema.errors import LayerloopError
from layerloop.components.schema.recipe import Recipe
from layerloop.components.update_lora.nft import draw, forward_process
from layerloop.components.update_lora.plan import Microbatch
from layerloop.components.update_lora.trajectories import Trajectories


@dataclass(frozen=True)
class Batch:
    """What one forward pass needs and what its loss needs, on the policy's device."""

    latents: Tensor  # latents[P, S, C]: x before the step, or x_t of the forward process
    sigma: Tensor  # sigma[P], float32: noise level of `latents`
    condition: Condition
    target: Tensor  # target[P, S, C]: x' after the step, or the velocity v = eps - x0
    a: Tensor  # a[P], b[P], s[P]: x' = a x + b v + s z; ones for the forward process, which has no step
    b: Tensor
    s: Tensor
    advantages: Tensor  # advantages[P]
    weights: Tensor  # weights[P]
    timesteps: Tensor  # timesteps[P], int64

    def mean(self, velocity: Tensor) -> Tensor:
        """mu[P, S, C] = a x + b v: the arithmetic of the rollout's own step."""
        return _column(self.a) * self.latents + _column(self.b) * velocity


def _column(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1)


def surrogate_batch(microbatch: Microbatch, group: Trajectories, prompt_embeds: Tensor, recipe: Recipe) -> Batch:
    """Points are steps of the stored SDE window; scalars of the schedule as the rollout computed them."""
    record = group.record
    coefficients = COEFFICIENTS[record.dynamics]
    steps = [coefficients(record.sigmas, record.window_start + j, record.etas[j]) for j in range(record.window_size)]
    for j, (_, _, s) in enumerate(steps):
        if not s > 0:
            raise LayerloopError(
                f"window step {j} of group {record.group} has noise {s}: a step without noise has no log-probability, "
                "choose recipe.rollout.window and noise.eta so that every window step is stochastic"
            )
    windows = [group.trajectories[p.candidate].latents for p in microbatch.points]
    index = [p.timestep for p in microbatch.points]
    return _batch(
        microbatch, group, prompt_embeds,
        latents=torch.stack([w[j] for w, j in zip(windows, index, strict=True)]),
        target=torch.stack([w[j + 1] for w, j in zip(windows, index, strict=True)]),
        sigma=torch.tensor([record.sigmas[record.window_start + j] for j in index]),
        coefficients=torch.tensor([steps[j] for j in index], dtype=torch.float32),
    )  # fmt: skip


def nft_batch(microbatch: Microbatch, group: Trajectories, prompt_embeds: Tensor, recipe: Recipe) -> Batch:
    """Points are times of the forward process from a candidate's final latents; times and noise from hashed seeds."""
    record, count = group.record, recipe.update.nft.timesteps
    drawn = {
        candidate: draw(
            recipe.seed, record.iteration, record.image_key, record.group, candidate, "nft",
            count=count, sigmas=record.sigmas, shape=group.trajectories[candidate].latents.shape,
        )
        for candidate in {p.candidate for p in microbatch.points}
    }  # fmt: skip
    x0 = torch.stack([group.trajectories[p.candidate].latents for p in microbatch.points])
    noise = torch.stack([drawn[p.candidate][1][p.timestep] for p in microbatch.points])
    t = torch.stack([drawn[p.candidate][0][p.timestep] for p in microbatch.points])
    latents, target = forward_process(x0, noise, t)
    return _batch(
        microbatch, group, prompt_embeds,
        latents=latents, target=target, sigma=t, coefficients=torch.ones(len(microbatch.points), 3),
    )  # fmt: skip


BATCHES: dict[str, Callable[[Microbatch, Trajectories, Tensor, Recipe], Batch]] = {
    "grpo": surrogate_batch,
    "nft": nft_batch,
}


def _batch(
    microbatch: Microbatch,
    group: Trajectories,
    prompt_embeds: Tensor,
    *,
    latents: Tensor,
    target: Tensor,
    sigma: Tensor,
    coefficients: Tensor,
) -> Batch:
    device, points = prompt_embeds.device, microbatch.points
    a, b, s = coefficients.to(device).unbind(1)
    return Batch(
        latents=latents.to(device),
        sigma=sigma.to(device),
        condition=Condition(
            latents=group.condition[None].to(device).expand(len(points), -1, -1),
            prompt_embeds=prompt_embeds[None],
            height=group.record.height,
            width=group.record.width,
        ),
        target=target.to(device),
        a=a,
        b=b,
        s=s,
        advantages=torch.tensor([p.advantage for p in points], device=device),
        weights=torch.tensor([p.weight for p in points], device=device),
        timesteps=torch.tensor([p.timestep for p in points], device=device),
    )
