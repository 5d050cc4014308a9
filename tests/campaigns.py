"""A campaign as the steps before the one under test would have left it, written by what the steps write with.

What takes time and is the same for every test (the tiny base, its first rollouts, adapters) is made once a session.
torch is imported where it is needed: the tests of the light steps do without it.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from layerloop.components.schema.judging import ScoreRow
from layerloop.components.schema.learning import ALGORITHMS
from layerloop.components.schema.manifest import Manifest
from layerloop.components.schema.recipe import Recipe
from layerloop.components.schema.record import Record
from layerloop.components.schema.seeds import seed_for
from layerloop.components.schema.trajectory import GroupRecord, group_key
from layerloop.components.storage.campaign import MANIFEST, Campaign
from layerloop.components.storage.final_weights import AVERAGE, SAMPLING
from layerloop.components.storage.groups import SampledGroup, samples_of
from layerloop.components.storage.images import encode_png
from layerloop.components.storage.manifests import add_file, add_folder, commit
from layerloop.components.storage.rollouts import commit_group, shard_name
from layerloop.components.storage.shards import Sample, write_shard
from layerloop.components.storage.stores import Store

if TYPE_CHECKING:
    import torch

    from layerloop.components.policy.adapters import Adapter
    from layerloop.components.policy.model import LayeredPolicy

SIDE = 32  # pixels: 2 x 2 tokens a frame of the tiny base
Reward = Callable[[int, int, int], float | None]  # (iteration, group, candidate)
Change = Callable[[list[Sample]], list[Sample]]


def varied(iteration: int, group: int, candidate: int) -> float | None:
    """A reward that differs within every group and between iterations."""
    return (seed_for(iteration, group, candidate) % 1000) / 1000


def save_tiny_base(folder: Path, **sizes: int) -> Path:
    """A complete diffusers folder of an untrained layered model: two blocks of 16 channels, 16 pixels a token, unless
    `build_tiny_pipeline` is given other `sizes`."""
    from layerloop.components.policy.tiny import build_tiny_pipeline, save_pipeline

    small = {"vae_dim": 8, "blocks": 2, "heads": 1, "head_dim": 16}
    save_pipeline(build_tiny_pipeline(**small | sizes), folder)
    return folder


def prompt_embeds(tokens: int = 8) -> torch.Tensor:
    """An embedding of the tiny base's width, `(T, 16)` float32; two rows of a batch of 8 are `sampling.STEADY_ROWS`."""
    import torch

    return torch.randn(tokens, 16, generator=torch.Generator().manual_seed(5))


def trained_adapter(policy: LayeredPolicy, recipe: Recipe, *, seed: int, scale: float) -> Adapter:
    """An adapter with values in both factors, as training leaves it; `policy` keeps it on."""
    import torch

    from layerloop.components.policy.lora import adapter_of, new_adapter, put_adapter

    put_adapter(policy.transformer, new_adapter(policy.transformer, recipe.lora, seed=seed))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in policy.transformer.named_parameters():
        if ".lora_B." in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * scale
    return adapter_of(policy.transformer)


def plain_name(name: str) -> str:
    """An object's name without the hash of its content, in its own name or in that of a folder."""
    return re.sub(r"-[0-9a-f]{16}(?=\.)|(?<=/)[0-9a-f]{16}/", "", name)


def named(store: Store, name: str) -> str:
    """The one object that was written as `name`."""
    (found,) = (n for n in store.list(f"{name.split('/')[0]}/") if plain_name(n) == name)
    return found


def policy_folder(campaign: Campaign, iteration: int) -> Path:
    """The folder of a committed adapter, of a campaign in a folder."""
    return (Path(campaign.uri) / campaign.policy(iteration).file(SAMPLING).name).parent


