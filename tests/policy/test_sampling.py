"""The samplers against closed forms, flow_grpo's own expressions, and Monte Carlo."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from layerloop.components.policy import sampling
from layerloop.components.policy import schedule as schedules
from layerloop.components.policy.model import Condition, LayeredPolicy
from layerloop.components.policy.sampling import Plan

UNIFORM = tuple(np.linspace(1, 0, 11, dtype=np.float32).tolist())
# what Qwen-Image-Layered's own config is reported to say
SHIPPED = {"use_dynamic_shifting": True, "time_shift_type": "linear", "shift_terminal": None}
LAYERED = schedules.sigmas(FlowMatchEulerDiscreteScheduler(**SHIPPED), 10, condition_tokens=1600)
DYNAMICS = ("flow_sde", "cps")


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---- schedule


def test_schedule_at_640_pixels_is_that_of_the_released_model() -> None:
    expected = [1.0, 0.9574, 0.9091, 0.8537, 0.7895, 0.7143, 0.625, 0.5172, 0.3846, 0.2174, 0.0]
    assert list(LAYERED) == pytest.approx(expected, abs=5e-5)


def test_schedule_is_float32_and_survives_json() -> None:
    assert all(float(np.float32(sigma)) == sigma for sigma in LAYERED)
    assert torch.equal(torch.tensor(LAYERED, dtype=torch.float32).double(), torch.tensor(LAYERED, dtype=torch.float64))


def test_schedule_follows_the_loaded_scheduler_and_leaves_it_alone() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(**{**SHIPPED, "time_shift_type": "exponential", "shift_terminal": 0.02})
    before = scheduler.timesteps.clone()
    schedule = schedules.sigmas(scheduler, 10, condition_tokens=1600)
    assert schedule[-2] == pytest.approx(0.02) and schedule[5] > LAYERED[5]
    assert torch.equal(scheduler.timesteps, before)


# ---- single steps


def test_euler_step_has_the_bits_of_the_diffusers_scheduler() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=2.5)
    scheduler.set_timesteps(sigmas=np.linspace(1, 0, 8)[:-1])
    schedule = schedules.sigmas(FlowMatchEulerDiscreteScheduler(shift=2.5), 7, condition_tokens=16)
    x = theirs = draw(2, 5, 64)
    for i, t in enumerate(scheduler.timesteps):
        v = draw(2, 5, 64, seed=i + 1)
        theirs = scheduler.step(v, t, theirs, return_dict=False)[0]
        x = sampling.euler_step(x, v, schedule, i)
        assert torch.equal(x, theirs)


def upstream_sde(x, v, sigma, sigma_prev, sigma_max, eta):  # type: ignore[no-untyped-def]
    """flow_grpo's `sde_step_with_logprob`, its expressions."""
    dt = sigma_prev - sigma
    std = math.sqrt(sigma / (1 - (sigma_max if sigma == 1 else sigma))) * eta
    mean = x * (1 + std**2 / (2 * sigma) * dt) + v * (1 + std**2 * (1 - sigma) / (2 * sigma)) * dt
    return mean, std * math.sqrt(-dt)


def upstream_cps(x, v, sigma, sigma_prev, sigma_max, eta):  # type: ignore[no-untyped-def]
    """flow_grpo's `cps`, its expressions."""
    std = sigma_prev * math.sin(eta * math.pi / 2)
    x0, x1 = x - sigma * v, x + v * (1 - sigma)
    return x0 * (1 - sigma_prev) + x1 * math.sqrt(sigma_prev**2 - std**2), std


@pytest.mark.parametrize(("dynamics", "upstream"), [("flow_sde", upstream_sde), ("cps", upstream_cps)])
@pytest.mark.parametrize("schedule", [UNIFORM, LAYERED], ids=["uniform", "layered"])
@pytest.mark.parametrize("eta", [0.3, 0.7, 1.0])
def test_steps_equal_the_expressions_of_flow_grpo(dynamics, upstream, schedule, eta) -> None:  # type: ignore[no-untyped-def]
    x, v, z = draw(2, 3, 64), draw(2, 3, 64, seed=1), draw(2, 3, 64, seed=2)
    for i in range(len(schedule) - 2):
        mean, s = upstream(x.double(), v.double(), schedule[i], schedule[i + 1], schedule[1], eta)
        assert sampling.COEFFICIENTS[dynamics](schedule, i, eta)[2] == pytest.approx(s, rel=1e-12)
        still = sampling.stochastic_step(x, v, torch.zeros_like(z), schedule, i, eta, dynamics)
        assert torch.allclose(still.double(), mean, atol=3e-6)
        step = sampling.stochastic_step(x, v, z, schedule, i, eta, dynamics)
        assert torch.allclose(step.double(), mean + s * z, atol=5e-6)


