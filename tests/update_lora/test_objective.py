"""The surrogate in closed form: ratios, clip quadrants, gradient identities, KL. Gradients in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from layerloop.components.update_lora.objective import (
    RATIO_NORMS,
    clipped_surrogate,
    gaussian_kl,
    log_ratio,
    reweighting,
)

B, S, C = 5, 6, 8
D = S * C


def step(
    seed: int = 0, *, dtype: torch.dtype = torch.float64, tokens: int = S
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(mu, mu_old, x_next, s) of B points whose x_next were sampled from N(mu_old, s^2)."""
    generator = torch.Generator().manual_seed(seed)
    mu_old = torch.randn(B, tokens, C, generator=generator, dtype=torch.float64)
    mu = mu_old + 0.01 * torch.randn(B, tokens, C, generator=generator, dtype=torch.float64)
    s = torch.rand(B, generator=generator, dtype=torch.float64) + 0.2
    x_next = mu_old + s.view(-1, 1, 1) * torch.randn(B, tokens, C, generator=generator, dtype=torch.float64)
    return mu.to(dtype), mu_old.to(dtype), x_next.to(dtype), s.to(dtype)


def log_density(x: Tensor, mu: Tensor, s: Tensor) -> Tensor:
    """log N(x; mu, s^2), summed over dimensions."""
    scale = s.view(-1, 1, 1)
    return (-((x - mu) ** 2) / (2 * scale**2) - scale.log() - 0.5 * math.log(2 * math.pi)).flatten(1).sum(1)


