"""Samplers of the flow-matching policy, as pure float32 functions.

Convention (flow_grpo, diffusers): x_sigma = (1-sigma) x0 + sigma eps and v = eps - x0, with sigma going from 1
(noise) to 0 (data) along `sigmas`, T+1 float32 values of which the last is 0; dt = sigmas[i+1] - sigmas[i] < 0. A
step goes from index i to i+1. Schedules are tuples of Python floats that are exactly float32 values, so a rollout and
its replay, however far apart, compute with the same bits.

Every stochastic step here is affine in x and v,

    mean = a x + b v,      x' = mean + s z,      z ~ N(0, 1),

with scalars a, b, s computed once in double precision (`coefficients`) and rounded to float32 once, when they meet a
tensor.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence

import torch

from layerloop.components.policy.model import Condition, LayeredPolicy
from layerloop.components.schema.trajectory import GroupRecord, model_calls

Velocity = Callable[[torch.Tensor, float], torch.Tensor]  # (x[B, S, 64], sigma) -> v[B, S, 64]
StepNoise = Callable[[int, int], torch.Tensor]  # (candidate, window step) -> z[1, S, 64]


# ---- steps


def euler_step(x: torch.Tensor, v: torch.Tensor, sigmas: Sequence[float], i: int) -> torch.Tensor:
    """x' = x + (sigma' - sigma) v: diffusers' `FlowMatchEulerDiscreteScheduler.step`, the same bits."""
    return x + (sigmas[i + 1] - sigmas[i]) * v


def heun_step(x: torch.Tensor, velocity: Velocity, sigmas: Sequence[float], i: int) -> torch.Tensor:
    """Heun's second-order step: x' = x + dt (v(x, sigma) + v(x + dt v(x, sigma), sigma')) / 2; two model calls.

    The last step is Euler's and one call: no model is trained at sigma = 0 (Karras et al. 2022, algorithm 1, line 6).
    """
    v = velocity(x, sigmas[i])
    ahead = euler_step(x, v, sigmas, i)
    if sigmas[i + 1] == 0:
        return ahead
    v = 0.5 * (v + velocity(ahead, sigmas[i + 1]))
    return euler_step(x, v, sigmas, i)


def flow_sde_coefficients(sigmas: Sequence[float], i: int, eta: float) -> tuple[float, float, float]:
    """(a, b, s) of Flow-SDE (Flow-GRPO, arXiv 2505.05470; flow_grpo's `sde_step_with_logprob`):

        std = eta sqrt(sigma / (1 - sigma))           first step: sigmas[1] in 1 - sigma, which is 0 there
        a = 1 + std^2 dt / (2 sigma)
        b = (1 + std^2 (1 - sigma) / (2 sigma)) dt    (1 + eta^2 / 2) dt for sigma < 1
        s = std sqrt(-dt)

    The last step (sigma' = 0) is Euler's, without noise: its density is too sharp to learn from.
    """
    sigma, ahead = sigmas[i], sigmas[i + 1]
    dt = ahead - sigma
    if ahead == 0:
        return 1.0, dt, 0.0
    variance = eta * eta * sigma / (1 - (sigmas[1] if sigma == 1 else sigma))
    a = 1 + variance / (2 * sigma) * dt
    b = (1 + variance * (1 - sigma) / (2 * sigma)) * dt
    return a, b, math.sqrt(variance * -dt)


def cps_coefficients(sigmas: Sequence[float], i: int, eta: float) -> tuple[float, float, float]:
    """(a, b, s) of coefficients-preserving sampling (Flow-CPS, arXiv 2509.05952; flow_grpo's `cps`):

        s = sigma' sin(eta pi/2)         k = sqrt(sigma'^2 - s^2) = sigma' |cos(eta pi/2)|
        mean = (1 - sigma') x0 + k x1,   x0 = x - sigma v,   x1 = x + (1 - sigma) v

    so a = 1 - sigma' + k and b = k (1 - sigma) - (1 - sigma') sigma. The last step is Euler's by itself.
    """
    sigma, ahead = sigmas[i], sigmas[i + 1]
    s, k = ahead * math.sin(eta * math.pi / 2), ahead * abs(math.cos(eta * math.pi / 2))
    return 1 - ahead + k, k * (1 - sigma) - (1 - ahead) * sigma, abs(s)


COEFFICIENTS = {"flow_sde": flow_sde_coefficients, "cps": cps_coefficients}