class CampaignBuilder:
    """A campaign that is filled step by step."""

    def __init__(self, campaign: Campaign) -> None:
        self.campaign, self.store, self.uri, self.recipe = campaign, campaign.store, campaign.uri, campaign.recipe

    @classmethod
    def begin(cls, uri: str | Path, recipe: dict[str, Any]) -> CampaignBuilder:
        """A campaign with a recipe and nothing else."""
        return cls(Campaign.create_or_open(str(uri), Recipe.model_validate(recipe)))

    # ---- shard_dataset

    def sources(
        self,
        *,
        train: Sequence[np.ndarray] = (),
        holdout: Sequence[np.ndarray] = (),
        designs: Sequence[tuple[np.ndarray, np.ndarray]] = (),
        per_shard: int = 100,
        tokens: int = 8,
    ) -> Manifest:
        """Commit images `(H, W, 3 or 4)` uint8 by split, of designs (image, layers `(L, H, W, 4)`), and a prompt."""
        from safetensors.torch import save

        splits: dict[str, list[Sample]] = {
            "train": [_source(image) for image in train],
            "designs": [_source(image, layers) for image, layers in designs],
            "holdout": [_source(image) for image in holdout],
        }
        shards = tuple(
            write_shard(
                self.store,
                f"{self.campaign.sources_dir}/{split}-{number:06d}.tar",
                samples[start : start + per_shard],
            )
            for split, samples in splits.items()
            for number, start in enumerate(range(0, len(samples), per_shard))
        )
        folder = self.campaign.sources_dir
        prompt = add_file(self.store, f"{folder}/prompt.safetensors", save({"prompt_embeds": prompt_embeds(tokens)}))
        counts = {split: len(samples) for split, samples in splits.items()}
        manifest = Manifest(kind="sources", shards=shards, files=(prompt,), counts=counts)
        return commit(self.store, f"{folder}/{MANIFEST}", manifest)

    # ---- generate_rollouts

    def policy(self, iteration: int) -> LayeredPolicy:
        """The policy as a sampler has it: the base, with the adapter of an iteration on it if there is one."""
        from layerloop.components.policy.adapters import read_adapter
        from layerloop.components.policy.lora import put_adapter
        from layerloop.components.policy.model import LayeredPolicy

        policy = LayeredPolicy.load(self.recipe.model)
        if iteration > 0:
            put_adapter(policy.transformer, read_adapter(policy_folder(self.campaign, iteration)))
        return policy

    def rollouts(self, iteration: int, *, policy: LayeredPolicy | None = None, change: Change | None = None) -> None:
        """Sample and commit an iteration; `change` spoils the samples of all its groups first. Layers are left blank.

        The policy is the one that the recipe samples with, unless another is given.
        """
        sampled = self._sampled(iteration, policy)
        samples = [sample for group in sampled for sample in samples_of(group)]
        self.put(sampled, change(samples) if change else samples)

    def put(self, groups: Sequence[SampledGroup], samples: Sequence[Sample] | None = None) -> None:
        """Commit groups; `samples` go into their shards instead of their own if they are given."""
        for group in groups:
            record = group.record
            folder = self.campaign.rollouts_dir(record.iteration)
            key = group_key(record.iteration, record.group)
            own = samples_of(group) if samples is None else [s for s in samples if s[0].startswith(key)]
            shard = write_shard(self.store, shard_name(folder, record.group), own)
            commit_group(self.store, folder, record, shard, model_calls=1)

    def forget(self, iteration: int) -> None:
        """Delete the groups of an iteration, but not what earlier versions named by worker."""
        for name in self.store.list(f"{self.campaign.rollouts_dir(iteration)}/g"):
            self.store.delete(name)

    def _sampled(self, iteration: int, policy: LayeredPolicy | None) -> list[SampledGroup]:
        if policy is not None or iteration > 1:
            policy = policy or self.policy(self.recipe.rollout.sampler(iteration))
            return sample_groups(policy, self.recipe, iteration, self._adapter(iteration))
        return _first_groups(_reduced(self.recipe, rollout=self.recipe.rollout, algorithm=self.recipe.update.algorithm))

    def _adapter(self, iteration: int) -> str | None:
        sha256 = self.campaign.policy(self.recipe.rollout.sampler(iteration)).metadata.get("adapter_sha256")
        return None if sha256 is None else str(sha256)

    # ---- score_rollouts

    def scores(
        self,
        iteration: int,
        reward: Reward = varied,
        *,
        judge: str = "layerloop-reference-judge",
        rubric_version: str = "1",
        images: Sequence[str] = (),
        layers: Sequence[int] = (),
        groups: int | None = None,
    ) -> Manifest:
        """Commit scores of all candidates; a reward of None masks its candidate.

        Args:
            images, layers: of the groups, where they are not `image<group>` and 2.
            groups: how many are scored, where it is not the recipe's number.
        """
        from layerloop.components.score_rollouts.results import samples_of as score_samples
        from layerloop.components.score_rollouts.results import table_of

        def row(group: int, candidate: int) -> ScoreRow:
            value = reward(iteration, group, candidate)
            return ScoreRow.model_construct(  # unchecked, so that a reward may be NaN
                iteration=iteration, group=group, candidate=candidate,
                image_key=images[group] if group < len(images) else f"image{group}",
                layers=layers[group] if group < len(layers) else 2,
                reward=value, reason="the judge did not answer" if value is None else None, phase1=None, phase2=None,
                judge=judge, rubric="default", rubric_sha256="0" * 64, rubric_version=rubric_version,
                judge_version="v1",
            )  # fmt: skip

        wanted = self.recipe.rollout
        count = wanted.groups if groups is None else groups
        rows = [row(group, candidate) for group in range(count) for candidate in range(wanted.group_size)]
        folder = self.campaign.scores_dir(iteration)
        shard = write_shard(self.store, f"{folder}/000000.tar", score_samples(rows))
        table = add_file(self.store, f"{folder}/scores.parquet", table_of(rows, ()))
        manifest = Manifest(
            kind="scores",
            iteration=iteration,
            shards=(shard,),
            files=(table,),
            metadata={"judge": judge, "judge_version": "v1", "rubric": "default", "rubric_version": rubric_version},
        )
        return commit(self.store, f"{folder}/{MANIFEST}", manifest)

    def ready(self, iteration: int, reward: Reward = varied) -> None:
        """Rollouts and scores of an iteration."""
        self.rollouts(iteration)
        self.scores(iteration, reward)

    # ---- update_lora

    def adapter(
        self,
        iteration: int,
        *,
        scale: float = 0.3,
        average: float | None = None,
        rank: int | None = None,
        folder: Path | None = None,
    ) -> Manifest:
        """Commit a policy whose adapter moves the base by `scale` (1e20 and more: one that has diverged).

        Args:
            average: keep an average too, of `average` times the weights.
            rank: of the adapter; the recipe's by default.
            folder: where a copy of the files is put.
        """
        from safetensors.torch import load, save

        lora = self.recipe.lora if rank is None else self.recipe.lora.model_copy(update={"rank": rank})
        data, fingerprint = _adapter_files(_reduced(self.recipe, lora=lora), iteration, scale)
        if average is not None:
            weights = load(data[SAMPLING])
            data = data | {AVERAGE: save({key: average * value for key, value in weights.items()})}
        if folder is not None:
            folder.mkdir(parents=True)
            for name, content in data.items():
                (folder / name).write_bytes(content)
        where = self.campaign.policy_dir(iteration)
        files = add_folder(self.store, where, data)
        manifest = Manifest(
            kind="policy",
            iteration=iteration,
            files=files,
            metadata={
                "adapter_sha256": files[0].sha256,
                "base_fingerprint": fingerprint,
                "reward_mean": 0.4 + 0.1 * iteration,
            },
        )
        return commit(self.store, f"{where}/{MANIFEST}", manifest)

    def adapter_weights(self, iteration: int) -> bytes:
        """The file of a committed adapter's weights."""
        return self.store.read(self.campaign.policy(iteration).file(SAMPLING).name)

    def committed(self, iteration: int) -> bool:
        """Whether the policy of an iteration is committed."""
        return self.campaign.find(self.campaign.policy_dir(iteration)) is not None


