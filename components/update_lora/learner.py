"""One iteration of learning: anchors, microbatches, gradient accumulation, the optimizer's steps.

The gradient of an optimizer step is that of one large batch, whatever the microbatches and ranks: every point's loss is
divided by the total weight of the step, known beforehand, and gradients are summed over microbatches and ranks.

mu_old is the mean (v_old the velocity) under the policy that sampled. In the first optimizer step that policy is the
one that learns, so the new mean, detached, is the old one: no second pass, and a ratio of exactly 1. Only later steps
need anchors; they are computed before the first step, with the same microbatches, because bfloat16 results depend on
the shape of a batch and an anchor from another shape would move the on-policy ratio away from 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from layerloop.components.policy.model import LayeredPolicy
from layerloop.components.runtime.distributed import all_reduce_sum, rank
from layerloop.components.runtime.progress import progress
from layerloop.components.schema.errors import LayerloopError
from layerloop.components.schema.learning import UpdateRecipe
from layerloop.components.schema.recipe import Recipe
from layerloop.components.update_lora.batches import BATCHES, Batch
from layerloop.components.update_lora.diagnostics import Diagnostics
from layerloop.components.update_lora.nft import nft_loss, optimality
from layerloop.components.update_lora.objective import clipped_surrogate, gaussian_kl, log_ratio, reweighting
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
        state: optimizer, averages and the sampling policy's weights; advanced in place.
        steps: the plan; this rank does its own share of it.
        groups: at least those of this rank's microbatches.
        prompt_embeds: `prompt_embeds[T, E]` on the policy's device and in its dtype.

    Raises:
        LayerloopError: a gradient that is not finite or exceeds `stop_grad_norm`.
    """
    update = recipe.update
    diagnostics = Diagnostics(timesteps_of(recipe))

    def batch_of(microbatch: Microbatch) -> Batch:
        return BATCHES[update.algorithm](microbatch, groups[microbatch.group], prompt_embeds, recipe)

    mine = [step.ranks[rank()] for step in steps]
    work = [(i, j) for i, microbatches in enumerate(mine) for j in range(len(microbatches))]
    on_policy = state.sampling is None  # the policy that sampled is the one that learns
    anchored = [(i, j) for i, j in work if i > 0 or not on_policy]
    anchors: dict[tuple[int, int], Tensor] = {}
    with torch.no_grad(), state.sampling_weights():
        for i, j in _shown(anchored, "computing anchors"):
            batch = batch_of(mine[i][j])
            anchors[i, j] = policy.velocity(batch.latents, batch.sigma, batch.condition).cpu()

    every = _shown(work, "updating")
    for i, (step, microbatches) in enumerate(zip(steps, mine, strict=True)):
        for parameter in state.parameters.values():
            parameter.grad = torch.zeros_like(parameter)
        for j, microbatch in enumerate(microbatches):
            next(every)
            _accumulate(
                policy, batch_of(microbatch), anchors.pop((i, j), None), step, update, diagnostics, first=i == 0
            )
        gradients = [parameter.grad for parameter in state.parameters.values() if parameter.grad is not None]
        all_reduce_sum(gradients)
        diagnostics.gradient_norms.append(_clip(gradients, update, what=f"step {i + 1} of iteration {iteration}"))
        state.step()
    for _ in every:  # lets the progress line end
        pass
    diagnostics.reduce()
    return diagnostics


def _shown(work: Sequence[tuple[int, int]], what: str) -> Iterator[tuple[int, int]]:
    """Microbatches, with progress on the first rank."""
    return iter(progress(work, what=what, unit="passes") if rank() == 0 and work else work)


def timesteps_of(recipe: Recipe) -> int:
    """Points of a candidate: the window's steps, or the drawn times of the forward process."""
    return recipe.rollout.window.size if recipe.update.algorithm == "grpo" else recipe.update.nft.timesteps


def _accumulate(
    policy: LayeredPolicy,
    batch: Batch,
    v_old: Tensor | None,
    step: OptimizerStep,
    update: UpdateRecipe,
    diagnostics: Diagnostics,
    *,
    first: bool,
) -> None:
    """Add one microbatch's share of the step's gradient."""
    v_ref = None
    if update.kl > 0:
        with torch.no_grad(), policy.without_adapter():
            v_ref = policy.velocity(batch.latents, batch.sigma, batch.condition)
    velocity = policy.velocity(batch.latents, batch.sigma, batch.condition)
    velocity.retain_grad()
    old = velocity.detach() if v_old is None else v_old.to(velocity.device)
    losses, observed = LOSSES[update.algorithm](batch, velocity, old, v_ref, update)
    (losses * batch.weights).sum().div(step.total_weight).backward()
    assert velocity.grad is not None
    scale = step.total_weight / batch.weights.clamp_min(1e-30)
    observed |= {
        "points": torch.ones_like(losses),
        "loss": losses,
        "velocity_gradient": velocity.grad.flatten(1).norm(dim=1) * scale,
    }
    if first:
        observed |= {"first_points": torch.ones_like(losses)}
        if "log_ratio" in observed:
            observed |= {"first_log_ratio": observed["log_ratio"]}
    diagnostics.add(batch.timesteps, batch.weights, **observed)


def surrogate_losses(
    batch: Batch, velocity: Tensor, v_old: Tensor, v_ref: Tensor | None, update: UpdateRecipe
) -> tuple[Tensor, dict[str, Tensor]]:
    """Per-point losses `[P]` of the clipped surrogate, and what to observe of them."""
    mu, mu_old = batch.mean(velocity), batch.mean(v_old)
    log_r = log_ratio(mu, mu_old, batch.target, batch.s, norm=update.ratio_norm)
    losses = clipped_surrogate(log_r, batch.advantages, clip_low=update.clip_low, clip_high=update.clip_high)
    if update.reweight:
        losses = losses * reweighting(batch.b)
    ratio, excess = log_r.detach().exp(), log_r.detach().expm1()
    z = (batch.target - mu_old).flatten(1)
    observed = {
        "ratio_excess": excess,
        "ratio_excess_squared": excess**2,
        "clipped_low": (ratio < 1 - update.clip_low) & (batch.advantages < 0),
        "clipped_high": (ratio > 1 + update.clip_high) & (batch.advantages > 0),
        "log_ratio": log_r.detach().abs(),
        "replay_noise_squared": (z**2).mean(1) / batch.s**2,
    }
    if v_ref is not None:
        kl = gaussian_kl(mu, batch.mean(v_ref), batch.s)
        losses = losses + update.kl * kl
        observed["kl"] = kl
    return losses, observed


def nft_losses(
    batch: Batch, velocity: Tensor, v_old: Tensor, v_ref: Tensor | None, update: UpdateRecipe
) -> tuple[Tensor, dict[str, Tensor]]:
    """Per-point losses `[P]` of DiffusionNFT; its KL term is the mean squared difference of velocities."""
    nft = update.nft
    losses = nft_loss(
        velocity, v_old, batch.target, batch.sigma, optimality(batch.advantages, update.advantage_clip),
        beta=nft.beta, scale=update.advantage_clip / nft.beta, weighting=nft.weighting,
    )  # fmt: skip
    observed: dict[str, Tensor] = {}
    if v_ref is not None:
        kl = ((velocity - v_ref) ** 2).flatten(1).mean(1)
        losses = losses + update.kl * kl
        observed["kl"] = kl
    return losses, observed


LOSSES = {"grpo": surrogate_losses, "nft": nft_losses}


def _clip(gradients: Sequence[Tensor], update: UpdateRecipe, *, what: str) -> float:
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
