"""DiffusionNFT's loss in closed form."""

from __future__ import annotations

import pytest
import torch

from layerloop.components.policy.model import Condition
from layerloop.components.schema.learning import UpdateRecipe
from layerloop.components.update_lora.algorithm import Batch, Velocities
from layerloop.components.update_lora.forward_process import draw, forward_process
from layerloop.components.update_lora.nft import nft_losses, optimality

SHAPE = (4, 6, 8)
D = 6 * 8
SIGMAS = (1.0, 0.9, 0.6, 0.0)


def tensors(seed: int = 0) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(SHAPE, generator=generator, dtype=torch.float64) for _ in range(3))


def losses(
    velocities: Velocities, target: torch.Tensor, t: torch.Tensor, advantages: torch.Tensor, **update: object
) -> torch.Tensor:
    """`nft_losses` at points of which only what it reads is given."""
    ones = torch.ones(len(t))
    condition = Condition(torch.zeros(1, 1, 64), torch.zeros(1, 1, 16), 16, 16)
    batch = Batch(target, t, condition, target, ones, ones, ones, advantages, ones, ones.long())
    return nft_losses(batch, velocities, UpdateRecipe.model_validate({"algorithm": "nft", **update}))[0]


def test_optimality_maps_the_clipped_advantage_to_the_unit_interval() -> None:
    r = optimality(torch.tensor([-9.0, -5.0, 0.0, 2.5, 5.0, 9.0]), 5.0)
    assert r.tolist() == [0.0, 0.0, 0.5, 0.75, 1.0, 1.0]


def test_forward_process_goes_from_the_latents_to_the_noise() -> None:
    x0, noise, _ = tensors()
    x_t, v = forward_process(x0, noise, torch.tensor([0.0, 0.25, 0.5, 1.0], dtype=torch.float64))
    torch.testing.assert_close(x_t[0], x0[0])
    torch.testing.assert_close(x_t[3], noise[3])
    torch.testing.assert_close(x_t[1] - 0.25 * v[1], x0[1])


@pytest.mark.parametrize("beta", [0.1, 1.0])
@pytest.mark.parametrize("clip", [1.0, 5.0])
def test_first_gradient_is_flow_matching_weighted_by_the_advantage(beta: float, clip: float) -> None:
    """d loss / d v_theta = 2 A (v_old - v) / D at v_theta = v_old, whatever beta and the clip are."""
    v_old, target, _ = tensors()
    advantages = torch.tensor([1.0, -0.5, 0.0, 0.9], dtype=torch.float64)
    velocity = v_old.clone().requires_grad_()
    loss = losses(
        Velocities(velocity, v_old, None), target, torch.rand(4, dtype=torch.float64), advantages,
        advantage_clip=clip, nft={"beta": beta, "weighting": "uniform"},
    )  # fmt: skip
    loss.sum().backward()
    expected = 2 * advantages.view(-1, 1, 1) * (v_old - target) / D
    torch.testing.assert_close(velocity.grad, expected, rtol=1e-10, atol=1e-15)


def test_the_minimum_is_the_implicit_mixture() -> None:
    """Setting the gradient to zero: v_theta = v_old + (2 r - 1) (v - v_old) / beta."""
    v_old, target, _ = tensors()
    r, beta = torch.tensor([1.0, 0.8, 0.5, 0.0], dtype=torch.float64), 0.5
    velocity = (v_old + (2 * r - 1).view(-1, 1, 1) * (target - v_old) / beta).requires_grad_()
    loss = losses(
        Velocities(velocity, v_old, None), target, torch.ones(4), 2 * r - 1,
        advantage_clip=1, nft={"beta": beta, "weighting": "uniform"},
    )  # fmt: skip
    loss.sum().backward()
    assert float(velocity.grad.abs().max()) < 1e-15


def test_adaptive_weighting_is_the_error_of_the_predicted_latents_over_its_mean_absolute_value() -> None:
    v_old, x0, noise = tensors()
    velocity = v_old + 0.1
    t = torch.tensor([0.2, 0.5, 0.9, 1.0], dtype=torch.float64)
    x_t, target = forward_process(x0, noise, t)
    r, beta, time = torch.full((4,), 0.7, dtype=torch.float64), 0.5, t.view(-1, 1, 1)

    loss = losses(  # r = 1/2 + 0.4 / 2, scale = 1 / beta
        Velocities(velocity, v_old, None), target, t, 2 * r - 1,
        advantage_clip=1, nft={"beta": beta, "weighting": "adaptive"},
    )  # fmt: skip

    expected = torch.zeros(4, dtype=torch.float64)
    for share, v in ((r, (1 - beta) * v_old + beta * velocity), (1 - r, (1 + beta) * v_old - beta * velocity)):
        error = x_t - time * v - x0
        expected += 2.0 * share * (error**2).flatten(1).mean(1) / error.abs().flatten(1).mean(1)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)


def test_no_advantage_at_the_sampling_policy_gives_no_gradient() -> None:
    v_old, target, _ = tensors()
    velocity = v_old.clone().requires_grad_()
    half = torch.full((4,), 0.5, dtype=torch.float64)
    losses(Velocities(velocity, v_old, None), target, half, torch.zeros_like(half)).sum().backward()
    assert float(velocity.grad.abs().max()) < 1e-16


def test_the_kl_term_is_the_mean_squared_difference_to_the_bases_velocity() -> None:
    new, target, base = tensors()
    t, none = torch.full((4,), 0.5, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    with_kl, without = (losses(Velocities(new, new, base), target, t, none, kl=kl) for kl in (0.3, 1e-30))
    torch.testing.assert_close(with_kl - without, 0.3 * ((new - base) ** 2).mean(dim=(1, 2)))


def test_times_are_stratified_along_the_sampling_schedule() -> None:
    t, noise = draw(0, "image", 3, count=3, sigmas=SIGMAS, shape=(6, 8))
    assert noise.shape == (3, 6, 8)
    for time, high, low in zip(t.tolist(), SIGMAS[:-1], SIGMAS[1:], strict=True):
        assert low <= time <= high, "one draw within each third of the steps"


def test_draws_depend_on_their_seed_alone() -> None:
    first, again = (draw(7, "image", 3, count=4, sigmas=SIGMAS, shape=(6, 8)) for _ in range(2))
    other, _ = draw(7, "image", 4, count=4, sigmas=SIGMAS, shape=(6, 8))
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other)
