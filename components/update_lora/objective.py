"""The clipped surrogate on Gaussian steps: log-ratios, clipping, reweighting over timesteps, KL. Pure functions.

One stochastic step of the sampler is x' = mu + s z with z ~ N(0, I), where mu = a x + c v is affine in the model's
velocity v and s = std * sqrt(-dt) depends on the schedule alone. With `mu_old` the mean under the policy that sampled,
`mu` the mean under the policy that learns and dmu = mu - mu_old, the exact log-ratio of the two densities over D latent
dimensions is

    sum_d [ (x'-mu_old)^2 - (x'-mu)^2 ]_d / (2 s^2)  =  sum_d [ dmu (x'-mu_old) ]_d / s^2  -  sum_d dmu_d^2 / (2 s^2)

computed here from the right-hand side: no difference of two large numbers, and exactly 0 where mu = mu_old whatever the
rounding of the stored x'. D is 512,000 for four layers at 640 pixels, so a RatioNorm has to settle its scale.

Shapes: B points (one candidate at one window step each), S packed tokens, C channels, D = S * C.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor


def _log_ratio_sum_rescale(dmu: Tensor, residual: Tensor, s: Tensor) -> Tensor:
    """Sum-and-rescale: log r = 1/sqrt(D) * sum_d dmu_d z_d, with z = (x'-mu_old)/s.

    Under the sampling policy z ~ N(0, I), so log r has mean 0 and deviation rms(dmu), for any D and any s: the ratio is
    centred on 1 (the quadratic term, whose mean is not 0, is dropped as in RatioNorm) and one clip range means the same
    change of the mean at every step and at every number of layers. The paper (arXiv 2605.30257) names the technique and
    not its formula; this one is ours.
    """
    return (dmu * residual).flatten(1).sum(1) / (s * math.sqrt(dmu[0].numel()))


def _log_ratio_guard(dmu: Tensor, residual: Tensor, s: Tensor) -> Tensor:
    """RatioNorm of GRPO-Guard (arXiv 2510.22319): log r = 1/D * sum_d dmu_d z_d.

    Their expression (logp_new - logp_old + b) * s, with log-densities averaged over the D dimensions of one sample and
    b = mean_d(dmu^2) / (2 s^2), equals this identically; the direct form loses no digits. Deviation rms(dmu) / sqrt(D):
    clip ranges are of the order 1e-6. (Upstream reduces b over the whole batch by mistake; this is per sample.)
    """
    return (dmu * residual).flatten(1).mean(1) / s


def _log_ratio_mean(dmu: Tensor, residual: Tensor, s: Tensor) -> Tensor:
    """Flow-GRPO as published (arXiv 2505.05470), without a RatioNorm: the exact log-ratio divided by D.

    log r = 1/D * sum_d [ dmu_d z_d / s - dmu_d^2 / (2 s^2) ]. The quadratic term is part of the density and is kept, so
    that this choice is the textbook one to compare against: its mean is below 0 and its scale depends on s and on D.
    """
    return (dmu * residual).flatten(1).mean(1) / s**2 - (dmu**2).flatten(1).mean(1) / (2 * s**2)


RATIO_NORMS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "sum_rescale": _log_ratio_sum_rescale,
    "guard": _log_ratio_guard,
    "mean": _log_ratio_mean,
}


def log_ratio(mu: Tensor, mu_old: Tensor, x_next: Tensor, s: Tensor, *, norm: str) -> Tensor:
    """Log-ratio of the learning to the sampling policy for steps x -> x_next.

    Args:
        mu: `mu[B, S, C]`, mean of the learning policy; gradients flow through it.
        mu_old: `mu_old[B, S, C]`, mean of the sampling policy, without gradient.
        x_next: `x_next[B, S, C]`, the latents that were sampled.
        s: `s[B]`, standard deviation of the step, positive.
        norm: a key of `RATIO_NORMS`.

    Returns:
        `log_r[B]`, exactly 0 where mu equals mu_old.
    """
    return RATIO_NORMS[norm](mu - mu_old, x_next - mu_old, s)


def clipped_surrogate(log_r: Tensor, advantages: Tensor, *, clip_low: float, clip_high: float) -> Tensor:
    """Per-point loss max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high)), shape [B] (PPO, arXiv 1707.06347).

    The gradient is 0 exactly where the step was already taken far enough: A > 0 and r > 1 + clip_high, or A < 0 and
    r < 1 - clip_low. At r = 1 it is -A d(log r).
    """
    ratio = log_r.exp()
    return torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip_low, 1 + clip_high))


def reweighting(gain: Tensor) -> Tensor:
    """Weights `[B]` over timesteps: 1 / |c|, where c = d mu / d v is the step's gain on the velocity.

    Without it a step's gradient is proportional to c, which is about dt: with the layered schedule's strongly uneven
    steps the last of them would outweigh the first by more than ten. With it, at mu = mu_old and with `sum_rescale`,
    d loss / d v_d = sign(-c) A z_d / sqrt(D) at every step. GRPO-Guard divides by -dt instead, which is the same up to
    the constant 1 + eta^2/2 for Flow-SDE away from sigma = 1. This takes the place of a KL term in the paper.
    """
    return 1.0 / gain.abs()


def gaussian_kl(mu: Tensor, mu_ref: Tensor, s: Tensor) -> Tensor:
    """KL(N(mu, s^2) || N(mu_ref, s^2)) per latent dimension, exact: mean_d (mu - mu_ref)^2 / (2 s^2), shape [B].

    Flow-GRPO's code leaves the dt of s^2 = std^2 (-dt) out; this does not.
    """
    return ((mu - mu_ref) ** 2).flatten(1).mean(1) / (2 * s**2)
