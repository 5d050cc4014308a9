"""The groups of an iteration, decided by hashing alone: which images, how many layers, where the noise enters.

Nothing here depends on how many workers there are or in which order they run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

from layerloop.components.runtime.balance import forward_cost, share
from layerloop.components.schema.learning import ALGORITHMS
from layerloop.components.schema.recipe import Recipe, RolloutRecipe
from layerloop.components.schema.seeds import seed_for
from layerloop.components.schema.trajectory import model_calls


@dataclasses.dataclass(frozen=True)
class GroupPlan:
    """One group of an iteration before its image is read: the image is known by its number in the train split."""

    group: int
    image: int
    layers: int
    window_start: int
    window_size: int
    etas: tuple[float, ...]
    dynamics: Literal["flow_sde", "cps", "ode"]


def plan_iteration(recipe: Recipe, iteration: int, images: int) -> list[GroupPlan]:
    """All groups of `iteration`, of a train split with `images` images.

    The split is traversed in epochs, each in another order; an iteration continues where the one before it
    stopped. L is uniform in [min_layers, max_layers].
    """
    rollout, seed = recipe.rollout, recipe.seed
    layer_counts = rollout.max_layers - rollout.min_layers + 1
    first = (iteration - 1) * rollout.groups
    orders = {
        epoch: epoch_order(seed, epoch, images)
        for epoch in range(first // images, (first + rollout.groups - 1) // images + 1)
    }
    windowed = ALGORITHMS[recipe.update.algorithm].samples_from == "window"  # else sampled exactly as at inference
    return [
        GroupPlan(
            group=group,
            image=orders[(first + group) // images][(first + group) % images],
            layers=rollout.min_layers + seed_for(seed, iteration, group, "layers") % layer_counts,
            window_start=window_start(rollout, seed, iteration, group) if windowed else 0,
            window_size=rollout.window.size if windowed else 0,
            etas=window_etas(rollout) if windowed else (),
            dynamics=rollout.noise.dynamics if windowed else "ode",
        )
        for group in range(rollout.groups)
    ]


def share_groups(plans: Sequence[GroupPlan], rollout: RolloutRecipe, workers: int) -> list[list[int]]:
    """Numbers of every worker's groups, by the cost of sampling them, as ranks share candidates.

    Images count as of one size, as they nearly are, so that no worker has to read them all to find its own.
    """
    costs = []
    for plan in plans:
        calls = model_calls(
            steps=rollout.steps,
            start=plan.window_start,
            window=plan.window_size,
            second_order=(rollout.whole if plan.dynamics == "ode" else rollout.outside) == "heun",
            share_prefix=rollout.share_prefix and plan.window_size > 0,
            candidates=rollout.group_size,
        )
        costs.append(calls * forward_cost(plan.layers))
    return [sorted(plans[index].group for index in mine) for mine in share(costs, workers)]


def epoch_order(seed: int, epoch: int, images: int) -> list[int]:
    """A permutation of range(images) for one pass over the split."""
    return sorted(range(images), key=lambda image: seed_for(seed, "epoch", epoch, image))


def window_start(rollout: RolloutRecipe, seed: int, iteration: int, group: int) -> int:
    """Index of the first stochastic step. One window per group: drawn per candidate it makes training collapse
    (verl-omni, common_pitfalls.md), since candidates would be compared that were not sampled alike."""
    window = rollout.window
    stop = rollout.steps - 1 if window.stop is None else window.stop
    starts = stop - window.size - window.start + 1
    match window.position:
        case "fixed":
            return window.start
        case "random":
            return window.start + seed_for(seed, iteration, group, "window") % starts
        case "sliding":
            return window.start + (iteration - 1) * window.stride % starts


def window_etas(rollout: RolloutRecipe) -> tuple[float, ...]:
    """The noise level of each window step: constant, or linear from `eta` to `final_eta`."""
    size, noise = rollout.window.size, rollout.noise
    if noise.schedule == "constant" or size == 1:
        return (noise.eta,) * size
    return tuple(noise.eta + (noise.final_eta - noise.eta) * j / (size - 1) for j in range(size))


def initial_seed(seed: int, iteration: int, image_key: str, group: int, candidate: int) -> int:
    """Seed of a candidate's initial noise; of candidate 0, where the group shares it."""
    return seed_for(seed, iteration, image_key, group, candidate, "initial noise")


def step_seed(seed: int, iteration: int, image_key: str, group: int, candidate: int, step: int) -> int:
    """Seed of the noise that a candidate gets in window step `step`."""
    return seed_for(seed, iteration, image_key, group, candidate, "step noise", step)
