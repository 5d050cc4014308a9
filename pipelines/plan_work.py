"""What an iteration computes and keeps: operations, counts and bytes by the recipe, before anything is said of time."""

from __future__ import annotations

import dataclasses
import functools
import json
import random
from importlib import resources
from pathlib import Path
from typing import Any

from pydantic import Field

from layerloop.components.policy.memory import Use, gpu_bytes
from layerloop.components.policy.size import TOKEN_PIXELS, AdapterSize, Tokens, TransformerSize
from layerloop.components.schema.learning import ALGORITHMS
from layerloop.components.schema.recipe import ModelRecipe, Recipe
from layerloop.components.schema.record import Record
from layerloop.components.schema.runtime import Runtime

DRAWS = 50  # iterations over whose layer counts times are averaged


class Assumptions(Record):
    """What the plan takes for granted; `--set plan.KEY=VALUE` sets one."""

    tflops: float = Field(default=450.0, gt=0)  # 10^12 operations a second of one GPU, in all that it computes
    load_gb_per_second: float = Field(default=1.0, gt=0)  # of a pod from cold storage; its ranks share what is read
    pod_seconds: float = Field(default=33.0, ge=0)  # from a task's start to its first work: driver, image, imports
    judge_tokens_per_second: float = Field(default=6170.0, gt=0)  # input of a replica: 150 s for `paper`'s iteration
    judge_latency_seconds: float = Field(default=8.0, ge=0)  # of one request, in a batch
    judge_replicas: int = Field(default=1, ge=1)
    store_seconds: float = Field(default=25.0, ge=0)  # an iteration: shards and adapter that nothing else hides
    share_candidates: bool = True  # of a worker, its ranks; False: all take complete groups, by number
    sync_seconds: float = Field(default=5.0, ge=0)  # the same in a resident iteration, which writes behind its work
    prompt_tokens: int = Field(default=11, ge=1)
    aspect: float = Field(default=1.0, gt=0, le=1)  # short side over long side of the pictures
    iterations: int = Field(default=200, ge=1)  # of the campaign
    iterations_per_run: int = Field(default=5, ge=1)  # step by step; a stretch's, resident
    iterations_per_stretch: int = Field(default=20, ge=1)
    evaluations: int = Field(default=1, ge=0)  # of adapters; the base is evaluated once
    png_bytes_per_pixel: float = Field(default=1.5, gt=0)  # of a layer
    characters_per_token: float = Field(default=4.0, gt=0)  # of the judge's text
    judge_patch_pixels: int = Field(default=32, ge=1)  # side of what becomes one token of the judge
    reply_tokens_per_score: int = Field(default=12, ge=1)
    gpu_hour_price: float = Field(default=0.0, ge=0)  # in the currency of runtime.judge.price
    storage_gb_month_price: float = Field(default=0.0, ge=0)


def transformer_size(model: ModelRecipe) -> tuple[TransformerSize, str]:
    """The base's dimensions, and where they are from: its config where that is at hand, else Qwen-Image-Layered's."""
    if model.shipped:
        file = resources.files("layerloop.components.policy") / "tiny-weights/transformer/config.json"
        return TransformerSize.of_config(json.loads(file.read_text())), "its config"
    config = Path(model.base.removeprefix("file://")).expanduser() / "transformer/config.json"
    if config.is_file():
        return TransformerSize.of_config(json.loads(config.read_text())), "its config"
    known = "" if model.base == ModelRecipe().base else ", taken to be of its size"
    return TransformerSize(), f"Qwen-Image-Layered's config{known}"