def step_mean(x: torch.Tensor, v: torch.Tensor, a: float | torch.Tensor, b: float | torch.Tensor) -> torch.Tensor:
    """mean `[B, S, 64]` = a x + b v of a step, differentiable in v: the rollout's arithmetic and the learner's.

    `a` and `b` are numbers, or float32 tensors `[B, 1, 1]`; the bits are the same.
    """
    return a * x + b * v


def stochastic_step(
    x: torch.Tensor, v: torch.Tensor, z: torch.Tensor, sigmas: Sequence[float], i: int, eta: float, dynamics: str
) -> torch.Tensor:
    """x' `[B, S, 64]` after one step of `dynamics` with noise z ~ N(0, 1) of x's shape."""
    a, b, s = COEFFICIENTS[dynamics](sigmas, i, eta)
    return step_mean(x, v, a, b) + s * z


# ---- trajectories


@dataclasses.dataclass(frozen=True)
class Plan:
    """Sampling plan of one group, as a `GroupRecord` stores it. `etas` has one noise level per window step."""

    sigmas: tuple[float, ...]
    window_start: int = 0
    window_size: int = 0
    dynamics: str = "ode"
    etas: tuple[float, ...] = ()
    outside: str = "heun"
    share_prefix: bool = False

    def __post_init__(self) -> None:
        if len(self.etas) != self.window_size or (self.window_size and self.dynamics not in COEFFICIENTS):
            raise ValueError(f"a window of {self.window_size} steps needs dynamics and {self.window_size} etas: {self}")
        if self.window_size and self.window_start + self.window_size > self.steps - 1:
            raise ValueError(f"the window ends after step {self.steps - 2}: the last step is never stochastic")

    @property
    def steps(self) -> int:
        """Number of sampling steps, T."""
        return len(self.sigmas) - 1

    @property
    def window(self) -> range:
        """Indices of the stochastic steps."""
        return range(self.window_start, self.window_start + self.window_size)

    def nfe(self, candidates: int) -> int:
        """Model calls for single samples that `candidates` take."""
        return model_calls(
            steps=self.steps, start=self.window_start, window=self.window_size,
            second_order=self.outside == "heun", share_prefix=self.share_prefix, candidates=candidates,
        )  # fmt: skip

    @classmethod
    def of(cls, record: GroupRecord) -> Plan:
        """The plan that a group was sampled with."""
        return cls(**{field.name: getattr(record, field.name) for field in dataclasses.fields(cls)})


@dataclasses.dataclass(frozen=True)
class Trajectory:
    """`window[G, w+1, S, 64]`: the latents before each window step and after its last (empty `[G, 0, S, 64]` without a
    window); `velocities[G, w, S, 64]`: the model's in those steps; `final[G, S, 64]`; all float32. `rows[G]` int32:
    rows of the forward passes that a candidate was in. `nfe`: model calls for single samples, `Plan.nfe`."""

    window: torch.Tensor
    velocities: torch.Tensor
    rows: torch.Tensor
    final: torch.Tensor
    nfe: int


def deterministic(x: torch.Tensor, velocity: Velocity, plan: Plan, steps: range) -> torch.Tensor:
    """`x[B, S, 64]` after `steps` of the plan's deterministic sampler, Heun or Euler."""
    for i in steps:
        if plan.outside == "heun":
            x = heun_step(x, velocity, plan.sigmas, i)
        else:
            x = euler_step(x, velocity(x, plan.sigmas[i]), plan.sigmas, i)
    return x


