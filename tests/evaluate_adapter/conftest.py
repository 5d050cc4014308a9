"""Campaigns that hold out designs and pictures and have an adapter, of a very small random policy."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from pydantic import JsonValue
from safetensors.torch import save

from layerloop.components.evaluate_adapter.step import run
from layerloop.components.layers.stack import Pixels, composite, on_backdrop
from layerloop.components.policy.lora import adapter_of, add_lora, write_peft
from layerloop.components.policy.model import LayeredPolicy
from layerloop.components.policy.tiny import build_tiny_pipeline
from layerloop.components.runtime.contract import StepResult
from layerloop.components.schema.manifest import Manifest
from layerloop.components.schema.recipe import Recipe
from layerloop.components.storage.campaign import MANIFEST, Campaign
from layerloop.components.storage.images import encode_png
from layerloop.components.storage.manifests import add_file, commit
from layerloop.components.storage.shards import Sample, write_shard

SIDE = 32


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the parts of a layered model that an evaluation reads: two blocks of 16 channels."""
    pipeline = build_tiny_pipeline(vae_dim=8, blocks=2, heads=1, head_dim=16)
    folder = tmp_path_factory.mktemp("base")
    pipeline.transformer.save_pretrained(folder / "transformer")
    pipeline.vae.save_pretrained(folder / "vae")
    pipeline.scheduler.save_pretrained(folder / "scheduler")
    return folder


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


class Lab:
    """A campaign under test, filled as the steps before an evaluation would fill it."""

    def __init__(self, campaign: Campaign) -> None:
        self.campaign, self.store, self.uri, self.recipe = campaign, campaign.store, campaign.uri, campaign.recipe

    def sources(self, designs: Sequence[Pixels], pictures: Sequence[Pixels]) -> None:
        shards = []
        for split, items in (("designs", designs), ("holdout", pictures)):
            samples: list[Sample] = []
            for item in items:
                source = source_of(item) if split == "designs" else item
                members = {"png": encode_png(source), "json": json.dumps({"origin": "drawn"}).encode()}
                if split == "designs":
                    members |= {f"layer{index}.png": encode_png(layer) for index, layer in enumerate(item)}
                samples.append((hashlib.sha256(source.tobytes()).hexdigest()[:16], members))
            if samples:
                shards.append(write_shard(self.store, f"sources/{split}-000000.tar", samples))
        prompt = torch.randn(7, 16, generator=torch.Generator().manual_seed(5))
        file = add_file(self.store, "sources/prompt.safetensors", save({"prompt_embeds": prompt}))
        manifest = Manifest(kind="sources", shards=tuple(shards), files=(file,))
        commit(self.store, f"sources/{MANIFEST}", manifest)

    def adapter(self, iteration: int, tmp: Path, *, scale: float = 0.3) -> None:
        """Commit a policy whose adapter moves the base by `scale`; NaN gives one that has diverged."""
        policy = LayeredPolicy.load(self.recipe.model)
        add_lora(policy.transformer, self.recipe.lora, seed=iteration)
        generator = torch.Generator().manual_seed(iteration)
        for name, parameter in policy.transformer.named_parameters():
            if ".lora_B." in name:
                parameter.data = torch.randn(parameter.shape, generator=generator) * scale
        folder = tmp / f"adapter-{iteration}"
        write_peft(adapter_of(policy.transformer), folder, transformer=policy.transformer)
        where = self.campaign.policy_dir(iteration)
        names = ("adapter_model.safetensors", "adapter_config.json")
        files = tuple(add_file(self.store, f"{where}/{name}", folder / name) for name in names)
        told: dict[str, JsonValue] = {"adapter_sha256": files[0].sha256, "base_fingerprint": policy.fingerprint}
        manifest = Manifest(kind="policy", iteration=iteration, files=files, metadata=told)
        commit(self.store, f"{where}/{MANIFEST}", manifest)

    def scores(
        self, iteration: int, rewards: Sequence[float | None], *, judge: str = "layerloop-reference-judge"
    ) -> None:
        folder = self.campaign.scores_dir(iteration)
        buffer = io.BytesIO()
        pq.write_table(pa.table({"reward": pa.array(rewards, pa.float64())}), buffer)
        file = add_file(self.store, f"{folder}/scores.parquet", buffer.getvalue())
        told: dict[str, JsonValue] = {"judge": judge, "judge_version": "v1", "rubric": "default", "rubric_version": "1"}
        manifest = Manifest(kind="scores", iteration=iteration, files=(file,), metadata=told)
        commit(self.store, f"{folder}/{MANIFEST}", manifest)


MakeLab = Callable[..., Lab]


def lab_at(uri: str, base: Path) -> Lab:
    """A campaign with a recipe and nothing else."""
    recipe = {
        "name": "lab",
        "model": {"base": str(base), "dtype": "float32"},
        "lora": {"rank": 2, "alpha": 2.0},
        "evaluation": {"steps": 2, "layers": [2, 3], "designs": 6, "pictures": 2},
    }
    return Lab(Campaign.create_or_open(uri, Recipe.model_validate(recipe)))


def fill(lab: Lab, tmp: Path) -> Lab:
    """Five designs that fit the recipe and one that does not, two pictures, two iterations with scores and adapters."""
    designs = [drawn_design(seed, 2 + seed % 2, width=SIDE + 16 * (seed % 2)) for seed in range(5)]
    lab.sources([*designs, drawn_design(5, 5)], [source_of(drawn_design(seed, 3)) for seed in (10, 11)])
    for iteration in (1, 2):
        lab.adapter(iteration, tmp)
        lab.scores(iteration, [0.1 * iteration, 0.2 * iteration, None, 0.3 * iteration])
    return lab


@pytest.fixture
def make_lab(base: Path, tmp_path: Path) -> MakeLab:
    """An empty campaign, in a folder of the test's own or at a URI."""
    return lambda uri=None: lab_at(uri or str(tmp_path / "campaign"), base)


@pytest.fixture
def lab(make_lab: MakeLab, tmp_path: Path) -> Lab:
    """A filled campaign that the test may change."""
    return fill(make_lab(), tmp_path)


@dataclass(frozen=True)
class Evaluated:
    """A filled campaign whose second iteration was evaluated, for tests that only read it."""

    lab: Lab
    result: StepResult
    manifest: Manifest
    metrics: dict[str, Any]  # metrics.json
    page: str  # report.html

    def file(self, name: str) -> bytes:
        return self.lab.store.read(f"evaluations/iteration-000002/{name}")


@pytest.fixture(scope="session")
def evaluated(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Evaluated:
    folder = tmp_path_factory.mktemp("evaluated")
    lab = fill(lab_at(str(folder / "campaign"), base), folder)
    result = run(campaign=lab.uri, runtime="evaluation: {batch_size: 4, bootstrap: 200}")
    manifest = lab.campaign.find("evaluations/iteration-000002")
    assert manifest is not None
    metrics = json.loads(lab.store.read("evaluations/iteration-000002/metrics.json"))
    return Evaluated(lab, result, manifest, metrics, result.files["report"].decode())
