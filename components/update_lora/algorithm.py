"""The interface between the learner and an algorithm's file, and how that file is found.

The torch half of an algorithm is the file of this folder that has its name (`grpo.py`, `nft.py`), which ends in a
`LEARNER`; its other half is its row of `schema.learning.ALGORITHMS`.

Shapes: P points (a candidate at a timestep), S packed tokens, C channels.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from layerloop.components.policy.model import Condition
from layerloop.components.policy.sampling import step_mean
from layerloop.components.schema.learning import ALGORITHMS, UpdateRecipe
from layerloop.components.schema.recipe import Recipe
from layerloop.components.update_lora.plan import Microbatch
from layerloop.components.update_lora.trajectories import Trajectories


@dataclass(frozen=True)
class Batch:
    """Inputs of one forward pass and of its loss, on the policy's device."""

    latents: Tensor  # latents[P, S, C]: x before the step, or x_t of the forward process
    sigma: Tensor  # sigma[P], float32: noise level of `latents`; sigma[1] where all points have one timestep
    condition: Condition
    target: Tensor  # target[P, S, C]: x' after the step, or the velocity v = eps - x0
    a: Tensor  # a[P], b[P], s[P]: x' = a x + b v + s z; ones for the forward process, which has no step
    b: Tensor
    s: Tensor
    advantages: Tensor  # advantages[P]
    weights: Tensor  # weights[P]
    timesteps: Tensor  # timesteps[P], int64

    def mean(self, velocity: Tensor) -> Tensor:
        """mu[P, S, C] of the steps, as the rollout computed it."""
        return step_mean(self.latents, velocity, self.a.view(-1, 1, 1), self.b.view(-1, 1, 1))


@dataclass(frozen=True)
class Velocities:
    """`v[P, S, C]` of one batch: of the policy that learns, of the one that sampled, and of the frozen base."""

    new: Tensor  # with gradient
    old: Tensor
    base: Tensor | None  # where recipe.update.kl is not 0


Observed = dict[str, Tensor]  # columns of `diagnostics.COLUMNS`, [P] each


@dataclass(frozen=True)
class Learner:
    """The torch half of an algorithm."""

    batch: Callable[[Microbatch, Trajectories, Tensor, Recipe], Batch]  # (_, _, prompt_embeds[T, E], _)
    losses: Callable[[Batch, Velocities, UpdateRecipe], tuple[Tensor, Observed]]  # losses[P]


def learner_of(algorithm: str) -> Learner:
    """The learner of a name of `ALGORITHMS`."""
    return importlib.import_module(f"{__package__}.{algorithm}").LEARNER


def timesteps_of(recipe: Recipe) -> int:
    """Points of a candidate: the window's steps, or the drawn times of the forward process."""
    times = ALGORITHMS[recipe.update.algorithm].forward_times
    return recipe.rollout.window.size if times is None else times(recipe.update)


def assemble(
    microbatch: Microbatch,
    group: Trajectories,
    prompt_embeds: Tensor,
    *,
    latents: Tensor,
    target: Tensor,
    sigma: Tensor,
    coefficients: Tensor | None = None,
) -> Batch:
    """A batch on the device of `prompt_embeds[T, E]` from the algorithm's inputs: `latents[P, S, C]`,
    `target[P, S, C]`, `sigma[P]` and, where it learns from steps, their `coefficients[P, 3]` (a, b, s)."""
    device, points = prompt_embeds.device, microbatch.points
    coefficients = torch.ones(len(points), 3) if coefficients is None else coefficients
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