def _source(image: np.ndarray, layers: np.ndarray | None = None) -> Sample:
    record: dict[str, Any] = {"origin": "drawn"}
    if layers is not None:
        record |= {"layers": len(layers), "truth": {"elements": len(layers), "hidden": 0, "text_previews": 1}}
    members = {"png": encode_png(image), "json": json.dumps(record).encode()}
    if layers is not None:
        members |= {f"layer{index}.png": encode_png(layer) for index, layer in enumerate(layers)}
    return hashlib.sha256(image.tobytes()).hexdigest()[:16], members


def sample_groups(
    policy: LayeredPolicy, recipe: Recipe, iteration: int, adapter_sha256: str | None
) -> list[SampledGroup]:
    """Every group of an iteration, of images and layer counts that follow from its number; layers are left blank."""
    return [
        _sample_group(policy, recipe, _record(policy, recipe, iteration, group, adapter_sha256))
        for group in range(recipe.rollout.groups)
    ]


def _record(
    policy: LayeredPolicy, recipe: Recipe, iteration: int, group: int, adapter_sha256: str | None
) -> GroupRecord:
    wanted, windowed = recipe.rollout, ALGORITHMS[recipe.update.algorithm].samples_from == "window"
    h, w = policy.tokens(SIDE, SIDE)
    return GroupRecord(
        iteration=iteration,
        group=group,
        image_key=f"image{group}",
        layers=wanted.min_layers + group % (wanted.max_layers - wanted.min_layers + 1),
        group_size=wanted.group_size,
        height=SIDE,
        width=SIDE,
        latent_height=h,
        latent_width=w,
        sigmas=policy.sigmas(wanted.steps, SIDE, SIDE),
        window_start=wanted.window.start if windowed else 0,
        window_size=wanted.window.size if windowed else 0,
        dynamics=wanted.noise.dynamics if windowed else "ode",
        etas=(wanted.noise.eta,) * wanted.window.size if windowed else (),
        share_prefix=False,
        outside="euler",
        base_fingerprint=policy.fingerprint,
        adapter_sha256=adapter_sha256,
    )


