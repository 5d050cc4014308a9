"""One iteration of learning: anchors, microbatches, gradient accumulation, the optimizer's steps.

The gradient of an optimizer step is that of one large batch, whatever the microbatches and ranks: every point's loss is
divided by the total weight of the step, known beforehand, and gradients are summed over microbatches and ranks.

mu_old is the mean (v_old the velocity) under the policy that sampled. In the first optimizer step that policy is the
one that learns, so the new mean, detached, is the old one: no second pass, and a ratio of exactly 1. Only later steps
need anchors (`anchors.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from layerloop.components.policy.model import LayeredPolicy
from layerloop.components.runtime.distributed import all_reduce_sum, rank
from layerloop.components.schema.errors import LayerloopError
from layerloop.components.schema.learning import UpdateRecipe
from layerloop.components.schema.recipe import Recipe
from layerloop.components.update_lora.algorithm import Batch, Learner, Observed, Velocities, learner_of, timesteps_of
from layerloop.components.update_lora.anchors import Anchors, with_progress
from layerloop.components.update_lora.diagnostics import Diagnostics
from layerloop.components.update_lora.plan import Microbatch, OptimizerStep
from layerloop.components.update_lora.state import TrainingState
from layerloop.components.update_lora.trajectories import Trajectories


def learn(
    policy: LayeredPolicy,
    state: TrainingState,
    steps: Sequence[OptimizerStep],
    groups: Mapping[int, Trajectories],
    prompt_embeds: Tensor,
    recipe: Recipe,
    *,
    iteration: int,
) -> Diagnostics:
    """Take the iteration's optimizer steps on the policy's adapter, in place.

    Args:
        state: optimizer, averages and the sampling policy's weights; advanced in place, to the end of the iteration.
        steps: the plan; this rank does its share.
        groups: trajectories by group, at least those of this rank's microbatches.
        prompt_embeds: `prompt_embeds[T, E]` on the policy's device and in its dtype.

    Raises:
        LayerloopError: a gradient that is not finite or exceeds `stop_grad_norm`.
    """
    update, learner = recipe.update, learner_of(recipe.update.algorithm)
    diagnostics = Diagnostics(timesteps_of(recipe))

    def batch_of(microbatch: Microbatch) -> Batch:
        return learner.batch(microbatch, groups[microbatch.group], prompt_embeds, recipe)

    mine = [step.ranks[rank()] for step in steps]
    work = [(i, j) for i, microbatches in enumerate(mine) for j in range(len(microbatches))]
    anchored = {(i, j): mine[i][j] for i, j in work if i > 0 or not state.on_policy}
    with torch.no_grad(), state.sampler_weights():
        anchors = Anchors(policy, anchored, groups, batch_of)

    remaining = with_progress(work, "updating")
    for i, (step, microbatches) in enumerate(zip(steps, mine, strict=True)):
        for parameter in state.parameters.values():
            parameter.grad = torch.zeros_like(parameter)
        for j, microbatch in enumerate(microbatches):
            next(remaining)
            batch = batch_of(microbatch)
            velocities = _velocities(policy, batch, anchors.take(i, j), update)
            observed = _accumulate(learner, batch, velocities, step, update)
            diagnostics.add(batch.timesteps, batch.weights, first=i == 0, **observed)
        gradients = [parameter.grad for parameter in state.parameters.values() if parameter.grad is not None]
        all_reduce_sum(gradients)
        diagnostics.gradient_norms.append(
            _clip_gradients(gradients, update, what=f"step {i + 1} of iteration {iteration}")
        )
        state.step()
    for _ in remaining:  # ends the progress line
        pass
    state.end_iteration()
    diagnostics.reduce()
    return diagnostics


def _velocities(policy: LayeredPolicy, batch: Batch, v_old: Tensor | None, update: UpdateRecipe) -> Velocities:
    """The batch's velocities; without an anchor `v_old` the policy that learns is the one that sampled."""
    base = None
    if update.kl > 0:
        with torch.no_grad(), policy.without_adapter():
            base = policy.velocity(batch.latents, batch.sigma, batch.condition)
    new = policy.velocity(batch.latents, batch.sigma, batch.condition)
    new.retain_grad()
    return Velocities(new, new.detach() if v_old is None else v_old.to(new.device), base)


def _accumulate(
    learner: Learner, batch: Batch, velocities: Velocities, step: OptimizerStep, update: UpdateRecipe
) -> Observed:
    """Add one microbatch's share of the step's gradient. Returns the columns to record for its points."""
    losses, observed = learner.losses(batch, velocities, update)
    (losses * batch.weights).sum().div(step.total_weight).backward()
    assert velocities.new.grad is not None
    scale = step.total_weight / batch.weights.clamp_min(1e-30)
    return observed | {
        "points": torch.ones_like(losses),
        "loss": losses,
        "velocity_gradient": velocities.new.grad.flatten(1).norm(dim=1) * scale,
    }


def _clip_gradients(gradients: Sequence[Tensor], update: UpdateRecipe, *, what: str) -> float:
    """Clip to `max_grad_norm` by the global norm, which is returned; the gradients are those of all ranks already.

    Raises:
        LayerloopError: the norm is not finite or above `stop_grad_norm`.
    """
    norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g.double()) for g in gradients]))
    value = float(norm)
    if not value <= update.stop_grad_norm:  # also NaN
        raise LayerloopError(
            f"gradient norm of optimizer {what} is {value:.3g}, above recipe.update.stop_grad_norm "
            f"{update.stop_grad_norm:g}: nothing is committed; begin a campaign with a smaller learning_rate or clip "
            "from the last good adapter (recipe.lora.start_from)"
        )
    if value > update.max_grad_norm:
        for gradient in gradients:
            gradient.mul_(update.max_grad_norm / value)
    return value