@pytest.mark.parametrize("dynamics", DYNAMICS)
def test_a_mean_has_the_same_bits_from_numbers_and_from_float32_tensors(dynamics: str) -> None:
    """The rollout steps with numbers; an update has steps of many times in one batch and so columns of them."""
    x, v = draw(8, 7, 64), draw(8, 7, 64, seed=1)
    rows = [sampling.COEFFICIENTS[dynamics](LAYERED, i, 0.7) for i in range(8)]
    a, b, _ = torch.tensor(rows, dtype=torch.float32).unbind(1)
    together = sampling.step_mean(x, v, a.view(-1, 1, 1), b.view(-1, 1, 1))
    for i, (a_i, b_i, _) in enumerate(rows):
        assert torch.equal(together[i : i + 1], sampling.step_mean(x[i : i + 1], v[i : i + 1], a_i, b_i))


@pytest.mark.parametrize("eta", [0.0, 1e-9])
@pytest.mark.parametrize("dynamics", DYNAMICS)
def test_without_noise_the_step_is_eulers(dynamics: str, eta: float) -> None:
    x, v = draw(2, 7, 64), draw(2, 7, 64, seed=1)
    for i in range(len(LAYERED) - 1):
        step = sampling.stochastic_step(x, v, torch.zeros_like(x), LAYERED, i, eta, dynamics)
        assert torch.allclose(step, sampling.euler_step(x, v, LAYERED, i), atol=2.4e-7, rtol=1.2e-7)


@pytest.mark.parametrize("dynamics", DYNAMICS)
def test_the_last_step_has_no_noise(dynamics: str) -> None:
    x, v, z = draw(1, 3, 64), draw(1, 3, 64, seed=1), draw(1, 3, 64, seed=2)
    last = len(LAYERED) - 2
    assert sampling.COEFFICIENTS[dynamics](LAYERED, last, 0.7)[2] == 0
    step = sampling.stochastic_step(x, v, z, LAYERED, last, 0.7, dynamics)
    assert torch.allclose(step, sampling.euler_step(x, v, LAYERED, last), atol=1e-6)


def test_velocity_coefficient_of_flow_sde_is_one_plus_half_eta_squared() -> None:
    for i, eta in itertools.product(range(1, 9), (0.3, 0.7, 1.2)):
        dt = LAYERED[i + 1] - LAYERED[i]
        a, b, _ = sampling.flow_sde_coefficients(LAYERED, i, eta)
        assert b == pytest.approx((1 + eta**2 / 2) * dt, rel=1e-12)
        assert a == pytest.approx(1 + eta**2 * dt / (2 * (1 - LAYERED[i])), rel=1e-12)
    assert sampling.flow_sde_coefficients(LAYERED, 0, 0.7)[1] == LAYERED[1] - 1  # exactly 1 at sigma = 1


def test_first_step_is_finite_though_sigma_is_one() -> None:
    for schedule, dynamics in itertools.product((UNIFORM, LAYERED), DYNAMICS):
        assert all(math.isfinite(c) and abs(c) < 10 for c in sampling.COEFFICIENTS[dynamics](schedule, 0, 1.0))


# ---- data whose velocity is known: x0 ~ N(m, s2) in every dimension


M, S2 = 0.3, 0.25


def analytic(sigma: float) -> tuple[float, float]:
    """v(x) = slope x + offset at noise level sigma."""
    variance = (1 - sigma) ** 2 * S2 + sigma**2
    slope = (sigma - (1 - sigma) * S2) / variance
    return slope, -M - slope * (1 - sigma) * M


def velocity(x: torch.Tensor, sigma: float) -> torch.Tensor:
    slope, offset = analytic(sigma)
    return slope * x + offset


@pytest.mark.parametrize("eta", [0.3, 0.7, 1.0])
def test_flow_sde_steps_along_the_reverse_sde_with_the_datas_own_score(eta: float) -> None:
    """dx = (v - g^2 / 2 score) dt + g dW, g = eta sqrt(sigma / (1 - sigma)): the family of processes with the flow's
    marginals. The score is taken from the density of the data, which the step does not know of."""
    x = draw(2, 5, 64).double()
    for i in range(1, len(LAYERED) - 2):
        sigma, dt = LAYERED[i], LAYERED[i + 1] - LAYERED[i]
        score = -(x - (1 - sigma) * M) / ((1 - sigma) ** 2 * S2 + sigma**2)
        g = eta * math.sqrt(sigma / (1 - sigma))
        mean = sampling.stochastic_step(x, velocity(x, sigma), torch.zeros_like(x), LAYERED, i, eta, "flow_sde")
        torch.testing.assert_close(mean, x + (velocity(x, sigma) - g**2 / 2 * score) * dt, rtol=1e-12, atol=1e-12)
        assert sampling.flow_sde_coefficients(LAYERED, i, eta)[2] == pytest.approx(g * math.sqrt(-dt), rel=1e-12)


