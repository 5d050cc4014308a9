"""The recipe: everything that defines a campaign. Where and how fast it runs is the runtime (runtime.py)."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from layerloop.components.schema.errors import LayerloopError
from layerloop.components.schema.judging import JudgeRecipe
from layerloop.components.schema.learning import LoraRecipe, UpdateRecipe
from layerloop.components.schema.record import SEAL, Record, canonical_json, validate
from layerloop.components.schema.runtime import checked_values, flat, split_runtime
from layerloop.components.schema.yaml_text import load_yaml

TINY, FAULTY = "tiny", "tiny-faulty"  # bases that ship with layerloop: a toy, and the same with faults to unlearn
SHIPPED = (TINY, FAULTY)


class ModelRecipe(Record):
    """The frozen base: one that ships with layerloop, a Hugging Face id, or a folder or s3:// URI in diffusers'
    layout."""

    # "tiny" or "tiny-faulty" (shipped), a Hugging Face id, or a folder or s3:// URI in diffusers' layout
    base: str = "Qwen/Qwen-Image-Layered"
    revision: str | None = None  # commit, tag or branch of a Hugging Face base; none: its main branch
    dtype: Literal["float32", "bfloat16"] = "bfloat16"  # of the frozen base; adapter and latents are float32
    prompt: str = "a clean, well composed image"  # the released model's; a basic prompt beats a detailed one (paper)
    fp8_base: bool = False  # store the frozen base in float8_e4m3fn

    @property
    def shipped(self) -> bool:
        """Whether the base is a toy that ships with layerloop."""
        return self.base in SHIPPED


class DesignsRecipe(Record):
    """How held-out designs become true layers (layers/truth.py)."""

    transparent: Literal["keep", "drop"] = "keep"  # elements whose image is nowhere opaque; LayerD drops them
    layers: Literal["elements", "groups"] = "elements"  # groups: what does not overlap is one layer (LayerD's grouping)
    fonts: str | None = None  # folder (or s3://, hf://) of font files for texts, which are previews otherwise


class DataRecipe(Record):
    """Normalisation of source images, and limits beyond which they are rejected."""

    resolution: int = Field(default=640, ge=16)  # longest side, pixels
    multiple: int = Field(default=16, ge=8)  # sides are rounded to this
    images_per_shard: int = Field(default=256, ge=1)  # of the sources
    max_megapixels: float = Field(default=100.0, gt=0)  # a larger image is rejected before it is decoded
    max_reject_fraction: float = Field(default=0.1, ge=0, le=1)  # share of unusable images at which sharding stops
    duplicate_bits: int = Field(default=3, ge=0, le=64)  # difference-hash distance up to which images are duplicates
    duplicates: Literal["near", "exact"] = "near"  # which are left out; exact: only those of equal pixels
    holdout: int = Field(default=8, ge=0)  # images set aside for evaluation
    designs: DesignsRecipe = DesignsRecipe()


class WindowRecipe(Record):
    """The stochastic steps. `fixed` starts at `start`; `random` draws a start per group in [start, stop-size];
    `sliding` advances by `stride` steps an iteration through the same range, and wraps."""

    size: int = Field(default=4, ge=1)  # steps that are stochastic and trained on
    position: Literal["fixed", "random", "sliding"] = "fixed"  # how the place of the window is chosen, see above
    start: int = Field(default=0, ge=0)  # its first step, or the begin of the range
    stop: int | None = None  # exclusive end of the range; None: steps-1 (the last step is never stochastic)
    stride: int = Field(default=1, ge=1)  # steps that a sliding window advances an iteration


class NoiseRecipe(Record):
    """Noise level eta of the window's steps; `decay` goes linearly from `eta` to `final_eta` over the window.

    `cps`: a step leaves noise of level sigma', of which sigma' sin(eta pi/2) is fresh; eta is at most 1, where
    all of it is. `flow_sde`: the fresh noise is proportional to eta, without an upper bound.
    """

    # Flow-SDE (Flow-GRPO, arXiv 2505.05470) or CPS (arXiv 2509.05952)
    dynamics: Literal["flow_sde", "cps"] = "flow_sde"
    eta: float = Field(default=0.7, gt=0)  # noise level of the window's first step (flow_grpo: 0.7 to 1.5)
    schedule: Literal["constant", "decay"] = "constant"  # whether it stays over the window
    final_eta: float = Field(default=0.3, gt=0)  # noise level of the window's last step, where it decays

    @model_validator(mode="after")
    def _quarter_turn(self) -> Self:
        used = {"eta": self.eta} | ({"final_eta": self.final_eta} if self.schedule == "decay" else {})
        for name, value in used.items():
            if self.dynamics == "cps" and value > 1:
                raise ValueError(
                    f"recipe.rollout.noise.{name} is {value} but dynamics is cps, whose noise sigma' sin(eta pi/2) "
                    "is greatest at 1: choose at most 1"
                )
        return self


class RolloutRecipe(Record):
    """One iteration's sampling."""

    groups: int = Field(default=16, ge=1)  # images per iteration
    group_size: int = Field(default=8, ge=2)  # candidates of an image, G
    # L of a group is drawn from min_layers..max_layers, uniformly (paper: 2 to 5)
    min_layers: int = Field(default=2, ge=1, le=20)
    max_layers: int = Field(default=5, ge=1, le=20)  # the base was trained on up to 20
    steps: int = Field(default=10, ge=2)  # of the sampler, per candidate
    # Solver of the steps outside the window; Heun asks the model twice a step
    outside: Literal["heun", "euler"] = "heun"
    # Solver of all steps where there is no window: of algorithms that learn from final latents (nft)
    whole: Literal["heun", "euler"] = "heun"
    # Longest side of the pictures that are sampled and learnt from, pixels; None: as they are (data.resolution), which
    # evaluations take in any case. At half the side a forward costs a fifth, and the judge sees as much less.
    resolution: int | None = Field(default=None, ge=16)
    window: WindowRecipe = WindowRecipe()
    noise: NoiseRecipe = NoiseRecipe()
    # Keep the velocities of the window's steps with the trajectories (half as many bytes again for them), so that the
    # learner needs no second pass for those that its own passes would give bit for bit; it tries one pass of each shape
    keep_velocities: bool = False
    share_prefix: bool = False  # one initial noise and one deterministic prefix for the complete group
    # Iterations by which the policy that samples lags behind the one that learns. With 1 a resident stretch samples
    # while the iteration before is judged, whatever the judge takes; the learner's ratios then start off 1.
    lag: int = Field(default=0, ge=0, le=1)

    def sampler(self, iteration: int) -> int:
        """The iteration whose policy samples `iteration`."""
        return max(0, iteration - 1 - self.lag)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        where = "recipe.rollout"
        if self.min_layers > self.max_layers:
            raise ValueError(
                f"{where}.min_layers is {self.min_layers} but max_layers is {self.max_layers}: "
                f"choose 1..{self.max_layers}"
            )
        window, last = self.window, self.steps - 1
        if window.size > last:
            raise ValueError(f"{where}.window.size is {window.size} but steps is {self.steps}: choose 1..{last}")
        stop = last if window.stop is None else window.stop
        if stop < window.size:
            raise ValueError(
                f"{where}.window.stop is {stop} but window.size is {window.size}, which does not fit before it: "
                f"choose {window.size}..{last}, or a smaller size"
            )
        if stop > last:
            raise ValueError(
                f"{where}.window.stop is {stop} but steps is {self.steps}: choose {window.size}..{last}, "
                "the last step is never stochastic"
            )
        if window.start + window.size > stop:
            raise ValueError(
                f"{where}.window.start is {window.start} with size {window.size}, past its end {stop}: "
                f"choose 0..{stop - window.size}"
            )
        return self


