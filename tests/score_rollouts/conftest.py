"""A campaign with real rollout shards, made of generated designs and ways of spoiling them. No torch."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from layerloop.components.layers.designs import render_sketches
from layerloop.components.layers.stack import composite
from layerloop.components.schema.recipe import Recipe
from layerloop.components.schema.runtime import split_runtime
from layerloop.components.storage.campaign import Campaign

from ..campaigns import CampaignBuilder, drawn_group, lay_out_by_worker
from ..judge_server import start_in_thread

Stack = np.ndarray
SIZE = 32


def spoiled(stack: Stack, amount: float) -> Stack:
    """The stack with its upper layers faded and its background un-inpainted by `amount` in [0, 1]."""
    out = stack.copy()
    whole = composite(stack)[..., :3].astype(np.float32)
    out[0, ..., :3] = np.rint(stack[0, ..., :3] + (whole - stack[0, ..., :3]) * amount)
    out[1:, ..., 3] = np.rint(stack[1:, ..., 3] * (1 - 0.5 * amount))
    return out


@pytest.fixture(scope="session")
def judge_url() -> Iterator[str]:
    with start_in_thread() as url:
        yield url


@pytest.fixture
def make_campaign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Campaign]:
    """`make_campaign(groups=2, size=4, workers=0, **judge)`: iteration 1 has its rollouts; candidate i of a group of G
    is spoiled by i / (G - 1), so candidate 0 is the truth. With `workers` they lie as earlier versions wrote them. The
    runtime's part of `judge` is put in the environment."""

    def make(*, groups: int = 2, size: int = 4, workers: int = 0, side: int = SIZE, **judge: Any) -> Campaign:
        values, runtime = split_runtime(
            {
                "name": "test",
                "rollout": {"groups": groups, "group_size": size},
                "judge": {"resolution": 32, "backdrops": ["white", "black"], "phase2": {"resolution": 32}} | judge,
            }
        )
        recipe = Recipe.model_validate(values)
        monkeypatch.setenv("LAYERLOOP_RUNTIME", json.dumps(runtime))
        campaign = Campaign.create_or_open(str(tmp_path / "campaign"), recipe)
        drawn = []
        for group in range(groups):
            truth = render_sketches(
                np.random.default_rng(group), count=1, layers=2 + group % 3, size=(side, side), photo_share=0.0
            )[0]
            stacks = np.stack([spoiled(truth, index / (size - 1)) for index in range(size)])
            drawn.append(drawn_group(group, stacks, composite(truth)))
        CampaignBuilder(campaign).put(drawn)
        if workers:
            lay_out_by_worker(campaign, 1, workers=workers)
        return campaign

    return make
