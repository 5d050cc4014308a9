"""Pretraining of the tiny policy's transformer: conditional flow matching on the latents of generated designs.

A sample is the frames [composite, layer 1 .. layer L] of one design; the condition is the clean latent of the
composite. With x_s = (1 - s) x_0 + s eps the model learns the velocity eps - x_0, as the full model did.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from diffusers import AutoencoderKLQwenImage, QwenImageTransformer2DModel
from torch import Tensor, nn

from layerloop.components.layers.designs import render_sketches
from layerloop.components.layers.stack import flatten
from layerloop.components.research.pretraining.attention import real_arithmetic
from layerloop.components.research.pretraining.autoencoder import encode_frames
from layerloop.components.research.pretraining.training import Schedule, Training

# (width, height) and the share of the designs: sides are multiples of 16, as sources are rounded to
SIZES = (((64, 64), 0.6), ((64, 48), 0.15), ((48, 64), 0.15), ((64, 32), 0.05), ((32, 64), 0.05))
LAYERS = (2, 3, 4, 5)


@dataclass(frozen=True)
class Latents:
    """Encoded designs of one size and layer count: `frames` (N, (L + 1) * T, 64) float16, the composite's T tokens
    first."""

    layers: int
    grid: tuple[int, int]  # tokens down and across
    frames: Tensor

    @property
    def shapes(self) -> list[tuple[int, int, int]]:
        """`img_shapes` of one sample: every generated frame, then the condition."""
        return [(1, *self.grid)] * (self.layers + 2)


def normalise(vae: AutoencoderKLQwenImage, latents: Tensor) -> Tensor:
    """Latents (B, z, h, w) to mean 0 and deviation 1 per channel."""
    mean = torch.tensor(vae.config.latents_mean).reshape(1, -1, 1, 1)
    std = torch.tensor(vae.config.latents_std).reshape(1, -1, 1, 1)
    return (latents - mean) / std


def pack(latents: Tensor) -> Tensor:
    """(B, z, h, w) -> tokens (B, h/2 * w/2, 4 z), channel order (z, 2, 2): the pipeline's `_pack_latents`."""
    batch, channels, height, width = latents.shape
    tokens = latents.reshape(batch, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return tokens.reshape(batch, height * width // 4, channels * 4)


@torch.no_grad()
def encode_designs(
    vae: AutoencoderKLQwenImage, stacks: np.ndarray, sources: np.ndarray | None = None, batch: int = 256
) -> Latents:
    """Latents of designs (N, L, H, W, 4) uint8; `sources` (N, H, W, 4) are what they decompose, by default their
    composite."""
    count, layers, height, width = stacks.shape[:4]
    sources = (flatten(stacks, "black") if sources is None else sources)[..., :3]
    opaque = np.concatenate([sources, np.full((*sources.shape[:-1], 1), 255, np.uint8)], axis=-1)
    frames = torch.from_numpy(np.concatenate([opaque[:, None], stacks], axis=1).reshape(-1, height, width, 4))
    parts = []
    for part in frames.split(batch):
        images = (part.permute(0, 3, 1, 2).float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            mean, _ = encode_frames(vae, images)
        parts.append(pack(normalise(vae, mean.float())).to(torch.float16))
    factor = 2 * 2 ** len(vae.temperal_downsample)
    tokens = torch.cat(parts).reshape(count, -1, 4 * vae.z_dim)
    return Latents(layers, (height // factor, width // factor), tokens)


def draw_latents(
    vae: AutoencoderKLQwenImage, *, designs: int, seed: int, sizes: Sequence[tuple[tuple[int, int], float]] = SIZES
) -> list[Latents]:
    """Encoded designs of every size and layer count, `designs` in all."""
    out = []
    for index, (size, share) in enumerate(sizes):
        for layers in LAYERS:
            rng = np.random.default_rng((seed, 3, index, layers))
            count = max(1, round(designs * share / len(LAYERS)))
            out.append(encode_designs(vae, render_sketches(rng, count=count, layers=layers, size=size)))
        print(f"transformer: {size[0]}x{size[1]} pixels encoded", flush=True)
    return out


def draw_sigmas(generator: torch.Generator, count: int, shift: float, even: float = 0.25) -> Tensor:
    """Noise levels (count,) as the sampler meets them: uniform steps through the scheduler's shift, some left even."""
    u = (torch.arange(count) + torch.rand(count, generator=generator)) / count  # stratified
    shifted = shift * u / (1 + (shift - 1) * u)
    return torch.where(torch.rand(count, generator=generator) < even, u, shifted)


def flow_loss(
    transformer: QwenImageTransformer2DModel, data: Latents, x0: Tensor, noise: Tensor, sigmas: Tensor, prompt: Tensor
) -> Tensor:
    """Mean squared error of the velocity for x0 (B, (L + 1) T, 64), noise alike, sigmas (B,), prompt (1, S, d)."""
    batch, tokens = x0.shape[:2]
    condition = x0[:, : tokens // (data.layers + 1)]
    s = sigmas[:, None, None]
    out = transformer(
        hidden_states=torch.cat([(1 - s) * x0 + s * noise, condition], dim=1),
        timestep=sigmas,
        encoder_hidden_states=prompt.expand(batch, -1, -1),
        encoder_hidden_states_mask=None,
        img_shapes=[data.shapes] * batch,
        additional_t_cond=torch.zeros(batch, dtype=torch.long),
        return_dict=False,
    )[0][:, :tokens]
    return (out.float() - (noise - x0)).square().mean()


def train_transformer(
    transformer: QwenImageTransformer2DModel,
    data: Sequence[Latents],
    prompt: Tensor,
    schedule: Schedule,
    *,
    shift: float,
    trained: nn.Module | None = None,
) -> None:
    """Train `transformer` in place; continues from transformer.pt of the schedule's work folder.

    `shift` is the scheduler's, by which the noise levels are drawn. `trained` holds the parameters that learn, such as
    an adapter's, where they are not all.
    """
    learns = transformer if trained is None else trained
    transformer.train().requires_grad_(False)
    training = Training("transformer", learns.requires_grad_(True), schedule)
    weights = torch.tensor([float(len(part.frames)) for part in data])
    training.start_clock()
    running = {part.layers: 0.0 for part in data}
    with real_arithmetic(transformer):
        while not training.done:
            generator = torch.Generator().manual_seed(schedule.seed * 1_000_003 + training.step)
            part = data[int(torch.multinomial(weights, 1, generator=generator))]
            picked = torch.randint(len(part.frames), (schedule.batch,), generator=generator)
            x0 = part.frames[picked].float()
            noise = torch.randn(x0.shape, generator=generator)
            sigmas = draw_sigmas(generator, schedule.batch, shift)
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=trained is None):  # an adapter gains nothing by it
                loss = flow_loss(transformer, part, x0, noise, sigmas, prompt)
            training.advance(loss)
            value, before = loss.item(), running[part.layers]
            running[part.layers] = 0.98 * before + 0.02 * value if before else value
            training.log({f"loss at {layers} layers": running[layers] for layers in sorted(running)})
    training.average.copy_to(learns)
    transformer.eval().requires_grad_(False)