class EvaluationRecipe(Record):
    """Samples of `evaluate_adapter`, made exactly as at inference."""

    steps: int = Field(default=50, ge=1)  # Heun steps
    layers: tuple[int, ...] = (2, 3, 4)  # layer counts at which each case is decomposed
    designs: int = Field(default=32, ge=0)  # held-out designs with ground truth
    pictures: int = Field(default=8, ge=0)  # held-out unlabelled images
    max_edits: int = Field(default=5, ge=0, le=5)  # LayerD's merges


class RetentionRecipe(Record):
    """What of past iterations stays once the next policy is committed; everything, unless it is limited here. Scores
    and manifests always stay, and so does the record of what was removed."""

    # Iterations whose rollouts (latents and layers) stay: the last so many; None: of all
    trajectories: int | None = Field(default=None, ge=1)
    # Every how many-th policy stays, beside the last two and those that were evaluated or published; None: each
    policies: int | None = Field(default=None, ge=1)
    # Iterations whose stored judge replies stay: the last so many; None: of all
    replies: int | None = Field(default=None, ge=1)


class Recipe(Record):
    """A campaign's definition, frozen by its first run."""

    # Of the recipe; published adapters are called by it where the campaign's folder has no name
    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]*$", max_length=63)
    seed: int = Field(default=0, ge=0)  # all randomness of the campaign follows from it
    model: ModelRecipe = ModelRecipe()
    data: DataRecipe = DataRecipe()
    rollout: RolloutRecipe = RolloutRecipe()
    judge: JudgeRecipe = JudgeRecipe()
    lora: LoraRecipe = LoraRecipe()
    update: UpdateRecipe = UpdateRecipe()
    evaluation: EvaluationRecipe = EvaluationRecipe()
    retention: RetentionRecipe = RetentionRecipe()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.judge.min_valid > self.rollout.group_size:
            raise ValueError(
                f"recipe.judge.min_valid is {self.judge.min_valid} but rollout.group_size is "
                f"{self.rollout.group_size}: choose 2..{self.rollout.group_size}"
            )
        if self.sampled_resolution > self.data.resolution:
            raise ValueError(
                f"recipe.rollout.resolution is {self.rollout.resolution} but the pictures are of "
                f"{self.data.resolution} pixels (data.resolution): choose at most that"
            )
        return self

    @property
    def sampled_resolution(self) -> int:
        """Longest side of the pictures that are sampled, pixels."""
        return self.rollout.resolution or self.data.resolution


