"""The learner against the sampler: a stored step has the mean that it was sampled with, to the bit."""

from __future__ import annotations

import pytest
import torch

from layerloop.components.policy.model import Condition, LayeredPolicy
from layerloop.components.policy.sampling import Plan, rollout
from layerloop.components.policy.tiny import build_tiny_pipeline
from layerloop.components.schema.recipe import Recipe
from layerloop.components.schema.trajectory import GroupRecord
from layerloop.components.update_lora.grpo import surrogate_batch
from layerloop.components.update_lora.plan import Microbatch, Point
from layerloop.components.update_lora.trajectories import Trajectories, Trajectory

G, SIDE = 3, 32  # candidates; pixels: 2 x 2 tokens a frame


@pytest.mark.parametrize("dynamics", ["flow_sde", "cps"])
def test_the_update_replays_a_stored_step_with_the_bits_of_the_rollout(dynamics: str) -> None:
    """The mean that the learner computes plus the noise that the sampler drew is the stored latent."""
    pipeline = build_tiny_pipeline(vae_dim=8, blocks=2, heads=1, head_dim=16)
    policy = LayeredPolicy(transformer=pipeline.transformer, vae=pipeline.vae, scheduler=pipeline.scheduler)
    prompt = torch.randn(7, 16, generator=torch.Generator().manual_seed(5))
    condition = Condition(torch.ones(1, 4, 64), prompt[None], SIDE, SIDE)
    record = GroupRecord(
        iteration=1, group=0, image_key="image", layers=2, group_size=G, height=SIDE, width=SIDE, latent_height=2,
        latent_width=2, sigmas=policy.sigmas(5, SIDE, SIDE), window_start=1, window_size=3, dynamics=dynamics,
        etas=(0.9, 0.7, 0.5), share_prefix=False, outside="euler", base_fingerprint="0" * 64, adapter_sha256=None,
    )  # fmt: skip
    noise = torch.cat([policy.noise(seed, 2, SIDE, SIDE) for seed in range(G)])

    def step_noise(candidate: int, step: int) -> torch.Tensor:
        return policy.noise(100 + 10 * candidate + step, 2, SIDE, SIDE)

    window = rollout(policy, condition, noise, Plan.of(record), step_noise=step_noise).window
    group = Trajectories(record, condition.latents[0], {c: Trajectory(c, window[c]) for c in range(G)})
    for j in range(3):  # a step of all candidates, as the rollout took it, so that the velocities have its bits
        points = tuple(Point(c, j, 1.0, 1.0) for c in range(G))
        batch = surrogate_batch(Microbatch(0, 2, points), group, prompt, Recipe(name="replay"))
        with torch.no_grad():
            velocity = policy.velocity(batch.latents, record.sigmas[1 + j], batch.condition)
        z = torch.cat([step_noise(c, j) for c in range(G)])
        assert torch.equal(batch.mean(velocity) + batch.s.view(-1, 1, 1) * z, batch.target)
        assert torch.equal(batch.target, window[:, j + 1])
        assert torch.equal(batch.sigma, torch.full((G,), record.sigmas[1 + j]))
