"""What sharing a prefix saves, what recording costs, what folding convolutions saves. Ratios in one run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import numpy as np
import pytest
import torch
from safetensors.torch import save

from layerloop.components.policy import sampling
from layerloop.components.policy.autoencoder import FrameDecoder
from layerloop.components.policy.model import Condition, LayeredPolicy
from layerloop.components.policy.sampling import Plan
from layerloop.components.policy.tiny import build_tiny_pipeline

GROUP, STEPS, LAYERS, SIDE = 8, 20, 3, 64


@pytest.fixture(scope="module")
def policy() -> LayeredPolicy:
    """The tiny policy's sizes; speed does not depend on the weights."""
    torch.set_num_threads(1)
    pipeline = build_tiny_pipeline()
    return LayeredPolicy(transformer=pipeline.transformer, vae=pipeline.vae, scheduler=pipeline.scheduler)


@pytest.fixture(scope="module")
def condition(policy: LayeredPolicy) -> Condition:
    image = np.random.default_rng(0).integers(0, 256, (1, SIDE, SIDE, 3), dtype=np.uint8)
    return policy.encode(image, torch.randn(11, 16, generator=torch.Generator().manual_seed(0)))


def ratio(run: Callable[[], object], reference: Callable[[], object], *, repeats: int) -> float:
    """Median over `repeats` of `run`'s time relative to that of `reference` right next to it.

    Times are processor seconds of one thread, and each pair is measured together: what other programs do to the machine
    meets both alike.
    """
    seconds = {run: 0.0, reference: 0.0}
    run(), reference()
    ratios = []
    for repeat in range(repeats):
        for one in (run, reference) if repeat % 2 else (reference, run):
            start = time.process_time()
            one()
            seconds[one] = time.process_time() - start
        ratios.append(seconds[run] / seconds[reference])
    return statistics.median(ratios)


def drawn(policy: LayeredPolicy) -> sampling.StepNoise:
    return lambda candidate, step: policy.noise(1000 * candidate + step, LAYERS, SIDE, SIDE)


def test_shared_prefix_ratio(policy, condition, record_benchmark) -> None:  # type: ignore[no-untyped-def]
    """20 Heun steps, a window of 4 late in the schedule, 8 candidates: the shared prefix against 8 of their own."""
    sigmas, noise = policy.sigmas(STEPS, SIDE, SIDE), drawn(policy)
    late = (STEPS - 5, 4, "flow_sde", (0.7,) * 4)
    start = policy.noise(0, LAYERS, SIDE, SIDE)

    def shared() -> None:
        plan = Plan(sigmas, *late, share_prefix=True)
        sampling.rollout(policy, condition, start, plan, step_noise=noise, candidates=GROUP, batch_size=GROUP)

    def independent() -> None:
        plan = Plan(sigmas, *late)
        sampling.rollout(policy, condition, start.expand(GROUP, -1, -1), plan, step_noise=noise, batch_size=GROUP)

    found = ratio(shared, independent, repeats=5)
    record_benchmark("shared_prefix_ratio", found)
    assert found <= 0.6


def test_trajectory_overhead_fraction(policy, condition, record_benchmark) -> None:  # type: ignore[no-untyped-def]
    """Keeping the window's latents and packing them for a shard, as a share of the sampling that yields them.

    The difference of two samplings with and without would measure the machine: it is a thousandth of either.
    """
    plan = Plan(policy.sigmas(6, SIDE, SIDE), 0, 4, "flow_sde", (0.7,) * 4)
    start = torch.cat([policy.noise(seed, LAYERS, SIDE, SIDE) for seed in range(GROUP)])
    noise = drawn(policy)
    kept = list(sampling.rollout(policy, condition, start, plan, step_noise=noise).window.clone().unbind(1))

    @torch.no_grad()
    def plain() -> None:
        def velocity(x: torch.Tensor, sigma: float) -> torch.Tensor:
            return policy.velocity(x, sigma, condition)

        x = start
        for i in plan.window:
            z = torch.cat([noise(candidate, i) for candidate in range(GROUP)])
            x = sampling.stochastic_step(x, velocity(x, plan.sigmas[i]), z, plan.sigmas, i, 0.7, "flow_sde")
        sampling.deterministic(x, velocity, plan, range(4, 6))

    def record() -> None:
        window = torch.stack(kept, dim=1)
        window = torch.cat([window]).cpu()
        for candidate in window:
            save({"window": candidate.contiguous()})

    overhead = ratio(record, plain, repeats=11)
    record_benchmark("trajectory_overhead_fraction", overhead)
    assert overhead < 0.03


def test_folded_decode_ratio(policy, record_benchmark) -> None:  # type: ignore[no-untyped-def]
    """Layers decoded one frame at a time, convolutions folded, against diffusers' own `decode`."""
    latents = torch.randn(LAYERS, 16, 1, SIDE // 8, SIDE // 8, generator=torch.Generator().manual_seed(0))
    decoder = FrameDecoder(policy.vae)

    @torch.no_grad()
    def unfolded() -> torch.Tensor:
        return torch.cat([policy.vae.decode(frame).sample for frame in latents.split(1)])

    @torch.no_grad()
    def folded() -> torch.Tensor:
        return decoder(latents)

    assert (unfolded() - folded()).abs().max() < 1e-5
    found = ratio(folded, unfolded, repeats=15)
    record_benchmark("folded_decode_ratio", found)
    assert found <= 0.55
