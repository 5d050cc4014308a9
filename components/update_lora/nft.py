"""DiffusionNFT (arXiv 2509.16117): learning on the forward process, without likelihoods. Pure functions of tensors.

A candidate's final latents x0 are noised to x_t = (1-t) x0 + t eps and the velocity that leads back, v = eps - x0, is
regressed on by an implicit positive and an implicit negative policy, mirror images about the one that sampled (v_old):

    v_plus  = (1 - beta) v_old + beta v_theta          v_minus = (1 + beta) v_old - beta v_theta
    loss    = r ||v_plus - v||^2 + (1 - r) ||v_minus - v||^2

with r in [0, 1] the candidate's optimality: its group-relative advantage A, clipped at A_max and mapped by
r = 1/2 + A / (2 A_max). At v_theta = v_old the gradient with respect to v_theta is 2 beta (2 r - 1) (v_old - v), or
(2 beta / A_max) A (v_old - v): flow matching weighted by the advantage. The loss is multiplied by A_max / beta (as the
authors' code does), so that this first gradient is 2 A (v_old - v) whatever beta and A_max are; they set how far a step
may go, not how fast it starts.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from layerloop.components.schema.seeds import seed_for

MIN_SCALE = 1e-5  # of the adaptive weight, as in the authors' code


def optimality(advantages: Tensor, advantage_clip: float) -> Tensor:
    """Advantages `[B]` mapped to [0, 1]: r = 1/2 + clip(A) / (2 A_max)."""
    return 0.5 + 0.5 * (advantages / advantage_clip).clamp(-1.0, 1.0)


def forward_process(x0: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Noised latents x_t = (1-t) x0 + t eps and their velocity v = eps - x0, both `[B, S, C]`; `t[B]` in (0, 1]."""
    time = t.view(-1, 1, 1)
    return (1 - time) * x0 + time * noise, noise - x0


def nft_loss(
    velocity: Tensor, v_old: Tensor, target: Tensor, t: Tensor, r: Tensor, *, beta: float, scale: float, weighting: str
) -> Tensor:
    """Per-point loss `[B]`, averaged over the D latent dimensions and multiplied by `scale` (A_max / beta).

    Args:
        velocity: `v_theta[B, S, C]` at x_t.
        v_old: `v_old[B, S, C]`, of the sampling policy, without gradient.
        target: `v[B, S, C]` = eps - x0.
        t: `t[B]`, forward-process time.
        r: `r[B]`, optimality in [0, 1].
        weighting: "uniform" is the loss above. "adaptive" is the paper's section 3.3: the squared error is that of
            x0_hat = x_t - t v_hat, divided by its own mean absolute error (held constant), which evens out the times.
    """
    positive = (1 - beta) * v_old + beta * velocity - target
    negative = (1 + beta) * v_old - beta * velocity - target
    return scale * (r * _error(positive, t, weighting) + (1 - r) * _error(negative, t, weighting))


def _error(difference: Tensor, t: Tensor, weighting: str) -> Tensor:
    if weighting == "uniform":
        return (difference**2).flatten(1).mean(1)
    # x0_hat - x0 = (x_t - t v_hat) - (x_t - t v) = -t (v_hat - v)
    flat = (t.view(-1, 1, 1) * difference).flatten(1)
    return (flat**2).mean(1) / flat.detach().abs().mean(1).clamp_min(MIN_SCALE)


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
