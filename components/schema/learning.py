"""Recipe sections of the adapter and of its update, and the table of learning algorithms.

An algorithm is two things: a row of `ALGORITHMS` here, with all that sampling, storage and the model card need
(without torch), and `update_lora/<name>.py`, its batches and losses.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from layerloop.components.schema.record import SCHEMA_VERSION, Record

# Attention and feed-forward linears of both streams of a Qwen-Image block (facts: 12 modules a block).
LORA_TARGETS = (
    "to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "net.0.proj", "net.2",
)  # fmt: skip


class LoraRecipe(Record):
    """Low-rank adapter of the transformer. Defaults: the paper's r=16, alpha=16 on attention and feed-forward."""

    rank: int = Field(default=16, ge=1, le=1024)  # r (paper: 16)
    alpha: float = Field(default=16.0, gt=0)  # the product is scaled by alpha / rank (paper: 16)
    targets: tuple[str, ...] = LORA_TARGETS  # linear layers of the transformer's blocks, by the end of their names
    start_from: str | None = None  # an adapter to start with: a folder or file, s3://, hf://owner/name[/sub]

    @model_validator(mode="after")
    def _targets(self) -> Self:
        if not self.targets:
            raise ValueError(
                "recipe.lora.targets is empty: name linear layers of the transformer, such as to_q and to_v, or leave "
                f"it out for {', '.join(LORA_TARGETS)}"
            )
        return self


def _known_algorithm(name: str) -> str:
    if name not in ALGORITHMS:
        raise ValueError(f"{name!r} is not a learning algorithm: choose one of {', '.join(ALGORITHMS)}")
    return name


AlgorithmName = Annotated[str, AfterValidator(_known_algorithm)]


class NftRecipe(Record):
    """DiffusionNFT (arXiv 2509.16117): forward-process, likelihood-free."""

    beta: float = Field(default=1.0, gt=0)  # guidance strength between the implicit positive and negative policies
    timesteps: int = Field(default=4, ge=1)  # forward-process times drawn per candidate and update
    weighting: Literal["adaptive", "uniform"] = "adaptive"  # of those times (paper, section 3.3)
    old_decay: float = Field(default=0.0, ge=0, lt=1)  # EMA decay of the sampling policy towards the trained one


class UpdateRecipe(Record):
    """One iteration's learning.

    Clips are of the ratio itself: r = exp(log r) of the chosen RatioNorm is held to 1 - clip_low .. 1 + clip_high. The
    defaults are for `sum_rescale`, whose log r does not depend on the number D of latent dimensions. That of `guard` is
    1/sqrt(D) of it (1/716 for four layers at 640 pixels, D = 512,000), and that of `mean` 1/(s sqrt(D)) to first
    order, with s the step's noise: there set clips that much smaller, or nothing is ever clipped. Published ones, for
    images with D = 65,536: 2e-6 to 4e-6 for `guard` (GRPO-Guard, arXiv 2510.22319), 1e-5 to 1e-4 for `mean`
    (flow_grpo's configs).
    """

    algorithm: AlgorithmName = "grpo"  # Flow-GRPO (arXiv 2505.05470) or DiffusionNFT (arXiv 2509.16117)
    ratio_norm: Literal["sum_rescale", "guard", "mean"] = "sum_rescale"  # scale of the log-ratio, see above
    clip_low: float = Field(default=0.02, gt=0, lt=1)  # the ratio is held to 1 - clip_low and above
    clip_high: float = Field(default=0.02, gt=0)  # the ratio is held to 1 + clip_high and below
    learning_rate: float = Field(default=1e-4, gt=0)  # of AdamW, constant
    adam_betas: tuple[float, float] = (0.9, 0.999)  # decay of the gradient's first and second moment
    adam_epsilon: float = Field(default=1e-8, gt=0)  # added to the root of the second moment
    weight_decay: float = Field(default=0.0, ge=0)  # of AdamW, on the adapter
    max_grad_norm: float = Field(default=1.0, gt=0)  # clipping
    stop_grad_norm: float = Field(default=1e3, gt=0)  # a larger norm before clipping stops the step
    steps: int = Field(default=2, ge=1)  # optimizer steps per iteration; the groups are split between them
    reweight: bool = True  # gradient reweighting over the window's timesteps
    # Added to the group's deviation, by which advantages are divided
    advantage_epsilon: float = Field(default=1e-4, ge=0)
    advantage_clip: float = Field(default=5.0, gt=0)  # advantages are held to ±this (flow_grpo: 5)
    min_reward_std: float = Field(default=1e-4, ge=0)  # groups whose rewards spread no more than this are filtered
    kl: float = Field(default=0.0, ge=0)  # weight of the KL to the base: exact per window step, or the velocity's MSE
    ema: float | None = Field(default=None, gt=0, lt=1)  # decay of an averaged adapter: evaluated and published
    nft: NftRecipe = NftRecipe()

    @model_validator(mode="after")
    def _betas(self) -> Self:
        for beta in self.adam_betas:
            if not 0 <= beta < 1:
                raise ValueError(f"recipe.update.adam_betas has {beta}: choose values in [0, 1)")
        return self


@dataclass(frozen=True)
class Algorithm:
    """A learning algorithm as the steps around the update see it."""

    title: str
    arxiv: str  # of the paper
    tag: str  # on the Hugging Face hub
    settings: Callable[[UpdateRecipe], str]  # its settings in words, for the model card
    # How many times of the forward process a candidate's final latents are learned from at; None: the algorithm learns
    # from the steps of the stochastic window.
    forward_times: Callable[[UpdateRecipe], int] | None = None
    # Decay of the policy that samples towards the trained one, applied once an iteration; 0: they are the same policy.
    old_decay: Callable[[UpdateRecipe], float] = lambda _: 0.0

    @property
    def samples_from(self) -> Literal["window", "final"]:
        """Latents that are learned from: those around the steps of the stochastic window, or the final ones, which are
        then sampled as at inference, without noise."""
        return "window" if self.forward_times is None else "final"


def _grpo_settings(update: UpdateRecipe) -> str:
    return (
        f"ratio norm `{update.ratio_norm}`, clip −{update.clip_low:g} / +{update.clip_high:g}, "
        f"gradient reweighting {'on' if update.reweight else 'off'}, KL weight {update.kl:g}"
    )


def _nft_settings(update: UpdateRecipe) -> str:
    nft = update.nft
    return f"beta {nft.beta:g}, {nft.timesteps} times a candidate, {nft.weighting} weighting"


ALGORITHMS: dict[str, Algorithm] = {
    "grpo": Algorithm("Flow-GRPO", "2505.05470", "flow-grpo", _grpo_settings),
    "nft": Algorithm(
        "DiffusionNFT", "2509.16117", "diffusion-nft", _nft_settings,
        forward_times=lambda update: update.nft.timesteps, old_decay=lambda update: update.nft.old_decay,
    ),
}  # fmt: skip


class LearnerState(Record):
    """Counters of `learner.json`, next to the optimizer's tensors. Everything else derives from the campaign's seed."""

    schema_version: Literal[1] = SCHEMA_VERSION
    iteration: int = Field(ge=1)
    algorithm: AlgorithmName
    optimizer_steps: int = Field(ge=0)  # taken since the campaign started; those of AdamW's bias correction
    ema_steps: int = Field(ge=0)  # updates of the averaged adapter
