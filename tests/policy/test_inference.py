"""Sampling as at inference, against diffusers' own pipeline with and without guidance."""

from __future__ import annotations

from pathlib import Path

import diffusers.pipelines.qwenimage.pipeline_qwenimage_layered as upstream
import numpy as np
import pytest
import torch
from diffusers import QwenImageLayeredPipeline
from PIL import Image

from layerloop.components.policy.inference import Inference, guided, sample_layers
from layerloop.components.policy.model import LayeredPolicy
from layerloop.components.policy.prompt import embed_prompts
from layerloop.components.schema.recipe import ModelRecipe


@pytest.mark.parametrize("guidance", [1.0, 60.0])
def test_layers_are_those_of_the_pipeline_with_and_without_guidance(
    random_folder: Path, frozen_policy: LayeredPolicy, make_image, monkeypatch: pytest.MonkeyPatch, guidance: float
) -> None:  # type: ignore[no-untyped-def]
    pipe = QwenImageLayeredPipeline.from_pretrained(random_folder, processor=None, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    image = make_image(48, 64)
    monkeypatch.setattr(upstream, "calculate_dimensions", lambda area, ratio: (64, 48))
    generator, width = torch.Generator().manual_seed(0), frozen_policy.transformer.config.joint_attention_dim
    prompt, blank = (torch.randn(tokens, width, generator=generator) for tokens in (9, 6))  # texts that do steer it
    out = pipe(
        image=Image.fromarray(image).convert("RGBA"), prompt="not read", layers=2, num_inference_steps=4,
        true_cfg_scale=guidance, generator=torch.Generator().manual_seed(3), output_type="pt",
        prompt_embeds=prompt[None], prompt_embeds_mask=torch.ones(1, 9, dtype=torch.long),
        negative_prompt_embeds=blank[None], negative_prompt_embeds_mask=torch.ones(1, 6, dtype=torch.long),
    )  # fmt: skip
    theirs = (out.images[0] * 255).round().permute(0, 2, 3, 1).numpy()

    def ours(weight: float) -> np.ndarray:
        how = Inference(steps=4, sampler="euler", guidance=weight)
        (stack,) = sample_layers(
            frozen_policy, image[None, ..., :3], prompt, seeds=[3], layers=2, how=how, blank_prompt=blank
        )
        assert stack is not None
        assert how.calls == (4 if weight == 1 else 8)
        return stack.astype(int)

    assert np.abs(ours(guidance) - theirs).max() <= 1  # decoding with folded convolutions
    assert np.abs(ours(4 * guidance + 40) - theirs).max() > 1


def test_guidance_goes_from_the_blank_prompts_velocity_past_the_prompts() -> None:
    x = torch.zeros(1, 2, 64)
    velocity = guided(lambda x, sigma: x + 3 * sigma, lambda x, sigma: x + sigma, 4.0)
    assert torch.equal(velocity(x, 0.5), torch.full_like(x, 0.5 + 4 * (1.5 - 0.5)))


def test_prompts_are_embedded_together_as_alone(base_recipe: ModelRecipe, prompt_embeds: torch.Tensor) -> None:
    prompt, blank = embed_prompts(base_recipe, [base_recipe.prompt, " "])
    assert torch.equal(prompt, prompt_embeds)
    assert blank.shape[0] < prompt.shape[0]


def test_an_image_has_the_same_layers_alone_and_in_a_batch(frozen_policy, prompt_embeds, make_image) -> None:  # type: ignore[no-untyped-def]
    images = np.stack([make_image(32, 32, seed=seed)[..., :3] for seed in range(3)])
    how, blank = Inference(2, guidance=3.0), prompt_embeds[:5]
    together = sample_layers(
        frozen_policy, images, prompt_embeds, seeds=[7, 8, 9], layers=2, how=how, blank_prompt=blank
    )
    for index in range(3):
        (alone,) = sample_layers(
            frozen_policy, images[index : index + 1], prompt_embeds,
            seeds=[7 + index], layers=2, how=how, blank_prompt=blank,
        )  # fmt: skip
        assert np.array_equal(alone, together[index])


def test_layers_that_are_not_finite_are_none(frozen_policy, prompt_embeds, make_image) -> None:  # type: ignore[no-untyped-def]
    image = make_image(32, 32)[None, ..., :3]
    broken = torch.full_like(prompt_embeds, torch.nan)
    assert sample_layers(frozen_policy, image, broken, seeds=[0], layers=2, how=Inference(1)) == [None]


def test_guidance_without_a_blank_prompt_is_a_mistake(frozen_policy, prompt_embeds, make_image) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match="guidance of 4 needs the blank prompt's embedding"):
        sample_layers(
            frozen_policy, make_image(32, 32)[None, ..., :3], prompt_embeds,
            seeds=[0], layers=2, how=Inference(1, guidance=4.0),
        )  # fmt: skip
