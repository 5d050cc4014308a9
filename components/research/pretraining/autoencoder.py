"""Pretraining of the tiny policy's RGBA autoencoder.

The autoencoder is a causal video model, and a layer is a video of one frame. For one frame every causal 3-D convolution
equals a 2-D convolution with the last temporal slice of its kernel, so `encode_frames` and `decode_frames` walk
diffusers' own modules with that slice: less than half the time, the same function. The other slices are never reached;
they are set to zero and stay so.
"""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLQwenImage
from diffusers.models.autoencoders.autoencoder_kl_qwenimage import (
    QwenImageAttentionBlock,
    QwenImageCausalConv3d,
    QwenImageResample,
    QwenImageResidualBlock,
)
from torch import Tensor, nn

from layerloop.components.layers.designs import render_sketches
from layerloop.components.layers.photos import photo_crops
from layerloop.components.layers.stack import flatten
from layerloop.components.research.pretraining.training import Schedule, Training

LATENT_NOISE = 0.05  # added to the decoder's input in training: the flow's own errors are of this size


def prepare_autoencoder(vae: AutoencoderKLQwenImage, *, seed: int) -> None:
    """Start as a linear map that keeps the scale of its signal: residual branches at zero, all other kernels at unit
    gain.

    With the modules' own initialisation every convolution shrinks the signal, the norms divide by what is left of it,
    and colour, which travels as that scale, is hardly learnt. Temporal slices that a single frame never meets are
    cleared. The same `seed` gives the same weights.
    """
    generator = torch.Generator().manual_seed(seed)
    for module in vae.modules():
        if isinstance(module, QwenImageCausalConv3d | nn.Conv2d):
            nn.init.zeros_(module.weight)
            kernel = module.weight[:, :, -1] if isinstance(module, QwenImageCausalConv3d) else module.weight
            nn.init.normal_(
                kernel, std=(kernel.shape[1] * kernel.shape[2] * kernel.shape[3]) ** -0.5, generator=generator
            )
            nn.init.zeros_(cast(Tensor, module.bias))
    for module in vae.modules():
        if isinstance(module, QwenImageResidualBlock):
            nn.init.zeros_(module.conv2.weight)
        if isinstance(module, QwenImageAttentionBlock):
            nn.init.zeros_(module.proj.weight)


