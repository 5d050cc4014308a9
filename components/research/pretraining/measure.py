"""Measures of a pretrained policy: Heun samples on designs that it was not trained on, next to trivial answers."""

from __future__ import annotations

import itertools

import numpy as np
import torch
from diffusers import QwenImageLayeredPipeline
from torch import Tensor

from layerloop.components.layers.designs import render_sketches
from layerloop.components.layers.stack import flatten
from layerloop.components.research.pretraining.autoencoder import decode_frames
from layerloop.components.research.pretraining.transformer import Latents, encode_designs


@torch.no_grad()
def sample(
    pipeline: QwenImageLayeredPipeline, data: Latents, prompt: Tensor, *, steps: int = 20, seed: int = 0
) -> np.ndarray:
    """Layers (N, L, H, W, 4) uint8, straight, bottom first, by Heun's method on the scheduler's own noise levels."""
    frames = data.frames.float()
    count, tokens = frames.shape[:2]
    per_frame = tokens // (data.layers + 1)
    condition = frames[:, :per_frame]
    pipeline.scheduler.set_timesteps(sigmas=np.linspace(1.0, 0.0, steps + 1)[:-1].tolist())
    levels = pipeline.scheduler.sigmas.tolist()

    def velocity(x: Tensor, sigma: float) -> Tensor:
        return pipeline.transformer(
            hidden_states=torch.cat([x, condition], dim=1),
            timestep=torch.full((count,), sigma),
            encoder_hidden_states=prompt.expand(count, -1, -1),
            encoder_hidden_states_mask=None,
            img_shapes=[data.shapes] * count,
            additional_t_cond=torch.zeros(count, dtype=torch.long),
            return_dict=False,
        )[0][:, :tokens]

    x = torch.randn(frames.shape, generator=torch.Generator().manual_seed(seed))
    for sigma, following in itertools.pairwise(levels):
        first = velocity(x, sigma)
        ahead = x + (following - sigma) * first
        x = ahead if following == 0 else x + (following - sigma) * (first + velocity(ahead, following)) / 2

    rows, columns = data.grid
    latents = x[:, per_frame:].reshape(count * data.layers, rows, columns, -1, 2, 2).permute(0, 3, 1, 4, 2, 5)
    latents = latents.reshape(count * data.layers, -1, rows * 2, columns * 2)
    config = pipeline.vae.config
    std, mean = (torch.tensor(values).reshape(1, -1, 1, 1) for values in (config.latents_std, config.latents_mean))
    images = torch.cat([decode_frames(pipeline.vae, part) for part in (latents * std + mean).split(64)])
    pixels = ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    return pixels.reshape(count, data.layers, *pixels.shape[1:])


def compare(predicted: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Index-aligned figures of layers (N, L, H, W, 4) uint8 against the truth, colours and alphas in [0, 1].

    alpha_iou: sum of min over sum of max of the alphas, mean over foreground layers. rgb_l1: |difference| where the
    true alpha is above 0, mean over layers. rgb_l1_0: the same of the background. blank: layers of mean alpha under
    0.005, per design. recomposition: L1 of the predicted layers' composite against the true one.
    """
    p, t = predicted.astype(np.float32) / 255, truth.astype(np.float32) / 255
    p_alpha, t_alpha = p[..., 3], t[..., 3]
    iou = np.minimum(p_alpha, t_alpha).sum((-2, -1)) / np.maximum(np.maximum(p_alpha, t_alpha).sum((-2, -1)), 1e-6)
    seen = t_alpha > 0
    rgb = (np.abs(p[..., :3] - t[..., :3]).mean(-1) * seen).sum((-2, -1)) / (seen.sum((-2, -1)) + 1e-8)
    again = np.abs(flatten(predicted, "black").astype(np.float32) - flatten(truth, "black")).mean() / 255
    return {
        "alpha_iou": float(iou[:, 1:].mean()),
        "alpha_iou_0": float(iou[:, 0].mean()),
        "rgb_l1": float(rgb.mean()),
        "rgb_l1_0": float(rgb[:, 0].mean()),
        "blank": float((p_alpha.mean((-2, -1)) < 0.005).sum(1).mean()),
        "recomposition": float(again),
    }


def composite_everywhere(truth: np.ndarray) -> np.ndarray:
    """The trivial answer: every layer is the complete image, opaque."""
    images = flatten(truth, "black")[:, None].repeat(truth.shape[1], axis=1)
    return np.concatenate([images, np.full((*images.shape[:-1], 1), 255, np.uint8)], axis=-1)


def measure_policy(
    pipeline: QwenImageLayeredPipeline, prompt: Tensor, *, designs: int = 48, steps: int = 20, seed: int = 77
) -> dict[int, dict[str, float]]:
    """`compare`'s figures by layer count 2..5, on `designs` held-out 64x64 designs each."""
    out = {}
    for layers in (2, 3, 4, 5):
        rng = np.random.default_rng((seed, 9, layers))
        truth = render_sketches(rng, count=designs, layers=layers, size=(64, 64))
        predicted = sample(pipeline, encode_designs(pipeline.vae, truth), prompt, steps=steps, seed=seed)
        out[layers] = compare(predicted, truth)
    return out


def contact_sheet(stacks: np.ndarray, *, zoom: int = 1) -> np.ndarray:
    """(H', W', 3) uint8: a row per design, its composite and then its layers on a checkerboard."""
    height, width = stacks.shape[2:4]
    board = (np.indices((height, width)) // 8).sum(0) % 2 * 50 + 180
    alpha = stacks[..., 3:].astype(np.float32) / 255
    shown = (stacks[..., :3] * alpha + board[..., None] * (1 - alpha)).astype(np.uint8)
    rows = [
        np.concatenate([flatten(stack, "black"), *tiles], axis=1) for stack, tiles in zip(stacks, shown, strict=True)
    ]
    return np.concatenate(rows, axis=0).repeat(zoom, 0).repeat(zoom, 1)
