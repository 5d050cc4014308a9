"""Sampling as at inference, against diffusers' own pipeline with and without guidance."""

from __future__ import annotations

from pathlib import Path

import diffusers.pipelines.qwenimage.pipeline_qwenimage_layered as upstream
import numpy as np
import pytest
import torch
from diffusers import QwenImageLayeredPipeline
from PIL import Image

from layerloop.components.policy.inference import Inference, sample_layers
from layerloop.components.policy.model import LayeredPolicy
from layerloop.components.policy.prompt import embed_prompts
from layerloop.components.schema.recipe import ModelRecipe

PROMPT = "a clean, well composed image"


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_layers_are_those_of_the_pipeline_with_and_without_guidance(
    random_folder: Path, frozen_policy: LayeredPolicy, make_image, monkeypatch: pytest.MonkeyPatch, guidance: float
) -> None:  # type: ignore[no-untyped-def]
    pipe = QwenImageLayeredPipeline.from_pretrained(random_folder, processor=None, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    image = make_image(48, 64)
    monkeypatch.setattr(upstream, "calculate_dimensions", lambda area, ratio: (64, 48))
    out = pipe(
        image=Image.fromarray(image).convert("RGBA"), prompt=PROMPT, negative_prompt=" ", layers=2,
        num_inference_steps=4, true_cfg_scale=guidance, generator=torch.Generator().manual_seed(3), output_type="pt",
    )  # fmt: skip
    theirs = (out.images[0] * 255).round().permute(0, 2, 3, 1).numpy()
    model = ModelRecipe(base=str(random_folder), dtype="float32", prompt=PROMPT)
    prompt, blank = embed_prompts(model, [PROMPT, " "])
    how = Inference(steps=4, sampler="euler", guidance=guidance)
    (ours,) = sample_layers(
        frozen_policy, image[None, ..., :3], prompt, seeds=[3], layers=2, how=how, blank_prompt=blank
    )
    assert ours is not None
    assert np.abs(ours.astype(int) - theirs).max() <= 1  # decoding with folded convolutions
    assert how.calls == (4 if guidance == 1 else 8)


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
