"""DiffusionNFT (arXiv 2509.16117): learning on the forward process, without likelihoods.

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

from torch import Tensor

from layerloop.components.schema.learning import UpdateRecipe
from layerloop.components.update_lora.algorithm import Batch, Learner, Observed, Velocities
from layerloop.components.update_lora.forward_process import forward_batch, velocity_error

MIN_SCALE = 1e-5  # of the adaptive weight, as in the authors' code


def optimality(advantages: Tensor, advantage_clip: float) -> Tensor:
    """Advantages `[P]` mapped to [0, 1]: r = 1/2 + clip(A) / (2 A_max)."""
    return 0.5 + 0.5 * (advantages / advantage_clip).clamp(-1.0, 1.0)


def nft_losses(batch: Batch, velocities: Velocities, update: UpdateRecipe) -> tuple[Tensor, Observed]:
    """Per-point losses `[P]`, averaged over the D latent dimensions and multiplied by A_max / beta.

    `recipe.update.nft.weighting` "uniform" is the loss above. "adaptive" is the paper's section 3.3: the squared error
    is that of x0_hat = x_t - t v_hat, divided by its own mean absolute error (held constant), which evens out the
    times. The KL term to the base is the mean squared difference of velocities.
    """
    beta, weighting = update.nft.beta, update.nft.weighting
    positive = (1 - beta) * velocities.old + beta * velocities.new - batch.target
    negative = (1 + beta) * velocities.old - beta * velocities.new - batch.target
    r = optimality(batch.advantages, update.advantage_clip)
    errors = r * _error(positive, batch.sigma, weighting) + (1 - r) * _error(negative, batch.sigma, weighting)
    losses = update.advantage_clip / beta * errors
    observed: Observed = {}
    if velocities.base is not None:
        kl = velocity_error(velocities.new, velocities.base)
        losses = losses + update.kl * kl
        observed["kl"] = kl
    return losses, observed


def _error(difference: Tensor, t: Tensor, weighting: str) -> Tensor:
    if weighting == "uniform":
        return (difference**2).flatten(1).mean(1)
    # x0_hat - x0 = (x_t - t v_hat) - (x_t - t v) = -t (v_hat - v)
    flat = (t.view(-1, 1, 1) * difference).flatten(1)
    return (flat**2).mean(1) / flat.detach().abs().mean(1).clamp_min(MIN_SCALE)


LEARNER = Learner(forward_batch, nft_losses)