@dataclasses.dataclass(frozen=True)
class Work:
    """Operations, in units of 10^12, and counts of one iteration and of one evaluated model."""

    recipe: Recipe
    runtime: Runtime
    assumed: Assumptions

    @functools.cached_property
    def size(self) -> TransformerSize:
        """The base's dimensions."""
        return transformer_size(self.recipe.model)[0]

    @functools.cached_property
    def adapter(self) -> AdapterSize:
        """The recipe's adapter."""
        return AdapterSize.of(self.size, rank=self.recipe.lora.rank, targets=self.recipe.lora.targets)

    @property
    def layers(self) -> range:
        """Layer counts of the groups, each as likely."""
        return range(self.recipe.rollout.min_layers, self.recipe.rollout.max_layers + 1)

    def sides(self, *, evaluated: bool = False) -> tuple[int, int]:
        """(height, width) in pixels of the pictures that are sampled, or evaluated."""
        data = self.recipe.data
        longest = data.resolution if evaluated else self.recipe.sampled_resolution
        short = max(1, round(longest * self.assumed.aspect / data.multiple)) * data.multiple
        return short, longest

    def tokens(self, layers: int, *, evaluated: bool = False) -> Tokens:
        """Of one candidate."""
        height, width = self.sides(evaluated=evaluated)
        return Tokens(layers, height // TOKEN_PIXELS, width // TOKEN_PIXELS, self.assumed.prompt_tokens)

    @functools.cached_property
    def passes(self) -> dict[int, tuple[float, float]]:
        """Forward and backward pass with the adapter, by layers."""
        tokens = {layers: self.tokens(layers) for layers in self.layers}
        return {
            layers: (self.size.forward(one, self.adapter) / 1e12, self.size.backward(one, self.adapter) / 1e12)
            for layers, one in tokens.items()
        }

    def forward(self, layers: int) -> float:
        """Of one forward pass with the adapter."""
        return self.passes[layers][0]

    @functools.cached_property
    def calls(self) -> float:
        """Forward passes a candidate, `policy.sampling.Plan.nfe` by the recipe alone."""
        rollout = self.recipe.rollout
        if ALGORITHMS[self.recipe.update.algorithm].samples_from == "final":  # sampled as at inference
            return 2.0 * rollout.steps - 1
        second, window = rollout.outside == "heun", rollout.window
        last = (rollout.steps - 1 if window.stop is None else window.stop) - window.size
        start = window.start if window.position == "fixed" else (window.start + last) / 2
        prefix = start * (1 + second) / (rollout.group_size if rollout.share_prefix else 1)
        return prefix + window.size + (rollout.steps - start - window.size) * (1 + second) - second

    @property
    def points(self) -> int:
        """Points a candidate: window steps, or times of the forward process."""
        times = ALGORITHMS[self.recipe.update.algorithm].forward_times
        return times(self.recipe.update) if times else self.recipe.rollout.window.size

    def candidate(self, layers: int) -> float:
        """Sampling of one candidate."""
        return self.calls * self.forward(layers)

    def anchor(self, layers: int) -> float:
        """Of one point, on average: the sampling policy's velocity, which the first optimizer step does without."""
        steps = self.recipe.update.steps
        return 0.0 if self.keeps_velocities else self.forward(layers) * (steps - 1) / steps

    @property
    def keeps_velocities(self) -> bool:
        """Whether the learner takes the sampler's velocities, whose passes have the shape of its own."""
        same = self.runtime.rollout.batch_size == self.runtime.update.microbatch and not self.runtime.model.fsdp
        return self.recipe.rollout.keep_velocities and same

    def point(self, layers: int) -> float:
        """Learning of one point, without its anchor: forward, backward, what checkpointing repeats, and the base's
        velocity where the recipe has a KL term."""
        passes = 1 + self.runtime.model.gradient_checkpointing + (self.recipe.update.kl > 0)
        return passes * self.forward(layers) + self.passes[layers][1]

    def mean(self, of: Any) -> float:
        """The mean of `of(layers)` over the groups' layer counts."""
        return sum(of(layers) for layers in self.layers) / len(self.layers)

    @property
    def candidates(self) -> int:
        """Of one iteration."""
        return self.recipe.rollout.groups * self.recipe.rollout.group_size

    def iteration(self) -> dict[str, float]:
        """Operations of one iteration by what they are for."""
        points = self.candidates * self.points
        return {
            "sampling": self.candidates * self.mean(self.candidate),
            "anchors": points * self.mean(self.anchor),
            "update": points * self.mean(self.point),
        }

    def evaluated_model(self) -> float:
        """Operations of one model's evaluation: designs evenly over the layer counts, pictures at four layers, without
        an adapter's part (half a percent)."""
        wanted = self.recipe.evaluation
        layers = list(dict.fromkeys(wanted.layers))
        pictures = 4 if 4 in layers else max(layers)
        designs = (
            wanted.designs
            / len(layers)
            * sum(self.size.forward(self.tokens(count, evaluated=True)) for count in layers)
        )
        images = wanted.pictures * self.size.forward(self.tokens(pictures, evaluated=True))
        return (2 * wanted.steps - 1) * (designs + images) / 1e12

    # ---- bytes

    def latent_bytes(self) -> float:
        """Of one iteration's trajectories: float32 latents around every window step, the final ones, and velocities
        where they are kept."""
        windowed = ALGORITHMS[self.recipe.update.algorithm].samples_from == "window"
        size = self.recipe.rollout.window.size
        kept = (size + 1 + size * self.recipe.rollout.keep_velocities if windowed else 0) + 1
        height, width = self.sides()
        frame = 4 * 64 * (height // TOKEN_PIXELS) * (width // TOKEN_PIXELS)
        return self.candidates * kept * frame * self.mean(lambda layers: layers + 1)

    def layer_bytes(self) -> float:
        """Of one iteration's layers as PNG."""
        height, width = self.sides()
        return self.candidates * self.mean(lambda layers: layers) * height * width * self.assumed.png_bytes_per_pixel

    def policy_bytes(self) -> int:
        """Of one committed policy: adapter, AdamW's moments, and averages."""
        learnt = ALGORITHMS[self.recipe.update.algorithm]
        copies = 3 + (self.recipe.update.ema is not None) + (learnt.old_decay(self.recipe.update) > 0)
        return 4 * copies * self.adapter.parameters

    def gpu_bytes(self) -> dict[Use, float]:
        """Most memory of one GPU by step: a GPU that has less is refused (policy/memory.py)."""
        uses: tuple[Use, ...] = ("sampling", "update", "evaluation")
        return {use: gpu_bytes(self.size, self.recipe, self.runtime, use) for use in uses}

    # ---- drawn iterations

    def drawn(self) -> list[list[int]]:
        """Layer counts of the groups of `DRAWS` iterations, drawn as a campaign's are: evenly, by chance."""
        chance = random.Random(0)
        return [[chance.choice(self.layers) for _ in range(self.recipe.rollout.groups)] for _ in range(DRAWS)]