@pytest.mark.parametrize("eta", [0.3, 0.8, 1.0])
def test_cps_keeps_the_noise_that_the_schedule_promises(eta: float) -> None:
    """Where one image is all the data, x_sigma ~ N((1 - sigma) m, sigma^2), and a step leads from one such
    distribution to the next exactly; Flow-SDE's does not."""
    for i in range(len(LAYERED) - 2):
        sigma, ahead = LAYERED[i], LAYERED[i + 1]
        after = {}
        for dynamics in DYNAMICS:
            a, b, s = sampling.COEFFICIENTS[dynamics](LAYERED, i, eta)
            carried = a + b / sigma  # v = (x - m) / sigma
            after[dynamics] = (carried * (1 - sigma) * M - b * M / sigma, carried**2 * sigma**2 + s**2)
        assert after["cps"] == pytest.approx(((1 - ahead) * M, ahead**2), rel=1e-9)
        assert after["flow_sde"][1] > 1.001 * ahead**2


def propagate(schedule: tuple[float, ...], dynamics: str, eta: float) -> tuple[float, float]:
    """Mean and variance of the samples in closed form: x' = A x + B + S z with A = a + b slope, B = b offset."""
    mean, variance = 0.0, 1.0
    for i in range(len(schedule) - 1):
        a, b, s = (
            (1.0, schedule[i + 1] - schedule[i], 0.0)
            if dynamics == "ode"
            else sampling.COEFFICIENTS[dynamics](schedule, i, eta)
        )
        slope, offset = analytic(schedule[i])
        mean, variance = (a + b * slope) * mean + b * offset, (a + b * slope) ** 2 * variance + s**2
    return mean, variance


@pytest.mark.parametrize(("dynamics", "eta"), [("flow_sde", 0.7), ("cps", 0.8)])
def test_samples_follow_the_affine_gaussian_recursion_at_every_step(dynamics: str, eta: float) -> None:
    generator = torch.Generator().manual_seed(4)
    count, mean, variance = 400_000, 0.0, 1.0
    x = torch.randn(count, generator=generator)
    for i in range(9):
        x = sampling.stochastic_step(
            x, velocity(x, UNIFORM[i]), torch.randn(count, generator=generator), UNIFORM, i, eta, dynamics
        )
        a, b, s = sampling.COEFFICIENTS[dynamics](UNIFORM, i, eta)
        slope, offset = analytic(UNIFORM[i])
        mean, variance = (a + b * slope) * mean + b * offset, (a + b * slope) ** 2 * variance + s**2
        assert abs(float(x.double().mean()) - mean) < 4 * math.sqrt(variance / count)
        assert abs(float(x.double().var()) / variance - 1) < 4 * math.sqrt(2 / count)


@pytest.mark.parametrize(
    ("dynamics", "eta", "variances"),
    [
        ("ode", 0.0, (0.186, 0.236, 0.246, 0.249)),
        ("flow_sde", 0.7, (0.230, 0.248, 0.251, 0.251)),
        ("cps", 0.8, (0.124, 0.151, 0.159, 0.162)),
        ("cps", 0.5, (0.160, 0.199, 0.208, 0.212)),
    ],
)
def test_final_variance_has_the_published_bias(dynamics: str, eta: float, variances: tuple[float, ...]) -> None:
    """True variance 0.25. Flow-SDE approaches it as the ODE does; CPS is biased for any number of steps."""
    for steps, expected in zip((10, 50, 200, 800), variances, strict=True):
        schedule = tuple(np.linspace(1, 0, steps + 1, dtype=np.float32).tolist())
        assert propagate(schedule, dynamics, eta)[1] == pytest.approx(expected, abs=1.1e-3)


def integrate(schedule: tuple[float, ...], outside: str) -> float:
    """Where x = 2 goes, in float64: an error that rounding does not hide."""
    x = torch.tensor([[[2.0]]], dtype=torch.float64)
    plan = Plan(sigmas=schedule, outside=outside)
    return float(sampling.deterministic(x, velocity, plan, range(plan.steps)))


