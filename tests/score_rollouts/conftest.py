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
from layerloop.components.reference_judge.server import start_in_thread
from layerloop.components.schema.manifest import Manifest
from layerloop.components.schema.recipe import Recipe
from layerloop.components.schema.runtime import split_runtime
from layerloop.components.schema.trajectory import CandidateRecord, GroupRecord, candidate_key, group_key
from layerloop.components.storage.campaign import Campaign
from layerloop.components.storage.images import encode_png
from layerloop.components.storage.manifests import commit
from layerloop.components.storage.shards import write_shard

Stack = np.ndarray
SIZE = 32


def spoiled(stack: Stack, amount: float) -> Stack:
    """The stack with its upper layers faded and its background un-inpainted by `amount` in [0, 1]."""
    out = stack.copy()
    whole = composite(stack)[..., :3].astype(np.float32)
    out[0, ..., :3] = np.rint(stack[0, ..., :3] + (whole - stack[0, ..., :3]) * amount)
    out[1:, ..., 3] = np.rint(stack[1:, ..., 3] * (1 - 0.5 * amount))
    return out


def group_samples(
    iteration: int, group: int, stacks: list[Stack], source: np.ndarray
) -> list[tuple[str, dict[str, bytes]]]:
    """The samples of one group as `generate_rollouts` writes them, trajectories left out."""
    layers, height, width = stacks[0].shape[:3]
    record = GroupRecord(
        iteration=iteration,
        group=group,
        image_key=f"{group:016x}",
        layers=layers,
        group_size=len(stacks),
        height=height,
        width=width,
        latent_height=height // 8,
        latent_width=width // 8,
        sigmas=(1.0, 0.5, 0.0),
        window_start=0,
        window_size=1,
        dynamics="flow_sde",
        etas=(0.7,),
        share_prefix=False,
        outside="heun",
        base_fingerprint="0" * 64,
        adapter_sha256=None,
    )
    samples = [(group_key(iteration, group), {"json": record.to_json(), "source.png": encode_png(source)})]
    for index, stack in enumerate(stacks):
        candidate = CandidateRecord(
            iteration=iteration, group=group, candidate=index, image_key=f"{group:016x}", seed=index
        )
        members = {f"layer{at}.png": encode_png(layer) for at, layer in enumerate(stack)}
        members["json"] = candidate.to_json()
        samples.append((candidate_key(iteration, group, index), members))
    return samples


@pytest.fixture(scope="session")
def judge_url() -> Iterator[str]:
    with start_in_thread() as url:
        yield url


@pytest.fixture
def make_campaign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Campaign]:
    """`make_campaign(groups=2, size=4, workers=1, **judge)`: iteration 1 has its rollouts; candidate i of a group of G
    is spoiled by i / (G - 1), so candidate 0 is the truth. The runtime's part of `judge` is put in the environment."""

    def make(*, groups: int = 2, size: int = 4, workers: int = 1, side: int = SIZE, **judge: Any) -> Campaign:
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
        for worker in range(workers):
            mine = [g for g in range(groups) if g % workers == worker]
            samples = []
            for group in mine:
                truth = render_sketches(
                    np.random.default_rng(group), count=1, layers=2 + group % 3, size=(side, side), photo_share=0.0
                )[0]
                stacks = [spoiled(truth, index / (size - 1)) for index in range(size)]
                samples += group_samples(1, group, stacks, composite(truth))
            folder = campaign.rollouts_dir(1)
            stem = f"{folder}/w{worker:02d}of{workers:02d}"
            shard = write_shard(campaign.store, f"{stem}-000000.tar", samples)
            manifest = Manifest(
                kind="rollouts",
                iteration=1,
                shards=(shard,),
                counts={"groups": len(mine), "candidates": len(mine) * size},
                metadata={"groups": list(mine), "worker": worker, "workers": workers},
            )
            commit(campaign.store, f"{stem}.json", manifest)
        return campaign

    return make