def parse_recipe(text: str | bytes) -> Recipe:
    """A recipe from YAML (or JSON) text; values that belong to the runtime are left out (`parse_recipe_runtime`).

    Raises:
        LayerloopError: as `parse_recipe_runtime`.
    """
    return parse_recipe_runtime(text)[0]


def parse_recipe_runtime(text: str | bytes) -> tuple[Recipe, dict[str, Any]]:
    """A recipe from YAML (or JSON) text, and the runtime's values in it: recipes held them once.

    Raises:
        LayerloopError: not YAML, a misspelt key, or an impossible value, in one line that names it and the remedy.
    """
    value: Any = load_yaml(text, where="recipe")
    if not isinstance(value, dict):
        raise LayerloopError(f"recipe is {type(value).__name__}, not a mapping: start from a file of pipelines/recipes")
    value.pop(SEAL, None)  # of a campaign's recipe.json that somebody begins another recipe with
    return split_recipe(value, where="recipe")


def split_recipe(values: Mapping[str, Any], *, where: str) -> tuple[Recipe, dict[str, Any]]:
    """A recipe and the runtime values in it from decoded text, both checked.

    Raises:
        LayerloopError: a misspelt key or an impossible value, in one line that begins with `where`.
    """
    recipe, runtime = split_runtime(values)
    return validate(Recipe, recipe, where=where), checked_values(runtime, where=where)


def recipe_differences(ours: Recipe, theirs: Recipe) -> list[str]:
    """Fields that differ, as `path: theirs -> ours` lines, in a fixed order. A rubric is one value."""
    left, right = _comparable(theirs), _comparable(ours)
    return [
        f"{key}: {left.get(key)!r} -> {right.get(key)!r}"
        for key in sorted(left | right)
        if left.get(key) != right.get(key)
    ]


def _comparable(recipe: Recipe) -> dict[str, Any]:
    values = recipe.model_dump(mode="json")
    if not isinstance(rubric := values["judge"]["rubric"], str):
        known = hashlib.sha256(canonical_json(rubric)).hexdigest()[:12]
        values["judge"]["rubric"] = f"{rubric.get('name')} {rubric.get('version')} ({known})"
    return flat(values)