def _sample_group(policy: LayeredPolicy, recipe: Recipe, record: GroupRecord) -> SampledGroup:
    import torch

    from layerloop.components.policy.sampling import Plan, rollout

    image = np.random.default_rng(record.group).integers(0, 256, (1, SIDE, SIDE, 3), dtype=np.uint8)
    condition = policy.encode(image, prompt_embeds())
    seeds = [seed_for(recipe.seed, record.iteration, record.image_key, c) for c in range(record.group_size)]
    noise = torch.cat([policy.noise(seed, record.layers, SIDE, SIDE) for seed in seeds])

    def step_noise(candidate: int, step: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed_for(seeds[candidate], step))
        return torch.randn(noise[:1].shape, generator=generator)

    done = rollout(policy, condition, noise, Plan.of(record), step_noise=step_noise)
    return SampledGroup(
        record=record,
        image=image[0],
        condition=condition.latents[0].numpy(),
        seeds=seeds,
        window=done.window.numpy(),
        velocities=(done.velocities if recipe.rollout.keep_velocities else done.velocities[:, :0]).numpy(),
        rows=done.rows.numpy(),
        final=done.final.numpy(),
        stacks=np.zeros((record.group_size, record.layers, SIDE, SIDE, 4), np.uint8),
    )


def _reduced(recipe: Recipe, *, algorithm: str = "grpo", **sections: Record) -> bytes:
    """A recipe with only what decides a result, as a key of what is made once."""
    reduced = {
        "name": "reduced",
        "seed": recipe.seed,
        "model": {"base": recipe.model.base, "dtype": recipe.model.dtype},
        "update": {"algorithm": algorithm},
        **{name: section.model_dump(mode="json") for name, section in sections.items()},
    }
    return Recipe.model_validate(reduced).to_json()


@functools.lru_cache(maxsize=64)
def _first_groups(recipe: bytes) -> list[SampledGroup]:
    from layerloop.components.policy.model import LayeredPolicy

    wanted = Recipe.from_json(recipe, where="recipe")
    return sample_groups(LayeredPolicy.load(wanted.model), wanted, 1, None)


@functools.lru_cache(maxsize=64)
def _adapter_files(recipe: bytes, seed: int, scale: float) -> tuple[dict[str, bytes], str]:
    """A trained adapter's files, its weights first, and the fingerprint of its base."""
    from layerloop.components.policy.adapter_files import write_peft
    from layerloop.components.policy.model import LayeredPolicy

    wanted = Recipe.from_json(recipe, where="recipe")
    policy = LayeredPolicy.load(wanted.model)
    adapter = trained_adapter(policy, wanted, seed=seed, scale=scale)
    with tempfile.TemporaryDirectory() as folder:
        write_peft(adapter, folder, transformer=policy.transformer, base="base")
        names = (SAMPLING, "adapter_config.json")
        return {name: (Path(folder) / name).read_bytes() for name in names}, policy.fingerprint


