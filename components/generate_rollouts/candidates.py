"""Sampling of a group: from an image to its candidates."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from layerloop.components.generate_rollouts.plan import GroupPlan, initial_seed, step_seed
from layerloop.components.generate_rollouts.sharing import Part
from layerloop.components.layers.flags import flags_of
from layerloop.components.policy.at import LoadedPolicy
from layerloop.components.policy.model import Condition, LayeredPolicy
from layerloop.components.policy.sampling import Plan, Trajectory, rollout
from layerloop.components.schema.errors import LayerloopError
from layerloop.components.schema.recipe import Recipe
from layerloop.components.schema.trajectory import GroupRecord
from layerloop.components.storage.groups import SampledGroup


@dataclass(frozen=True)
class PreparedGroup:
    """A group before it is sampled: its record, its image `(H, W, 4)` uint8, opaque, and the policy's condition."""

    record: GroupRecord
    image: np.ndarray
    condition: Condition


def prepare_group(
    loaded: LoadedPolicy, recipe: Recipe, iteration: int, plan: GroupPlan, image_key: str, image: np.ndarray
) -> PreparedGroup:
    """A planned group for `image` `(H, W, 3 or 4)` uint8.

    Raises:
        LayerloopError: sides that the model does not take.
    """
    record = group_record(loaded, recipe, iteration, plan, image_key, image.shape[:2])
    image = opaque(image)
    return PreparedGroup(record, image, loaded.policy.encode(image[None], loaded.prompt))


def sample_candidates(
    policy: LayeredPolicy, recipe: Recipe, group: PreparedGroup, candidates: range, *, batch_size: int
) -> Part:
    """Sample and decode some candidates of a group.

    Raises:
        LayerloopError: latents that are NaN or infinite.
    """
    record = group.record
    seeds = initial_seeds(recipe.seed, record)[candidates.start : candidates.stop]
    trajectory = rollout(
        policy,
        group.condition,
        torch.cat([policy.noise(s, record.layers, record.height, record.width) for s in dict.fromkeys(seeds)]),
        Plan.of(record),
        step_noise=lambda row, step: step_noise(policy, recipe.seed, record, candidates[row], step),
        candidates=len(candidates),
        batch_size=batch_size,
    )
    check_finite(trajectory, record, candidates)
    kept = slice(None) if recipe.rollout.keep_velocities else slice(0)
    return Part(
        window=trajectory.window.cpu().numpy(),
        velocities=trajectory.velocities[:, kept].cpu().numpy(),
        rows=trajectory.rows.numpy(),
        final=trajectory.final.cpu().numpy(),
        stacks=np.concatenate(
            [policy.layers_uint8(one, record.height, record.width) for one in trajectory.final.split(1)]
        ),
    )


def sampled_group(recipe: Recipe, group: PreparedGroup, part: Part) -> SampledGroup:
    """A group with all its candidates."""
    return SampledGroup(
        record=group.record,
        image=group.image,
        condition=group.condition.latents[0].cpu().numpy(),
        seeds=initial_seeds(recipe.seed, group.record),
        window=part.window,
        velocities=part.velocities,
        rows=part.rows,
        final=part.final,
        stacks=part.stacks,
    )


def group_record(
    loaded: LoadedPolicy, recipe: Recipe, iteration: int, plan: GroupPlan, image_key: str, size: tuple[int, int]
) -> GroupRecord:
    """The record of a planned group, for an image of `size` (H, W).

    Raises:
        LayerloopError: sides that the model does not take.
    """
    height, width = size
    h, w = loaded.policy.tokens(height, width)
    return GroupRecord(
        iteration=iteration,
        group=plan.group,
        image_key=image_key,
        layers=plan.layers,
        group_size=recipe.rollout.group_size,
        height=height,
        width=width,
        latent_height=h,
        latent_width=w,
        sigmas=loaded.policy.sigmas(recipe.rollout.steps, height, width),
        window_start=plan.window_start,
        window_size=plan.window_size,
        dynamics=plan.dynamics,
        etas=plan.etas,
        share_prefix=recipe.rollout.share_prefix and plan.window_size > 0,
        outside=recipe.rollout.whole if plan.dynamics == "ode" else recipe.rollout.outside,
        base_fingerprint=loaded.base_fingerprint,
        adapter_sha256=loaded.adapter_sha256,
    )


def mean_bad_layers(stacks: np.ndarray, image: np.ndarray) -> float:
    """Bad layers in one of `stacks[G, L, H, W, 4]` uint8, decompositions of `image`, on average."""
    return float(np.mean([flags_of(stack, image).bad.sum() for stack in stacks]))


def opaque(image: np.ndarray) -> np.ndarray:
    """`(H, W, 4)` of an RGB image; RGBA stays as it is."""
    if image.shape[-1] == 4:
        return image
    return np.concatenate([image, np.full_like(image[..., :1], 255)], axis=-1)


def initial_seeds(seed: int, record: GroupRecord) -> list[int]:
    """Seeds of the candidates' initial noise: one each, or candidate 0's for all where the group shares its prefix."""
    return [
        initial_seed(seed, record.iteration, record.image_key, record.group, 0 if record.share_prefix else candidate)
        for candidate in range(record.group_size)
    ]


def step_noise(policy: LayeredPolicy, seed: int, record: GroupRecord, candidate: int, step: int) -> torch.Tensor:
    """z `(1, S, 64)` of one candidate in one window step."""
    drawn = step_seed(seed, record.iteration, record.image_key, record.group, candidate, step)
    return policy.noise(drawn, record.layers, record.height, record.width)


def check_finite(trajectory: Trajectory, record: GroupRecord, candidates: range) -> None:
    """Raises LayerloopError at the first of `candidates`, those of the trajectory, whose latents are not finite."""
    for row, candidate in enumerate(candidates):
        for latents in (trajectory.window[row], trajectory.final[row]):
            if not bool(torch.isfinite(latents).all()):
                raise LayerloopError(
                    f"latents of candidate {candidate} of group {record.group}, iteration {record.iteration}, are NaN "
                    "or infinite: the policy has diverged or recipe.model.dtype overflows, go back to an earlier "
                    "iteration or lower recipe.update.learning_rate"
                )