@pytest.mark.parametrize("norm", RATIO_NORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ratio_is_exactly_one_where_the_weights_match(norm: str, dtype: torch.dtype) -> None:
    _, mu_old, x_next, s = step(dtype=dtype)
    rounded = x_next.to(torch.bfloat16).to(dtype)  # even where what was stored had lost digits
    assert torch.equal(log_ratio(mu_old, mu_old, rounded, s, norm=norm).exp(), torch.ones(B, dtype=dtype))


def test_mean_is_the_difference_of_log_densities_over_d() -> None:
    mu, mu_old, x_next, s = step()
    textbook = (log_density(x_next, mu, s) - log_density(x_next, mu_old, s)) / D
    torch.testing.assert_close(log_ratio(mu, mu_old, x_next, s, norm="mean"), textbook, rtol=1e-10, atol=1e-13)


def test_guard_is_the_published_expression_per_sample() -> None:
    mu, mu_old, x_next, s = step()
    difference = (log_density(x_next, mu, s) - log_density(x_next, mu_old, s)) / D
    b = ((mu - mu_old) ** 2).flatten(1).mean(1) / (2 * s**2)
    torch.testing.assert_close(
        log_ratio(mu, mu_old, x_next, s, norm="guard"), (difference + b) * s, rtol=1e-9, atol=1e-14
    )


def test_sum_rescale_is_guard_times_the_root_of_d() -> None:
    mu, mu_old, x_next, s = step()
    guard, rescaled = (log_ratio(mu, mu_old, x_next, s, norm=norm) for norm in ("guard", "sum_rescale"))
    torch.testing.assert_close(rescaled, guard * math.sqrt(D), rtol=1e-12, atol=0)


@pytest.mark.parametrize("tokens", [8, 512])
def test_sum_rescale_has_mean_zero_and_deviation_rms_of_dmu_for_any_d(tokens: int) -> None:
    generator = torch.Generator().manual_seed(1)
    draws, q, s = 4000, 0.05, 0.4
    mu_old = torch.zeros(1, tokens, C)
    dmu = torch.randn(1, tokens, C, generator=generator)
    dmu *= q / dmu.pow(2).mean().sqrt()
    z = torch.randn(draws, tokens, C, generator=generator)
    log_r = log_ratio(
        mu_old + dmu, mu_old.expand(draws, -1, -1), mu_old + s * z, torch.full((draws,), s), norm="sum_rescale"
    )
    assert abs(float(log_r.mean())) < 4 * q / math.sqrt(draws)
    assert float(log_r.std()) == pytest.approx(q, rel=0.05)


def test_a_guard_ratio_is_resolved_in_float32_far_below_its_clip_range() -> None:
    """A clip of 2e-6 is 17 units in the last place of the ratio: the direct form is off by less than 1e-8,
    the difference of two log-densities by 7e-8."""
    mu, mu_old, x_next, s = step(tokens=4096)
    exact = log_ratio(mu, mu_old, x_next, s, norm="guard")
    single = log_ratio(mu.float(), mu_old.float(), x_next.float(), s.float(), norm="guard")
    assert float((single.double() - exact).abs().max()) < 1e-8


A = torch.tensor([1.5, 1.5, -1.5, -1.5, 1.5, -1.5], dtype=torch.float64)
RATIO = torch.tensor([1.3, 0.7, 1.3, 0.7, 1.0, 1.0], dtype=torch.float64)


def test_clip_stops_the_gradient_in_two_quadrants_only() -> None:
    log_r = RATIO.log().requires_grad_()
    clipped_surrogate(log_r, A, clip_low=0.1, clip_high=0.2).sum().backward()
    expected = torch.tensor([0.0, -1.5 * 0.7, 1.5 * 1.3, 0.0, -1.5, 1.5], dtype=torch.float64)
    torch.testing.assert_close(log_r.grad, expected, rtol=1e-14, atol=0)


def test_the_clip_range_may_be_asymmetric() -> None:
    log_r = torch.tensor([1.15, 0.85], dtype=torch.float64).log()
    loss = clipped_surrogate(log_r, torch.tensor([1.0, -1.0], dtype=torch.float64), clip_low=0.1, clip_high=0.2)
    torch.testing.assert_close(loss, torch.tensor([-1.15, 0.9], dtype=torch.float64))


def test_zero_advantage_gives_exactly_zero_gradient() -> None:
    mu, mu_old, x_next, s = step()
    mu.requires_grad_()
    log_r = log_ratio(mu, mu_old, x_next, s, norm="sum_rescale")
    clipped_surrogate(log_r, torch.zeros(B, dtype=torch.float64), clip_low=0.02, clip_high=0.02).sum().backward()
    assert torch.count_nonzero(mu.grad) == 0


@pytest.mark.parametrize(("norm", "per_dimension"), [("sum_rescale", math.sqrt(D)), ("guard", D)])
def test_reweighting_makes_the_gradient_on_the_velocity_the_same_at_every_timestep(
    norm: str, per_dimension: float
) -> None:
    """d loss / d v_d = -sign(c) A z_d / sqrt(D) (guard: / D): neither dt nor s is left in it."""
    _, mu_old, _, s = step()
    z = torch.randn(B, S, C, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    gain = torch.tensor([-0.009, -0.02, -0.1, -0.575, -0.2], dtype=torch.float64)  # c = d mu / d v
    v = torch.zeros(B, S, C, dtype=torch.float64, requires_grad=True)
    advantages = torch.tensor([1.0, -2.0, 0.5, 3.0, -1.0], dtype=torch.float64)

    log_r = log_ratio(mu_old + gain.view(-1, 1, 1) * v, mu_old, mu_old + s.view(-1, 1, 1) * z, s, norm=norm)
    loss = clipped_surrogate(log_r, advantages, clip_low=0.02, clip_high=0.02) * reweighting(gain)
    loss.sum().backward()

    expected = advantages.view(-1, 1, 1) * z / per_dimension
    torch.testing.assert_close(v.grad, expected, rtol=1e-12, atol=1e-15)


def test_guard_gradient_is_that_of_the_published_loss_for_flow_sde() -> None:
    """GRPO-Guard divides its loss by -dt; its gradient is A (1 + eta^2/2) z / D: ours times that constant."""
    _, mu_old, _, _ = step()
    sigma, sigma_next, eta = 0.8, 0.65, 0.7
    dt = sigma_next - sigma
    std = eta * math.sqrt(sigma / (1 - sigma))
    s = torch.full((B,), std * math.sqrt(-dt), dtype=torch.float64)
    gain = (1 + std**2 * (1 - sigma) / (2 * sigma)) * dt
    assert gain / dt == pytest.approx(1 + eta**2 / 2, rel=1e-14)
    z = torch.randn(B, S, C, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    v = torch.zeros(B, S, C, dtype=torch.float64, requires_grad=True)
    log_r = log_ratio(mu_old + gain * v, mu_old, mu_old + s.view(-1, 1, 1) * z, s, norm="guard")
    (clipped_surrogate(log_r, torch.ones(B, dtype=torch.float64), clip_low=2e-6, clip_high=2e-6) / -dt).sum().backward()
    torch.testing.assert_close(v.grad, (1 + eta**2 / 2) * z / D, rtol=1e-12, atol=1e-15)


def test_kl_is_the_closed_form_of_two_gaussians() -> None:
    mu, mu_ref, _, s = step()
    expected = torch.stack(
        [
            torch.distributions.kl_divergence(
                torch.distributions.Normal(mu[b], s[b]), torch.distributions.Normal(mu_ref[b], s[b])
            ).mean()
            for b in range(B)
        ]
    )
    torch.testing.assert_close(gaussian_kl(mu, mu_ref, s), expected, rtol=1e-12, atol=0)
