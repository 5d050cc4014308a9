"""Campaigns of a very small random policy, before their first iteration, and a real judge."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from layerloop.components.schema.recipe import Recipe
from layerloop.components.storage.campaign import Campaign

from ..campaigns import SIDE, CampaignBuilder
from ..score_rollouts.judges import meddling_judge

GROUPS, G, ITERATIONS = 4, 4, 2
Begin = Callable[..., Campaign]


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    runtime = {"rollout": {"batch_size": 2}, "update": {"microbatch": 8}, "judge": {"concurrency": 4}}
    monkeypatch.setenv("LAYERLOOP_RUNTIME", json.dumps(runtime))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # of ranks in processes of their own


@pytest.fixture(scope="package")
def judge_url() -> Iterator[str]:
    with meddling_judge() as judge:
        judge.change = _opinionated
        yield judge.url


def _opinionated(body: dict[str, Any], number: int, text: str) -> str:
    """Scores that follow from what is asked: the layers of a random policy are all alike."""
    digest = itertools.cycle(hashlib.sha256(json.dumps(body["messages"], sort_keys=True).encode()).digest())
    return re.sub(r"(?<=: )\d(?:\.\d+)?(?=[,}\s])", lambda _: str(next(digest) % 6), text)


@pytest.fixture(scope="package")
def begin(tiny_base: Path) -> Begin:
    """`begin(folder, rollout={...}, ...)`: a campaign with sources."""

    def make(folder: Path, **sections: Any) -> Campaign:
        rollout = {
            "groups": GROUPS, "group_size": G, "min_layers": 1, "max_layers": 2, "steps": 4, "outside": "euler",
            "window": {"size": 2, "start": 0}, "noise": {"eta": 0.7},
        }  # fmt: skip
        judge = {"model": "layerloop-reference-judge", "resolution": SIDE, "backdrops": ["white", "black"],
                 "phase2": {"resolution": SIDE}, "canaries": False}  # fmt: skip
        recipe = {
            "name": "stretch", "model": {"base": str(tiny_base), "dtype": "float32"}, "lora": {"rank": 2, "alpha": 2.0},
            "update": {"learning_rate": 1e-2, "steps": 2, "ema": 0.9},
            **sections, "rollout": rollout | sections.get("rollout", {}), "judge": judge | sections.get("judge", {}),
        }  # fmt: skip
        campaign = Campaign.create_or_open(str(folder), Recipe.model_validate(recipe))
        draw = np.random.default_rng(0)
        images = [draw.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8) for _ in range(6)]
        CampaignBuilder(campaign).sources(train=images)
        return campaign

    return make