@pytest.mark.parametrize(("outside", "order"), [("euler", 1), ("heun", 2)])
def test_error_of_the_deterministic_samplers_falls_with_their_order(outside: str, order: int) -> None:
    # the flow carries quantiles: at sigma the mean is (1-sigma) m and the variance V(sigma); it stops short of the end
    def exact(sigma: float) -> float:
        return (1 - sigma) * M + 2.0 * math.sqrt((1 - sigma) ** 2 * S2 + sigma**2)

    errors = []
    for steps in (16, 32, 64):
        schedule = tuple(np.linspace(1, 0.2, steps + 1).tolist())
        errors.append(abs(integrate(schedule, outside) - exact(0.2)))
    for coarse, fine in itertools.pairwise(errors):
        assert coarse / fine == pytest.approx(2**order, rel=0.15)


def test_heun_takes_eulers_step_to_zero() -> None:
    calls = []

    def counted(x: torch.Tensor, sigma: float) -> torch.Tensor:
        calls.append(sigma)
        return velocity(x, sigma)

    x = draw(1, 2, 64)
    result = sampling.heun_step(x, counted, UNIFORM, 9)
    assert calls == [UNIFORM[9]]
    assert torch.equal(result, sampling.euler_step(x, velocity(x, UNIFORM[9]), UNIFORM, 9))


# ---- plans


@pytest.mark.parametrize("outside", ["heun", "euler"])
@pytest.mark.parametrize(("start", "size"), [(0, 0), (0, 4), (3, 2), (5, 4)])
def test_nfe_counts_the_model_calls(outside: str, start: int, size: int) -> None:
    calls = 0

    def counted(x: torch.Tensor, sigma: float) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return velocity(x, sigma)

    plan = Plan(LAYERED, start, size, "flow_sde" if size else "ode", (0.7,) * size, outside)
    x = sampling.deterministic(draw(1, 2, 64), counted, plan, range(start))
    latents, velocities = sampling.window_latents(x, counted, plan, lambda j: draw(1, 2, 64, seed=j))
    assert latents.shape == (1, size + 1, 2, 64) and velocities.shape == (1, size, 2, 64)
    before = calls
    sampling.deterministic(latents[:, -1], counted, plan, range(plan.window.stop, plan.steps))
    assert plan.nfe(1) == calls and plan.nfe(8) == 8 * calls
    prefix = before - size
    shared = Plan(LAYERED, start, size, plan.dynamics, plan.etas, outside, share_prefix=True)
    assert shared.nfe(8) == prefix + 8 * (calls - prefix)


def test_a_window_over_the_last_step_is_refused() -> None:
    with pytest.raises(ValueError, match="last step is never stochastic"):
        Plan(LAYERED, 7, 3, "flow_sde", (0.7,) * 3)
    with pytest.raises(ValueError, match="etas"):
        Plan(LAYERED, 0, 3, "flow_sde", (0.7,) * 2)


@pytest.mark.parametrize(("count", "batch_size"), [(8, 8), (8, 3), (7, 2), (1, 4), (20, 8)])
def test_microbatches_are_few_and_even(count: int, batch_size: int) -> None:
    batches = sampling.microbatches(count, batch_size)
    assert [i for batch in batches for i in batch] == list(range(count))
    assert len(batches) == -(-count // batch_size)
    assert max(map(len, batches)) <= batch_size and max(map(len, batches)) - min(map(len, batches)) <= 1


# ---- batches


@pytest.mark.parametrize("tokens", [1, 5, 12, 40])
def test_every_matrix_product_of_a_rollout_has_rows_enough_that_batch_sizes_do_not_show(
    frozen_policy: LayeredPolicy, condition: Condition, tokens: int
) -> None:
    """Rows that go through each linear layer, and what they are for: with one row, or 15, MKL sums in another order.

    The layers of the time embedding and the modulations see one row, whatever the batch size."""
    short = dataclasses.replace(condition, prompt_embeds=condition.prompt_embeds[:, :1].expand(-1, tokens, -1))
    noise = torch.cat([frozen_policy.noise(seed, 1, 64, 64) for seed in range(5)])
    plan = Plan(frozen_policy.sigmas(2, 64, 64), outside="euler")
    rows: dict[int, set[int]] = {size: set() for size in (1, 2, 5)}
    finals = {}
    for size, seen in rows.items():
        with contextlib.ExitStack() as hooks:
            for module in frozen_policy.transformer.modules():
                if isinstance(module, torch.nn.Linear):
                    count = module.register_forward_pre_hook(
                        lambda module, args, seen=seen: seen.add(args[0].shape[:-1].numel())
                    )
                    hooks.callback(count.remove)
            finals[size] = sampling.rollout(frozen_policy, short, noise, plan, batch_size=size).final
    for size, seen in rows.items():
        assert min(seen - {1}) >= 16, f"batches of {size}: {sorted(seen)}"
        assert 1 in seen, "the time is embedded once for a batch"
        assert tokens * size in seen or tokens * size < 16, "no more rows than are needed"
        assert torch.equal(finals[size], finals[5]), size
