"""Fifty small updates of an algorithm on a tiny policy: rollouts, advantages, update and averages, without a
campaign's files. The reward is a smooth function of the final latents, so that rounding moves it by rounding."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

from layerloop.components.policy.lora import new_adapter, put_adapter
from layerloop.components.policy.model import LayeredPolicy
from layerloop.components.schema.judging import ScoreRow
from layerloop.components.schema.learning import ALGORITHMS, LearnerState
from layerloop.components.schema.recipe import Recipe
from layerloop.components.storage.groups import SampledGroup
from layerloop.components.update_lora.advantages import advantages_of
from layerloop.components.update_lora.algorithm import timesteps_of
from layerloop.components.update_lora.learner import learn
from layerloop.components.update_lora.plan import plan_steps
from layerloop.components.update_lora.state import TrainingState
from layerloop.components.update_lora.trajectories import Trajectories, Trajectory

from ..campaigns import prompt_embeds, sample_groups

UPDATES = 50
RECIPE: dict[str, Any] = {
    "name": "curves",
    "seed": 11,
    "rollout": {
        "groups": 2, "group_size": 4, "min_layers": 1, "max_layers": 2, "steps": 3, "outside": "euler",
        "whole": "euler", "window": {"size": 2, "start": 0}, "noise": {"eta": 0.7},
    },
    "lora": {"rank": 2, "alpha": 2.0},
}  # fmt: skip
# Each with every term of its loss: the KL, for GRPO a clip that later steps reach, for NFT a sampler of its own.
UPDATE: dict[str, dict[str, Any]] = {
    "grpo": {"learning_rate": 1e-2, "steps": 2, "kl": 1e-3, "ema": 0.9},
    "nft": {"algorithm": "nft", "learning_rate": 1e-2, "steps": 2, "kl": 1e-3,
            "nft": {"timesteps": 2, "old_decay": 0.3}},
}  # fmt: skip


def curve_of(algorithm: str, base: Path, *, microbatch: int = 8) -> list[dict[str, float]]:
    """What each update measured, and two sums over the adapter that it left."""
    model = {"base": str(base), "dtype": "float32"}
    recipe = Recipe.model_validate({**RECIPE, "model": model, "update": UPDATE[algorithm]})
    policy = LayeredPolicy.load(recipe.model)
    put_adapter(policy.transformer, new_adapter(policy.transformer, recipe.lora, seed=recipe.seed))
    begin = LearnerState(iteration=1, algorithm=algorithm, optimizer_steps=0, ema_steps=0)
    state = TrainingState(policy, recipe.update, begin)
    return [_updated(policy, state, recipe, number, microbatch) for number in range(1, UPDATES + 1)]


def _updated(
    policy: LayeredPolicy, state: TrainingState, recipe: Recipe, number: int, microbatch: int
) -> dict[str, float]:
    with state.sampler_weights():
        groups = sample_groups(policy, recipe, number, None)
    rows = [row for group in groups for row in _scored(group)]
    advantages = advantages_of(rows, recipe.update)
    steps = plan_steps(
        advantages.groups, steps=recipe.update.steps, timesteps=timesteps_of(recipe), microbatch=microbatch, ranks=1,
        pad=False,
    )  # fmt: skip
    trajectories = {group.record.group: _trajectories(group, recipe) for group in groups}
    done = learn(policy, state, steps, trajectories, prompt_embeds(), recipe, iteration=number)
    averages = state.ema or state.sampling or {}
    return {
        "reward": advantages.reward_mean,
        "loss": done.summary()["loss"],
        "gradient_norm": max(done.gradient_norms),
        "adapter": _checksum(state.parameters),
        "average": _checksum(averages),
    }


def _scored(group: SampledGroup) -> list[ScoreRow]:
    """Rewards that ask for latents near 0."""
    record = group.record
    return [
        ScoreRow.model_construct(
            iteration=record.iteration, group=record.group, candidate=candidate, image_key=record.image_key,
            layers=record.layers, reward=-float(np.abs(final).mean()),
        )
        for candidate, final in enumerate(group.final.astype(np.float64))
    ]  # fmt: skip


def _trajectories(group: SampledGroup, recipe: Recipe) -> Trajectories:
    windowed = ALGORITHMS[recipe.update.algorithm].samples_from == "window"
    latents = torch.from_numpy(group.window if windowed else group.final)
    candidates = {c: Trajectory(seed, latents[c]) for c, seed in enumerate(group.seeds)}
    return Trajectories(group.record, torch.from_numpy(group.condition), candidates)


def _checksum(weights: Any) -> float:
    """Their sum under a fixed sign for each place: it moves where any one of them does."""
    total = 0.0
    for index, key in enumerate(sorted(weights)):
        values = weights[key].detach().double().flatten()
        total += float((values * torch.cos(torch.arange(len(values), dtype=torch.float64) + index)).sum())
    assert math.isfinite(total)
    return total
