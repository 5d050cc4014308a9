"""Campaigns with real rollouts of a very small random policy, and rewards made up by the test."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load, save

from layerloop.components.policy.lora import load_adapter
from layerloop.components.policy.model import LayeredPolicy
from layerloop.components.policy.sampling import Plan, rollout
from layerloop.components.policy.tiny import build_tiny_pipeline
from layerloop.components.schema.learning import ALGORITHMS
from layerloop.components.schema.manifest import Manifest
from layerloop.components.schema.recipe import Recipe
from layerloop.components.schema.seeds import seed_for
from layerloop.components.schema.trajectory import CandidateRecord, GroupRecord, candidate_key, group_key
from layerloop.components.storage.campaign import MANIFEST, Campaign
from layerloop.components.storage.manifests import add_file, commit
from layerloop.components.storage.shards import Sample, write_shard

SIZE = 32  # pixels: 2 x 2 tokens a frame
G = 4
WINDOW = 2

Reward = Callable[[int, int, int], float | None]  # (iteration, group, candidate)


def spread(iteration: int, group: int, candidate: int) -> float | None:
    """A reward that differs within every group and between iterations."""
    return (seed_for(iteration, group, candidate) % 1000) / 1000


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the parts of a layered model that an update reads: two blocks of 16 channels."""
    pipeline = build_tiny_pipeline(vae_dim=8, blocks=2, heads=1, head_dim=16)
    folder = tmp_path_factory.mktemp("base")
    pipeline.transformer.save_pretrained(folder / "transformer")
    pipeline.vae.save_pretrained(folder / "vae")
    pipeline.scheduler.save_pretrained(folder / "scheduler")
    return folder


class Lab:
    """A campaign under test: makes rollouts and scores of its open iteration as the other steps would."""

    def __init__(self, campaign: Campaign) -> None:
        self.campaign = campaign
        self.uri = campaign.uri
        self.store = campaign.store
        self.recipe = campaign.recipe

    def prompt(self) -> torch.Tensor:
        return torch.randn(7, 16, generator=torch.Generator().manual_seed(5))

    def sources(self) -> None:
        file = add_file(self.store, "sources/prompt.safetensors", save({"prompt_embeds": self.prompt()}))
        commit(self.store, f"sources/{MANIFEST}", Manifest(kind="sources", files=(file,)))

    def policy(self, iteration: int) -> LayeredPolicy:
        """The policy as a sampler has it: the base, with the adapter of an iteration on it if there is one."""
        policy = LayeredPolicy.load(self.recipe.model)
        if iteration > 0:
            load_adapter(policy, Path(self.uri) / self.campaign.policy_dir(iteration))
        return policy

    def record(self, policy: LayeredPolicy, iteration: int, group: int) -> GroupRecord:
        wanted = self.recipe.rollout
        h, w = policy.tokens(SIZE, SIZE)
        adapter = self.campaign.policy(iteration - 1).metadata.get("adapter_sha256")
        windowed = ALGORITHMS[self.recipe.update.algorithm].samples_from == "window"
        return GroupRecord(
            iteration=iteration,
            group=group,
            image_key=f"image{group}",
            layers=wanted.min_layers + group % (wanted.max_layers - wanted.min_layers + 1),
            group_size=wanted.group_size,
            height=SIZE,
            width=SIZE,
            latent_height=h,
            latent_width=w,
            sigmas=policy.sigmas(wanted.steps, SIZE, SIZE),
            window_start=wanted.window.start if windowed else 0,
            window_size=wanted.window.size if windowed else 0,
            dynamics=wanted.noise.dynamics if windowed else "ode",
            etas=(wanted.noise.eta,) * wanted.window.size if windowed else (),
            share_prefix=False,
            outside="euler",
            base_fingerprint=policy.fingerprint,
            adapter_sha256=None if adapter is None else str(adapter),
        )

    def samples(self, policy: LayeredPolicy, record: GroupRecord) -> list[Sample]:
        image = np.random.default_rng(record.group).integers(0, 256, (1, SIZE, SIZE, 3), dtype=np.uint8)
        condition = policy.encode(image, self.prompt())
        seeds = [seed_for(self.recipe.seed, record.iteration, record.image_key, c) for c in range(record.group_size)]
        noise = torch.cat([policy.noise(seed, record.layers, SIZE, SIZE) for seed in seeds])

        def step_noise(candidate: int, step: int) -> torch.Tensor:
            generator = torch.Generator().manual_seed(seed_for(seeds[candidate], step))
            return torch.randn(noise[:1].shape, generator=generator)

        done = rollout(policy, condition, noise, Plan.of(record), step_noise=step_noise)
        group = {"json": record.to_json(), "condition.safetensors": save({"condition": condition.latents[0]})}
        samples: list[Sample] = [(group_key(record.iteration, record.group), group)]
        for c, seed in enumerate(seeds):
            candidate = CandidateRecord(
                iteration=record.iteration, group=record.group, candidate=c, image_key=record.image_key, seed=seed
            )
            tensors = {"window": done.window[c].contiguous(), "final": done.final[c].contiguous()}
            members = {"json": candidate.to_json(), "trajectory.safetensors": save(tensors)}
            samples.append((candidate_key(record.iteration, record.group, c), members))
        return samples

    def rollouts(self, iteration: int, *, change: Callable[[list[Sample]], list[Sample]] | None = None) -> None:
        """Sample and commit an iteration as one worker; `change` spoils the samples first."""
        policy = self.policy(iteration - 1)
        groups = range(self.recipe.rollout.groups)
        samples = [s for g in groups for s in self.samples(policy, self.record(policy, iteration, g))]
        samples = change(samples) if change else samples
        folder = self.campaign.rollouts_dir(iteration)
        shards = []
        for g in groups:  # one shard a group
            members = [s for s in samples if s[0].startswith(group_key(iteration, g))]
            shards.append(write_shard(self.store, f"{folder}/w00of01-{g:06d}.tar", members))
        manifest = Manifest(
            kind="rollouts", iteration=iteration, shards=tuple(shards), metadata={"groups": list(groups)}
        )
        commit(self.store, f"{folder}/w00of01.json", manifest)

    def scores(self, iteration: int, reward: Reward = spread) -> None:
        def row(g: int, c: int) -> dict[str, Any]:
            value = reward(iteration, g, c)
            return {
                "iteration": iteration, "group": g, "candidate": c, "image_key": f"image{g}", "layers": 2,
                "reward": value, "reason": "the judge did not answer" if value is None else None,
                "phase1": None, "phase2": None, "judge": "made up", "rubric": "default", "rubric_sha256": "0" * 64,
            }  # fmt: skip

        rows = [row(g, c) for g in range(self.recipe.rollout.groups) for c in range(self.recipe.rollout.group_size)]
        folder = self.campaign.scores_dir(iteration)
        samples: list[Sample] = [
            (candidate_key(iteration, r["group"], r["candidate"]), {"json": json.dumps(r).encode()}) for r in rows
        ]
        shard = write_shard(self.store, f"{folder}/000000.tar", samples)
        commit(self.store, f"{folder}/{MANIFEST}", Manifest(kind="scores", iteration=iteration, shards=(shard,)))

    def ready(self, iteration: int, reward: Reward = spread) -> None:
        """Rollouts and scores of an iteration."""
        self.rollouts(iteration)
        self.scores(iteration, reward)

    def adapter(self, iteration: int) -> bytes:
        return self.store.read(f"{self.campaign.policy_dir(iteration)}/adapter_model.safetensors")

    def committed(self, iteration: int) -> bool:
        return self.campaign.find(self.campaign.policy_dir(iteration)) is not None


