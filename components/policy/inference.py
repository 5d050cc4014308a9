"""Decompositions at inference: images and a prompt in, layers out. What evaluations measure and what users get."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from layerloop.components.policy.model import LayeredPolicy
from layerloop.components.policy.sampling import Plan, Velocity, deterministic, padded_rows
from layerloop.components.schema.inference import Inference as Inference  # model cards import it from here


@torch.no_grad()
def sample_layers(
    policy: LayeredPolicy,
    images: np.ndarray,
    prompt: torch.Tensor,
    *,
    seeds: Sequence[int],
    layers: int,
    how: Inference,
    blank_prompt: torch.Tensor | None = None,
) -> list[np.ndarray[Any, np.dtype[np.uint8]] | None]:
    """Layers `(L, H, W, 4)` uint8, straight RGBA, bottom first, of each image; None where they are not finite.

    In float32 on a CPU an image's layers do not depend on which others are in the batch (`sampling.padded_rows`).

    Args:
        images: `(B, H, W, 3)` uint8 of one size, sides multiples of `policy.pixel_multiple`; opaque.
        prompt: `(T, E)`, the prompt's embedding.
        seeds: of each image's initial noise.
        blank_prompt: `(T', E)`, embedding of the prompt " "; needed with guidance, v = n + w (c - n) as in diffusers'
            pipeline, where c is the velocity with the prompt and n with the blank one.
    """
    height, width = images.shape[1:3]
    if how.guidance != 1 and blank_prompt is None:
        raise ValueError(f"guidance of {how.guidance:g} needs the blank prompt's embedding")
    condition = policy.encode(images, prompt)
    blank = None if blank_prompt is None else blank_prompt[None].to(policy.device, policy.dtype)
    texts = [condition.prompt_embeds] if how.guidance == 1 or blank is None else [condition.prompt_embeds, blank]
    shortest = dataclasses.replace(condition, prompt_embeds=min(texts, key=lambda text: text.shape[1]))
    rows = padded_rows(range(len(images)), policy, shortest)
    velocities: list[Velocity] = [
        functools.partial(
            policy.velocity,
            condition=dataclasses.replace(condition, latents=condition.latents[rows], prompt_embeds=text),
        )
        for text in texts
    ]
    velocity = velocities[0] if len(texts) == 1 else guided(velocities[0], velocities[1], how.guidance)
    noise = torch.cat([policy.noise(seed, layers, height, width) for seed in seeds])[rows].to(policy.device)
    plan = Plan(sigmas=policy.sigmas(how.steps, height, width), outside=how.sampler)
    final = deterministic(noise, velocity, plan, range(plan.steps))[: len(images)]
    found: list[np.ndarray[Any, np.dtype[np.uint8]] | None] = []
    for latents in final.split(1):
        decoded = policy.decode(latents, height, width)[0]
        if torch.isfinite(latents).all() and torch.isfinite(decoded).all():
            found.append((decoded * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu().numpy())
        else:
            found.append(None)
    return found


def guided(conditional: Velocity, blank: Velocity, weight: float) -> Velocity:
    """Classifier-free guidance (Ho and Salimans 2022): v = n + w (c - n)."""

    def velocity(x: torch.Tensor, sigma: float) -> torch.Tensor:
        n = blank(x, sigma)
        return n + weight * (conditional(x, sigma) - n)

    return velocity
