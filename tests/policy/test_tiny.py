"""The tiny policy that the package ships: it loads without a hub, keeps images, and decomposes designs,
imperfectly."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from layerloop.components.layers.designs import render_sketches
from layerloop.components.layers.stack import flatten
from layerloop.components.policy.tiny import (
    PROMPT,
    TEMPLATE,
    build_tiny_pipeline,
    load_tiny_pipeline,
    save_pipeline,
    tiny_folder,
)
from layerloop.components.research.pretraining.measure import compare, composite_everywhere

HELD_OUT = 901  # a seed that pretraining never draws from


@pytest.fixture(scope="module")
def pipeline():
    return load_tiny_pipeline()


@pytest.fixture
def any_size(monkeypatch):
    """Let diffusers' pipeline keep the size of an image, where it knows two resolutions only."""
    from diffusers.pipelines.qwenimage import pipeline_qwenimage_layered as module

    def keep(width, height):
        monkeypatch.setattr(module, "calculate_dimensions", lambda area, ratio: (width, height))

    return keep


def decompose(pipeline, stack, seed=0, steps=16):
    """What diffusers' own pipeline makes of a design's composite: (L, H, W, 4) uint8."""
    pipeline.set_progress_bar_config(disable=True)
    image = Image.fromarray(flatten(stack, "black")).convert("RGBA")
    layers = pipeline(
        image=image,
        prompt=PROMPT,
        true_cfg_scale=1.0,
        layers=len(stack),
        num_inference_steps=steps,
        generator=torch.Generator().manual_seed(seed),
    ).images[0]
    return np.stack([np.asarray(layer) for layer in layers])


def opaque(rgb):
    return np.concatenate([rgb, np.full((*rgb.shape[:-1], 1), 255, np.uint8)], axis=-1)