def nan_in_the_last_group(samples: list[Sample]) -> list[Sample]:
    """Spoil one latent of one candidate of the last group."""
    members = samples[-1][1]
    tensors = load(members["trajectory.safetensors"])
    tensors["window"][1, 2, 3] = math.nan
    members["trajectory.safetensors"] = save(tensors)
    return samples


MakeLab = Callable[..., Lab]


@pytest.fixture(autouse=True)
def _runtime(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is quick on a small base; a test may give its step another one."""
    runtime = {"update": {"microbatch": 8}, "model": {"gradient_checkpointing": False}}
    monkeypatch.setenv("LAYERLOOP_RUNTIME", json.dumps(runtime))


@pytest.fixture
def make_lab(base: Path, tmp_path: Path) -> MakeLab:
    """`make_lab(name, update={...}, rollout={...})`: a campaign with sources, before its first iteration."""

    def make(name: str = "campaign", *, update: dict[str, Any] | None = None, **sections: Any) -> Lab:
        rollout_section = {
            "groups": 4, "group_size": G, "min_layers": 1, "max_layers": 2, "steps": 5, "outside": "euler",
            "window": {"size": WINDOW, "start": 0}, "noise": {"eta": 0.7},
        }  # fmt: skip
        recipe = Recipe.model_validate(
            {
                "name": "lab",
                "model": {"base": str(base), "dtype": "float32"} | sections.pop("model", {}),
                "rollout": rollout_section | sections.pop("rollout", {}),
                "lora": {"rank": 2, "alpha": 2.0},
                "update": {"learning_rate": 1e-3, **(update or {})},
            }
            | sections
        )
        lab = Lab(Campaign.create_or_open(str(tmp_path / name), recipe))
        lab.sources()
        return lab

    return make


@pytest.fixture
def lab(make_lab: MakeLab) -> Lab:
    """A campaign whose first iteration is sampled and scored."""
    lab = make_lab()
    lab.ready(1)
    return lab