def drawn_group(
    group: int,
    stacks: np.ndarray | None = None,
    source: np.ndarray | None = None,
    *,
    iteration: int = 1,
    seed: int = 0,
    adapter_sha256: str | None = None,
) -> SampledGroup:
    """A group whose candidates are given, `stacks[G, L, H, W, 4]`, or else two of noise; its latents are noise."""
    draw = np.random.default_rng([seed, iteration, group])
    if stacks is None:
        stacks = draw.integers(0, 256, (2, 1 + group % 2, SIDE, SIDE, 4), dtype=np.uint8)
    if source is None:
        source = np.full(stacks.shape[2:], 255, np.uint8)
    size, layers, height, width = stacks.shape[:4]
    h, w = height // 16, width // 16
    record = GroupRecord(
        iteration=iteration,
        group=group,
        image_key=f"{group:016x}",
        layers=layers,
        group_size=size,
        height=height,
        width=width,
        latent_height=h,
        latent_width=w,
        sigmas=(1.0, 0.5, 0.0),
        window_start=0,
        window_size=1,
        dynamics="flow_sde",
        etas=(0.7,),
        share_prefix=False,
        outside="heun",
        base_fingerprint="0" * 64,
        adapter_sha256=adapter_sha256,
    )
    return SampledGroup(
        record=record,
        image=source,
        condition=draw.standard_normal((h * w, 64), np.float32),
        seeds=range(size),
        window=draw.standard_normal((size, 2, (layers + 1) * h * w, 64), np.float32),
        velocities=np.zeros((size, 0, (layers + 1) * h * w, 64), np.float32),
        rows=np.ones(size, np.int32),
        final=draw.standard_normal((size, (layers + 1) * h * w, 64), np.float32),
        stacks=stacks,
    )


def lay_out_by_worker(
    campaign: Campaign, iteration: int, *, workers: int, complete: Sequence[int] | None = None, keep: bool = False
) -> None:
    """Lay an iteration's rollouts out as earlier versions did: shards numbered by worker, a manifest per worker.

    Args:
        complete: workers that finished; the others have written their shards and no manifest. All by default.
        keep: leave the groups that are named by group as well.
    """
    folder, store = campaign.rollouts_dir(iteration), campaign.store
    groups = campaign.rollouts(iteration)
    for worker in range(workers):
        stem = f"{folder}/w{worker:02d}of{workers:02d}"
        mine = [group for group in groups if group % workers == worker]
        shards = []
        for number, group in enumerate(mine):
            name = f"{stem}-{number:06d}.tar"
            store.write(name, store.read(groups[group].shards[0].name))
            shards.append(groups[group].shards[0].model_copy(update={"name": name}))
        facts = [groups[group].metadata for group in mine]
        sigmas: dict[str, Any] = {}
        for fact in facts:
            sigmas |= dict(fact["sigmas"])  # type: ignore[call-overload]
        manifest = Manifest(
            kind="rollouts",
            iteration=iteration,
            shards=tuple(shards),
            counts={
                name: sum(groups[group].counts[name] for group in mine)
                for name in ("groups", "candidates", "layers", "model_calls")
            },
            metadata={
                "groups": list(mine),
                "worker": worker,
                "workers": workers,
                "base_fingerprint": facts[0]["base_fingerprint"],
                "adapter_sha256": facts[0]["adapter_sha256"],
                "sigmas": sigmas,
            },
        )
        if complete is None or worker in complete:
            commit(store, f"{stem}.json", manifest)
    if not keep:
        CampaignBuilder(campaign).forget(iteration)


def rank_1_sees(folder: Path, change: str) -> Path:
    """A folder for PYTHONPATH by which the second rank of a step sees a campaign otherwise than the first."""
    lines = ["import os", "if os.environ.get('RANK') == '1':"]
    lines += [f"    {line}" for line in ("from layerloop.components.storage.campaign import Campaign", change)]
    (folder / "sitecustomize.py").write_text("\n".join(lines))
    return folder