def reconstruct(vae, frames):
    images = torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        decoded = vae.decode(vae.encode(images[:, :, None]).latent_dist.mode()).sample[:, :, 0]
    return ((decoded + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


def test_the_package_carries_it_under_its_limit():
    files = [file for file in tiny_folder().rglob("*") if file.is_file()]
    assert {file.relative_to(tiny_folder()).as_posix() for file in files} >= {
        "model_index.json",
        "scheduler/scheduler_config.json",
        "tokenizer/tokenizer.json",
        "text_encoder/model.safetensors",
        "transformer/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
    }
    assert sum(file.stat().st_size for file in files) < 12e6


def test_it_is_the_architecture_that_the_builder_builds(pipeline):
    built = build_tiny_pipeline()
    for name in ("vae", "transformer", "text_encoder"):
        shapes = {key: value.shape for key, value in getattr(built, name).state_dict().items()}
        assert {key: value.shape for key, value in getattr(pipeline, name).state_dict().items()} == shapes
    assert pipeline.scheduler.config.shift == built.scheduler.config.shift == 2.5
    assert not pipeline.scheduler.config.use_dynamic_shifting


def test_its_text_encoder_is_the_builders_so_that_embeddings_are_what_it_was_trained_on(pipeline):
    with torch.no_grad():
        shipped, built = (p.encode_prompt(PROMPT)[0] for p in (pipeline, build_tiny_pipeline()))
    assert shipped.shape == (1, 11, 16)
    assert (shipped - built).abs().max() < 1e-5


def test_the_template_is_cut_where_the_prompt_begins(pipeline):
    tokens = pipeline.tokenizer(TEMPLATE.format(PROMPT)).input_ids
    assert pipeline.tokenizer.decode(tokens[34:]) == PROMPT + "<|im_end|>\n<|im_start|>assistant\n"
    assert pipeline.tokenizer.decode(pipeline.tokenizer("wörds it — never saw").input_ids) == "wörds it — never saw"


def test_temporal_slices_that_one_frame_never_meets_are_zero(pipeline):
    kernels = [value for value in pipeline.vae.state_dict().values() if value.ndim == 5 and value.shape[2] == 3]
    assert len(kernels) > 20
    assert all(kernel[:, :, :2].abs().max() == 0 for kernel in kernels)
    assert all(kernel[:, :, 2].abs().max() > 0 for kernel in kernels)


def test_its_autoencoder_keeps_designs(pipeline):
    stacks = render_sketches(np.random.default_rng(HELD_OUT), count=12, layers=3, size=(64, 64))
    composites, layers = flatten(stacks, "black"), stacks.reshape(-1, 64, 64, 4)
    kept = reconstruct(pipeline.vae, opaque(composites))
    assert np.abs(kept[..., :3].astype(float) - composites).mean() / 255 < 0.04
    kept = reconstruct(pipeline.vae, layers)
    assert np.abs(kept[..., 3].astype(float) - layers[..., 3]).mean() / 255 < 0.02
    seen = layers[..., 3] > 128
    assert np.abs(kept[..., :3].astype(float) - layers[..., :3])[seen].mean() / 255 < 0.04


def test_latents_have_mean_zero_and_deviation_one(pipeline):
    stacks = render_sketches(np.random.default_rng(HELD_OUT), count=24, layers=3, size=(64, 64))
    images = torch.from_numpy(stacks.reshape(-1, 64, 64, 4)).permute(0, 3, 1, 2).float() / 127.5 - 1
    mean, std = (torch.tensor(pipeline.vae.config[name]) for name in ("latents_mean", "latents_std"))
    with torch.no_grad():
        latents = pipeline.vae.encode(images[:, :, None]).latent_dist.mode()[:, :, 0]
    latents = (latents - mean.reshape(1, -1, 1, 1)) / std.reshape(1, -1, 1, 1)
    assert latents.mean().abs() < 0.3
    assert latents.std() == pytest.approx(1, abs=0.3)


def test_it_decomposes_designs_better_than_trivial_answers(pipeline, any_size):
    any_size(64, 64)
    truth = render_sketches(np.random.default_rng(HELD_OUT), count=10, layers=3, size=(64, 64), photo_share=0)
    made = np.stack([decompose(pipeline, stack) for stack in truth])
    empty = truth.copy()
    empty[:, 1:, ..., 3] = 0
    figures, composites, blank = (compare(layers, truth) for layers in (made, composite_everywhere(truth), empty))
    assert figures["alpha_iou"] > max(composites["alpha_iou"], blank["alpha_iou"]) + 0.2
    assert figures["alpha_iou_0"] > 0.95
    assert figures["rgb_l1_0"] < 0.7 * composites["rgb_l1_0"], "what the elements hid is filled in"
    assert figures["recomposition"] < 0.1
    assert figures["alpha_iou"] < 0.97, "nothing is left to learn: the demo needs an imperfect base"


def test_it_takes_pictures_that_are_not_square(pipeline, any_size):
    for size in ((64, 48), (32, 64)):
        any_size(*size)
        truth = render_sketches(np.random.default_rng(HELD_OUT), count=4, layers=2, size=size, photo_share=0)
        made = np.stack([decompose(pipeline, stack) for stack in truth])
        assert made.shape == truth.shape
        assert compare(made, truth)["recomposition"] < 0.15


def test_other_seeds_give_other_decompositions_and_the_same_seed_the_same(pipeline, any_size):
    any_size(64, 64)
    stack = render_sketches(np.random.default_rng(HELD_OUT), count=1, layers=4, size=(64, 64))[0]
    first, again, other = (decompose(pipeline, stack, seed, steps=6) for seed in (1, 1, 2))
    assert (first == again).all()
    assert (first != other).any()


def test_saving_leaves_the_pipeline_as_it_was_and_comes_back_the_same(tmp_path):
    built = build_tiny_pipeline(vae_dim=8, blocks=1, heads=1)
    before = {name: value.clone() for name, value in built.transformer.state_dict().items()}
    save_pipeline(built, tmp_path / "policy")
    after = built.transformer.state_dict()
    assert all(after[name].dtype == torch.float32 for name in before)
    from diffusers import QwenImageLayeredPipeline

    loaded = QwenImageLayeredPipeline.from_pretrained(tmp_path / "policy", processor=None, dtype=torch.float32)
    for name, value in loaded.transformer.state_dict().items():
        assert (value - before[name]).abs().max() < 1e-3, name


def test_its_figures_are_recorded_beside_it():
    figures = json.loads((tiny_folder() / "pretraining.json").read_text())
    assert figures["policy"].keys() == {"2", "3", "4", "5"}
    assert figures["policy"]["2"]["alpha_iou"] > 0.5