def window_latents(
    x: torch.Tensor, velocity: Velocity, plan: Plan, noise: Callable[[int], torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """`x[B, S, 64]` at the window's start -> latents `[B, w+1, S, 64]` and velocities `[B, w, S, 64]`; `noise(j)` is z
    of the window's step j."""
    latents, velocities = [x], [x[:, None][:, :0]]
    for j, i in enumerate(plan.window):
        v = velocity(latents[-1], plan.sigmas[i])
        latents.append(stochastic_step(latents[-1], v, noise(j), plan.sigmas, i, plan.etas[j], plan.dynamics))
        velocities.append(v[:, None])
    return torch.stack(latents, dim=1), torch.cat(velocities, dim=1)


def microbatches(count: int, batch_size: int) -> list[range]:
    """`count` candidates in the fewest batches of at most `batch_size`, as even as possible."""
    parts = -(-count // batch_size)
    edges = [count * part // parts for part in range(parts + 1)]
    return [range(a, b) for a, b in itertools.pairwise(edges)]


@torch.no_grad()
def rollout(
    policy: LayeredPolicy,
    condition: Condition,
    noise: torch.Tensor,
    plan: Plan,
    *,
    step_noise: StepNoise | None = None,
    candidates: int | None = None,
    batch_size: int = 8,
) -> Trajectory:
    """Sample candidates: deterministic, then the stochastic window, then deterministic again.

    Args:
        condition: of the one image of all candidates, or of one image per candidate.
        noise: initial noise, `(G, S, 64)`, or `(1, S, 64)` for a plan that shares it and the prefix.
        plan: schedule, window and dynamics, the same for all candidates of a group.
        step_noise: (candidate, window step) -> z `(1, S, 64)` float32; needed where there is a window.
        candidates: G, where `noise` is shared.
        batch_size: candidates in one forward pass. In float32 on a CPU the result does not depend on it (see
            `padded_rows`).

    Returns:
        Trajectory of G candidates, on the policy's device.
    """
    count = noise.shape[0] if candidates is None else candidates
    if noise.shape[0] not in ((1, count) if plan.share_prefix else (count,)):
        raise ValueError(f"{noise.shape[0]} initial noises for {count} candidates")
    if plan.window_size and step_noise is None:
        raise ValueError("a plan with a window needs step noise")
    if plan.share_prefix and condition.latents.shape[0] > 1:
        raise ValueError("only candidates of one image share a prefix")
    device = policy.device
    start = noise.to(device, torch.float32)
    if plan.share_prefix:
        start = deterministic(start[:1], _velocity(policy, condition, [0]), plan, range(plan.window_start))
        start = start.expand(count, -1, -1)
    windows, velocities, sizes, finals = [], [], [], []
    for batch in microbatches(count, batch_size):
        rows = padded_rows(batch, policy, condition)
        velocity = _velocity(policy, condition, rows)
        x = start[rows]
        if not plan.share_prefix:
            x = deterministic(x, velocity, plan, range(plan.window_start))

        def noise_of_step(j: int, rows: list[int] = rows) -> torch.Tensor:
            assert step_noise is not None
            return torch.cat([step_noise(row, j) for row in rows]).to(device, torch.float32)

        latents, of_steps = window_latents(x, velocity, plan, noise_of_step)
        final = deterministic(latents[:, -1], velocity, plan, range(plan.window.stop, plan.steps))
        windows.append(latents[: len(batch)] if plan.window_size else latents[: len(batch), :0])
        velocities.append(of_steps[: len(batch)])
        sizes.append(torch.full((len(batch),), len(rows), dtype=torch.int32))
        finals.append(final[: len(batch)])
    return Trajectory(
        torch.cat(windows), torch.cat(velocities), torch.cat(sizes), torch.cat(finals), nfe=plan.nfe(count)
    )


def _velocity(policy: LayeredPolicy, condition: Condition, rows: list[int]) -> Velocity:
    """The policy's velocity for these candidates."""
    if condition.latents.shape[0] > 1:
        condition = dataclasses.replace(condition, latents=condition.latents[rows])
    return lambda x, sigma: policy.velocity(x, sigma, condition)


# Float32 matrix products of fewer rows than this use other kernels of MKL, whose sums are ordered differently.
STEADY_ROWS = 16


def padded_rows(batch: range, policy: LayeredPolicy, condition: Condition) -> list[int]:
    """The candidates of a forward pass, the last repeated until every matrix product in it has `STEADY_ROWS` rows.

    From there on a row of a float32 product does not depend on how many rows there are, and so a candidate's result
    does not depend on the batch size. Measured with MKL 2024.2 (AVX-512) on 130 shapes of 16 to 3072 inputs: one row
    differs from the same row among 96 in all of them, 7 rows in 70, 15 rows in 50, 16 and more in none with one thread.
    With 2 to 8 threads shapes of 384 inputs and more may differ up to 64 rows; none of the tiny policy's does. The
    smallest products are those of the text, T rows per candidate, so at most a second copy is added for a prompt of 8
    tokens or more. On a GPU, or in bfloat16 (where even 60 rows may differ from 96), kernels are chosen by shape and no
    such promise is made: there results are the same for any number of workers, but agree between batch sizes to
    rounding.
    """
    rows = list(batch)
    if policy.device.type == "cpu" and policy.dtype == torch.float32:
        needed = -(-STEADY_ROWS // condition.prompt_embeds.shape[1])
        rows += rows[-1:] * (needed - len(rows))
    return rows