def encode_frames(vae: AutoencoderKLQwenImage, frames: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and log-variance (B, z, H/f, W/f) of frames (B, 4, H, W) in [-1, 1]: `vae.encode` of one-frame videos."""
    encoder = vae.encoder
    x = _conv(encoder.conv_in, frames)
    for block in encoder.down_blocks:
        x = _block(block, x)
    x = _middle(encoder.mid_block, x)
    x = _conv(encoder.conv_out, _norm_silu(encoder.norm_out, x))
    mean, log_variance = _conv(vae.quant_conv, x).chunk(2, dim=1)
    return mean, log_variance.clamp(-30, 20)


def decode_frames(vae: AutoencoderKLQwenImage, latents: Tensor) -> Tensor:
    """Frames (B, 4, H, W) of latents (B, z, H/f, W/f): `vae.decode` of one-frame videos, without its clamp to [-1,
    1]."""
    decoder = vae.decoder
    x = _conv(decoder.conv_in, _conv(vae.post_quant_conv, latents))
    x = _middle(decoder.mid_block, x)
    for up_block in decoder.up_blocks:
        for resnet in up_block.resnets:
            x = _block(resnet, x)
        for upsampler in up_block.upsamplers or ():
            x = _block(upsampler, x)
    return _conv(decoder.conv_out, _norm_silu(decoder.norm_out, x))


def _conv(module: QwenImageCausalConv3d, x: Tensor) -> Tensor:
    return F.conv2d(x, module.weight[:, :, -1], module.bias, padding=module._padding[0])


def _norm(module: Any, x: Tensor) -> Tensor:
    scale = torch.rsqrt(x.float().square().mean(1, keepdim=True) + 1e-12)
    return (x * scale).to(x.dtype) * module.gamma.reshape(1, -1, 1, 1).to(x.dtype)


def _norm_silu(module: Any, x: Tensor) -> Tensor:
    return F.silu(_norm(module, x))


def _middle(block: Any, x: Tensor) -> Tensor:
    x = _block(block.resnets[0], x)
    for attention, resnet in zip(block.attentions, block.resnets[1:], strict=True):
        x = _block(resnet, _block(attention, x))
    return x


def _block(block: Any, x: Tensor) -> Tensor:
    if isinstance(block, QwenImageResidualBlock):
        shortcut = x if isinstance(block.conv_shortcut, nn.Identity) else _conv(block.conv_shortcut, x)
        x = _conv(block.conv1, _norm_silu(block.norm1, x))
        return shortcut + _conv(block.conv2, _norm_silu(block.norm2, x))
    if isinstance(block, QwenImageResample):
        if block.mode == "downsample2d":
            return block.resample(x)
        if block.mode == "upsample2d":
            return block.resample[1](F.interpolate(x, scale_factor=2.0, mode="nearest-exact"))
        raise ValueError(f"the autoencoder resamples in time ({block.mode}): a tiny one must not")
    if isinstance(block, QwenImageAttentionBlock):
        batch, channels, height, width = x.shape
        qkv = block.to_qkv(_norm(block.norm, x)).flatten(2).transpose(1, 2)[:, None]
        attended = F.scaled_dot_product_attention(*qkv.chunk(3, dim=-1))
        return x + block.proj(attended[:, 0].transpose(1, 2).reshape(batch, channels, height, width))
    raise TypeError(f"{type(block).__name__} is not a block of this autoencoder")


def autoencoder_loss(out: Tensor, target: Tensor) -> dict[str, Tensor]:
    """Terms of the reconstruction loss for frames (B, 4, H, W) in [-1, 1].

    Colour counts by alpha, with a small floor: under alpha 0 it is never seen, but it must not be noise, since a
    neighbour's edge is blended with it when layers are resized.
    """
    difference = (out - target).float()
    alpha = (target[:, 3:].float() + 1) / 2
    weight = alpha * 0.95 + 0.05
    colour, cover = difference[:, :3], difference[:, 3:]
    total = weight.sum() * 3
    return {
        "rgb_l1": (colour.abs() * weight).sum() / total,
        "rgb_mse": (colour.square() * weight).sum() / total,
        "alpha_l1": cover.abs().mean(),
        "alpha_mse": cover.square().mean(),
    }


def draw_frames(rng: np.random.Generator, *, designs: int, side: int) -> Tensor:
    """Frames (N, 4, side, side) uint8 to learn from: composites, single layers, photographs, a few blank layers."""
    parts = []
    for layers in (2, 3, 4, 5):
        stacks = render_sketches(rng, count=designs // 4, layers=layers, size=(side, side))
        parts.append(_opaque(flatten(stacks, "black")))
        chosen = rng.permuted(np.tile(np.arange(layers), (len(stacks), 1)), axis=1)[:, :2]
        parts.append(np.take_along_axis(stacks, chosen[:, :, None, None, None], axis=1).reshape(-1, side, side, 4))
    parts.append(_opaque(photo_crops(rng, count=designs // 2, size=(side, side))))
    blank = parts[1][: designs // 50].copy()
    blank[..., 3] = 0
    parts.append(blank)
    frames = np.concatenate(parts)
    return torch.from_numpy(frames[rng.permutation(len(frames))]).permute(0, 3, 1, 2)


def _opaque(rgb: np.ndarray) -> np.ndarray:
    return np.concatenate([rgb, np.full((*rgb.shape[:-1], 1), 255, np.uint8)], axis=-1)


def _augmented_batch(frames: Tensor, generator: torch.Generator, size: int) -> Tensor:
    """A batch in [-1, 1], mirrored, its colour channels permuted and inverted at random: more colours than designs."""
    picked = frames[torch.randint(len(frames), (size,), generator=generator)].float() / 127.5 - 1
    for image in picked:
        image[:3] = image[torch.randperm(3, generator=generator)]
    sign = 1.0 - 2.0 * (torch.rand(size, 1, 1, 1, generator=generator) < 0.25).float()
    picked[:, :3] *= sign
    if torch.rand((), generator=generator) < 0.5:
        picked = picked.flip(-1)
    if torch.rand((), generator=generator) < 0.5:
        picked = picked.transpose(-1, -2)
    return picked.contiguous(memory_format=torch.channels_last)


def train_autoencoder(
    vae: AutoencoderKLQwenImage,
    schedule: Schedule,
    *,
    designs: int = 12_000,
    side: int = 64,
) -> None:
    """Train `vae` in place and set its latent statistics; continues from autoencoder.pt of the schedule's work folder.

    The frames come from `designs` designs of `side` pixels squared.
    """
    prepare_autoencoder(vae, seed=schedule.seed)
    vae.train().requires_grad_(True)
    training = Training("autoencoder", vae, schedule)
    _learn_to_reconstruct(training, vae, encode_too=True, seed=schedule.seed, designs=designs, side=side)
    training.average.copy_to(vae)
    vae.eval().requires_grad_(False)
    frames = draw_frames(np.random.default_rng((schedule.seed, 2)), designs=max(24, designs // 30), side=side)
    _set_latent_statistics(vae, frames)


def refine_decoder(
    vae: AutoencoderKLQwenImage,
    schedule: Schedule,
    *,
    designs: int = 12_000,
    side: int = 64,
) -> None:
    """Train the decoder alone for longer: the latents, and a transformer trained on them, stay as they are."""
    vae.eval().requires_grad_(False)
    decoder = nn.ModuleList([vae.post_quant_conv, vae.decoder]).train().requires_grad_(True)
    training = Training("decoder", decoder, schedule)
    _learn_to_reconstruct(training, vae, encode_too=False, seed=schedule.seed + 1, designs=designs, side=side)
    training.average.copy_to(decoder)
    decoder.eval().requires_grad_(False)


def _learn_to_reconstruct(
    training: Training,
    vae: AutoencoderKLQwenImage,
    *,
    encode_too: bool,
    seed: int,
    designs: int,
    side: int,
) -> None:
    """Reconstruct drawn frames until `training` is done; `encode_too` trains the encoder as well."""
    if training.done:
        return
    frames = draw_frames(np.random.default_rng((seed, 1)), designs=designs, side=side)
    print(f"{training.name}: {len(frames)} frames of {side}x{side} pixels drawn", flush=True)
    training.start_clock()
    while not training.done:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + training.step)
        images = _augmented_batch(frames, generator, training.schedule.batch)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            with torch.set_grad_enabled(encode_too):
                latents, _ = encode_frames(vae, images)
            noise = torch.randn(latents.shape, generator=generator)
            terms = autoencoder_loss(decode_frames(vae, latents + LATENT_NOISE * noise), images)
            loss = sum(terms.values()) + 1e-4 * latents.float().square().mean()
        training.advance(loss)
        training.log({name: value.item() for name, value in terms.items()})


@torch.no_grad()
def _set_latent_statistics(vae: AutoencoderKLQwenImage, frames: Tensor) -> None:
    """Set the latent statistics from data, and a constant variance: the noise that the decoder was trained with."""
    half = vae.z_dim
    vae.quant_conv.weight[half:] = 0
    vae.quant_conv.bias[half:] = 2 * float(np.log(LATENT_NOISE))
    latents = torch.cat([encode_frames(vae, part.float() / 127.5 - 1)[0] for part in frames.split(128)])
    vae.register_to_config(
        latents_mean=[round(value, 5) for value in latents.mean((0, 2, 3)).tolist()],
        latents_std=[round(value, 5) for value in latents.std((0, 2, 3)).tolist()],
    )


@torch.no_grad()
def measure_autoencoder(vae: AutoencoderKLQwenImage, frames: Tensor) -> dict[str, float]:
    """Reconstruction errors in [0, 1] of frames (N, 4, H, W) uint8: colour weighted by alpha, and alpha."""
    out, target = [], []
    for part in frames.split(128):
        images = part.float() / 127.5 - 1
        out.append(decode_frames(vae, encode_frames(vae, images)[0]).clamp(-1, 1))
        target.append(images)
    difference = (torch.cat(out) - torch.cat(target)).abs() / 2
    weight = (torch.cat(target)[:, 3:] + 1) / 2
    rgb = (difference[:, :3] * weight).sum() / (3 * weight.sum())
    return {"rgb_l1": rgb.item(), "alpha_l1": difference[:, 3].mean().item()}
