"""Campaigns that hold out designs and images and have an adapter, of a very small random policy."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from layerloop.components.evaluate_adapter.cases import Case, Kind
from layerloop.components.evaluate_adapter.step import run
from layerloop.components.layers.stack import Pixels, composite, on_backdrop
from layerloop.components.runtime.outputs import StepResult
from layerloop.components.schema.manifest import Manifest
from layerloop.components.storage.images import encode_png

from ..campaigns import SIDE, CampaignBuilder, named


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def drawn_design(seed: int, layers: int, *, height: int = SIDE, width: int = SIDE) -> Pixels:
    """A ramp under rectangles of one colour each: (L, H, W, 4)."""
    draw = np.random.default_rng(seed)
    stack = np.zeros((layers, height, width, 4), np.uint8)
    stack[0] = 255
    stack[0, ..., :3] = draw.integers(60, 200, 3) + np.arange(width)[None, :, None]
    for layer in stack[1:]:
        top, left = draw.integers(0, height // 2), draw.integers(0, width // 2)
        layer[top : top + height // 2, left : left + width // 2] = (*draw.integers(0, 256, 3), 255)
    return stack


def source_of(stack: Pixels) -> Pixels:
    return on_backdrop(composite(stack), "white")


def case_of(
    key: str, kind: Kind, layers: int, seed: int, source: Pixels, truth: Pixels | None, origin: str = ""
) -> Case:
    """A case as it is read from the sources."""
    members = {"png": encode_png(source)}
    members |= {f"layer{index}.png": encode_png(layer) for index, layer in enumerate(() if truth is None else truth)}
    return Case(key, kind, layers, seed, source.shape[:2], members, origin)


def hold_out(lab: CampaignBuilder, designs: Sequence[Pixels], images: Sequence[Pixels]) -> None:
    """Commit sources with no images to train on."""
    lab.sources(holdout=images, designs=[(source_of(design), design) for design in designs])


MakeLab = Callable[..., CampaignBuilder]


def lab_at(uri: str, base: Path) -> CampaignBuilder:
    """A campaign with a recipe and nothing else."""
    recipe = {
        "name": "lab",
        "model": {"base": str(base), "dtype": "float32"},
        "rollout": {"groups": 2, "group_size": 2},
        "lora": {"rank": 2, "alpha": 2.0},
        "evaluation": {"steps": 2, "layers": [2, 3], "designs": 6, "pictures": 2},
    }
    return CampaignBuilder.begin(uri, recipe)


def fill(lab: CampaignBuilder) -> CampaignBuilder:
    """Five designs that fit the recipe and one that does not, two images, two iterations with scores and adapters."""
    designs = [drawn_design(seed, 2 + seed % 2, width=SIDE + 16 * (seed % 2)) for seed in range(5)]
    hold_out(lab, [*designs, drawn_design(5, 5)], [source_of(drawn_design(seed, 3)) for seed in (10, 11)])
    for iteration in (1, 2):
        lab.adapter(iteration)
        rewards = [0.1 * iteration, 0.2 * iteration, None, 0.3 * iteration]
        lab.scores(iteration, lambda k, g, c, rewards=rewards: rewards[2 * g + c])
    return lab


@pytest.fixture
def make_lab(tiny_base: Path, tmp_path: Path) -> MakeLab:
    """An empty campaign, in a folder of the test's own or at a URI."""
    return lambda uri=None: lab_at(uri or str(tmp_path / "campaign"), tiny_base)


@pytest.fixture
def lab(make_lab: MakeLab) -> CampaignBuilder:
    """A filled campaign that the test may change."""
    return fill(make_lab())


@dataclass(frozen=True)
class Evaluated:
    """A filled campaign whose second iteration was evaluated, for tests that only read it."""

    lab: CampaignBuilder
    result: StepResult
    manifest: Manifest
    metrics: dict[str, Any]  # metrics.json
    page: str  # report.html

    def file(self, name: str) -> bytes:
        return self.lab.store.read(named(self.lab.store, f"evaluations/iteration-000002/{name}"))


@pytest.fixture(scope="session")
def evaluated(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Evaluated:
    lab = fill(lab_at(str(tmp_path_factory.mktemp("evaluated") / "campaign"), tiny_base))
    result = run(campaign=lab.uri, runtime="evaluation: {batch_size: 4}")
    manifest = lab.campaign.find("evaluations/iteration-000002")
    assert manifest is not None
    metrics = json.loads(lab.store.read(named(lab.store, "evaluations/iteration-000002/metrics.json")))
    return Evaluated(lab, result, manifest, metrics, result.files["report"].decode())
