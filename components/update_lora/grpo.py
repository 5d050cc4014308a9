"""Flow-GRPO (arXiv 2505.05470): the clipped surrogate on the steps of the stochastic window, by `objective.py`."""

from __future__ import annotations

import torch
from torch import Tensor

from layerloop.components.policy.sampling import COEFFICIENTS
from layerloop.components.schema.errors import LayerloopError
from layerloop.components.schema.learning import UpdateRecipe
from layerloop.components.schema.recipe import Recipe
from layerloop.components.update_lora.algorithm import Batch, Learner, Observed, Velocities, assemble
from layerloop.components.update_lora.objective import clipped_surrogate, gaussian_kl, log_ratio, reweighting
from layerloop.components.update_lora.plan import Microbatch
from layerloop.components.update_lora.trajectories import Trajectories


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
    sigmas = [record.sigmas[record.window_start + j] for j in index]
    if recipe.rollout.keep_velocities:  # all the same, and given as the sampler gave it
        sigmas = sigmas[:1]
    return assemble(
        microbatch, group, prompt_embeds,
        latents=torch.stack([w[j] for w, j in zip(windows, index, strict=True)]),
        target=torch.stack([w[j + 1] for w, j in zip(windows, index, strict=True)]),
        sigma=torch.tensor(sigmas),
        coefficients=torch.tensor([steps[j] for j in index], dtype=torch.float32),
    )  # fmt: skip


def surrogate_losses(batch: Batch, velocities: Velocities, update: UpdateRecipe) -> tuple[Tensor, Observed]:
    """Per-point losses `[P]` of the clipped surrogate, and the columns to record."""
    mu, mu_old = batch.mean(velocities.new), batch.mean(velocities.old)
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
    if velocities.base is not None:
        kl = gaussian_kl(mu, batch.mean(velocities.base), batch.s)
        losses = losses + update.kl * kl
        observed["kl"] = kl
    return losses, observed


LEARNER = Learner(surrogate_batch, surrogate_losses)
