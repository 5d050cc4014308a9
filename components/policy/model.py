"""The layered model as an RL policy: load, encode a condition, predict a velocity, decode layers.

Diffusers' `QwenImageLayeredPipeline` cannot be trained through (`no_grad`), mixes the layers of different images when
the batch is larger than one, and has two resolutions. This class runs the same modules with the same arithmetic
without those limits; a test holds the two equal bit for bit where the pipeline is right (one image).

Tensor dimensions: B batch, L layers, S = (L+1)*h*w packed tokens, where h = H / (2 * VAE factor), w likewise, and
frame 0 is the regenerated composite; T prompt tokens of width E.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Self

import numpy as np
import torch

from layerloop.components.policy import schedule
from layerloop.components.policy.autoencoder import FrameDecoder
from layerloop.components.policy.base_files import base_folder
from layerloop.components.policy.fingerprint import fingerprint
from layerloop.components.policy.loading import DTYPES, load_base
from layerloop.components.schema.errors import LayerloopError
from layerloop.components.schema.recipe import ModelRecipe
from layerloop.components.schema.runtime import ModelRuntime

if TYPE_CHECKING:
    from diffusers import AutoencoderKLQwenImage, FlowMatchEulerDiscreteScheduler, QwenImageTransformer2DModel


@dataclasses.dataclass(frozen=True)
class Condition:
    """Condition of a decomposition: source images of one size and one prompt.

    `latents` is `(B, h*w, 64)` float32, clean (never noised); `prompt_embeds` is `(1 or B, T, E)`, without padding
    (so no attention mask is needed); height and width are pixels.
    """

    latents: torch.Tensor
    prompt_embeds: torch.Tensor
    height: int
    width: int


@contextlib.contextmanager
def _without_warnings(logger: str) -> Iterator[None]:
    """Keep one library module's warnings off the log."""
    log = logging.getLogger(logger)
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


class LayeredPolicy:
    """A frozen base model with or without an adapter. Always in evaluation mode: nothing in it is random."""

    packed_channels = 64  # 16 latent channels in 2x2 patches

    def __init__(
        self,
        *,
        transformer: QwenImageTransformer2DModel,
        vae: AutoencoderKLQwenImage,
        scheduler: FlowMatchEulerDiscreteScheduler,
        folder: Path | None = None,
    ) -> None:
        """From diffusers modules, which are used as they are."""
        self.transformer = transformer.eval().requires_grad_(False)
        self.vae = vae.eval().requires_grad_(False)
        self.scheduler = scheduler
        self.folder = folder
        self.decoder = FrameDecoder(self.vae)
        self.vae_factor = 2 ** len(self.vae.temperal_downsample)
        self.latent_channels = int(self.vae.config.z_dim)
        self.sharded = False  # whether ranks share the base (sharding.py): then all must call it equally often

    @classmethod
    def load(
        cls,
        model: ModelRecipe,
        runtime: ModelRuntime | None = None,
        *,
        device: str | torch.device = "cpu",
        folder: Path | None = None,
    ) -> Self:
        """Load `model.base`: "tiny", a local folder, or a Hugging Face id (of `model.revision`).

        Args:
            runtime: how the model is run; by default ModelRuntime's defaults.
            device: where the modules go.
            folder: a local copy of the base that the caller fetched, for a base that is an object store's URI.

        Raises:
            LayerloopError: the base cannot be found, lacks a file, or is not a layered model.
        """
        folder = base_folder(model) if folder is None else folder
        runtime, dtype = runtime or ModelRuntime(), DTYPES[model.dtype]
        try:
            # before any adapter is added, whose weights stay float32
            transformer, vae, scheduler = load_base(folder, dtype=dtype, device=device, float8=model.fp8_base)
        except LayerloopError as error:  # a path in a cache means nothing to the reader
            raise LayerloopError(f"recipe.model.base is {model.base}: {error}") from error.__cause__
        policy = cls(transformer=transformer, vae=vae, scheduler=scheduler, folder=folder)
        try:
            with _without_warnings("diffusers.models.modeling_utils"):  # it calls itself experimental every time
                policy.transformer.set_attention_backend(runtime.attention)
        except (ValueError, RuntimeError, ImportError) as error:
            reason = " ".join(str(error).split())
            raise LayerloopError(
                f"runtime.model.attention is {runtime.attention!r}, which is not available: {reason}"
            ) from None
        if runtime.gradient_checkpointing:
            policy.transformer.enable_gradient_checkpointing()  # acts only where gradients are enabled
        if runtime.compile:
            # One code object serves all blocks, with and without gradients, an adapter, the last block's dead layers,
            # and for a first and then any shape: more variants than the 8 that torch expects.
            torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
            policy.transformer.compile_repeated_blocks(fullgraph=True)
        return policy

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256, hex, over names and contents of the configs and weights of transformer, VAE and scheduler."""
        if self.folder is None:
            raise ValueError("a policy that was not loaded from a folder has no fingerprint")
        return fingerprint(self.folder)

    @property
    def device(self) -> torch.device:
        """The transformer's device."""
        return next(self.transformer.parameters()).device

    @functools.cached_property
    def dtype(self) -> torch.dtype:
        """Of the base's arithmetic; the adapter is float32 in any case."""
        return self.vae.dtype

    @property
    def pixel_multiple(self) -> int:
        """Image sides must be multiples of this many pixels."""
        return 2 * self.vae_factor

    def tokens(self, height: int, width: int) -> tuple[int, int]:
        """(h, w) packed tokens of one frame of `height` x `width` pixels.

        Raises:
            LayerloopError: a side is not a multiple of `pixel_multiple`.
        """
        for name, side in (("height", height), ("width", width)):
            if side <= 0 or side % self.pixel_multiple:
                raise LayerloopError(
                    f"image {name} is {side} pixels: the model needs a multiple of {self.pixel_multiple}, "
                    f"set recipe.data.multiple to {self.pixel_multiple} or a multiple of it"
                )
        return height // self.pixel_multiple, width // self.pixel_multiple

    # ---- condition

    @torch.no_grad()
    def encode(self, images: np.ndarray, prompt_embeds: torch.Tensor) -> Condition:
        """Condition on `images` `(B, H, W, 3 or 4)` uint8 and a prompt embedding `(T, E)` or `(1 or B, T, E)`.

        RGB gets an opaque alpha, as in the released application. The posterior's mode is taken, image by image, so
        that a batch gives what its images give alone.
        """
        if images.ndim != 4 or images.dtype != np.uint8 or images.shape[-1] not in (3, 4):
            raise ValueError(f"images are {images.dtype} {images.shape}, not uint8 (B, H, W, 3 or 4)")
        height, width = images.shape[1:3]
        self.tokens(height, width)
        if images.shape[-1] == 3:
            images = np.concatenate([images, np.full_like(images[..., :1], 255)], axis=-1)
        pixels = torch.tensor(images).permute(0, 3, 1, 2).to(self.device, torch.float32)
        pixels = (2.0 * (pixels / 255.0) - 1.0).unsqueeze(2).to(self.dtype)  # (B, 4, 1, H, W) in [-1, 1]
        latents = torch.cat([self.vae.encode(image).latent_dist.mode() for image in pixels.split(1)])
        mean, std = self._latent_statistics(latents)
        frames = ((latents - mean) / std).permute(0, 2, 1, 3, 4)  # (B, 1, 16, 2h, 2w)
        if prompt_embeds.ndim == 2:
            prompt_embeds = prompt_embeds[None]
        return Condition(
            latents=self._pack(frames).float(), prompt_embeds=prompt_embeds.to(self.device, self.dtype),
            height=height, width=width,
        )  # fmt: skip

    # ---- policy

    def velocity(self, latents: torch.Tensor, sigma: float | torch.Tensor, condition: Condition) -> torch.Tensor:
        """The model's v = eps - x0 at `x_sigma = (1-sigma) x0 + sigma eps`.

        `latents` is `(B, S, 64)` float32; `sigma` in (0, 1] is one number for the batch, or a float32 tensor `(B,)`.
        Returns `(B, S, 64)` float32. Gradients flow to the adapter; wrap in `torch.no_grad()` where none are wanted.

        The time is rounded exactly as the pipeline rounds it: float32 sigma * 1000, cast to the model's dtype, / 1000.
        With one sigma for the batch, the time embedding and all modulations are computed once and broadcast: cheaper,
        and what makes a row's result independent of how many other rows there are.
        """
        batch, length, _ = latents.shape
        h, w = self.tokens(condition.height, condition.width)
        frames, rest = divmod(length, h * w)
        if rest or frames < 2:
            raise ValueError(f"{length} tokens are not (L+1) frames of {h}x{w}")
        condition_latents = condition.latents.expand(batch, -1, -1)
        hidden = torch.cat([latents, condition_latents], dim=1).to(self.dtype)
        if not isinstance(sigma, torch.Tensor):
            sigma = torch.tensor([sigma], dtype=torch.float32)
        time = (sigma.reshape(-1).to(self.device, torch.float32) * self.scheduler.config.num_train_timesteps).to(
            self.dtype
        )
        output = self.transformer(
            hidden_states=hidden,
            timestep=time / 1000,
            encoder_hidden_states=condition.prompt_embeds.expand(batch, -1, -1),
            encoder_hidden_states_mask=None,  # all samples share one prompt; some attention backends refuse a mask
            img_shapes=[[(1, h, w)] * (frames + 1)],  # the position encoding reads the first sample's only
            additional_t_cond=torch.zeros(time.shape[0], dtype=torch.long, device=self.device),  # "not plain RGB"
            return_dict=False,
        )[0]
        return output[:, :length].float()

    def sigmas(self, steps: int, height: int, width: int) -> tuple[float, ...]:
        """The inference schedule of `steps` steps for this image size: see `schedule.sigmas`."""
        h, w = self.tokens(height, width)
        return schedule.sigmas(self.scheduler, steps, condition_tokens=h * w)

    def noise(self, seed: int, layers: int, height: int, width: int) -> torch.Tensor:
        """Initial noise `(1, S, 64)` float32 on the CPU, as the pipeline draws it with a CPU generator of this seed."""
        h, w = self.tokens(height, width)
        generator = torch.Generator().manual_seed(seed)
        shape = (1, layers + 1, self.latent_channels, 2 * h, 2 * w)
        return self._pack(torch.randn(shape, generator=generator, dtype=torch.float32))

    # ---- layers

    @torch.no_grad()
    def decode(self, latents: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """Straight RGBA layers `(B, L, 4, H, W)` float32 in [0, 1], bottom first, of final latents `(B, S, 64)`.

        Frame 0, the regenerated composite, is dropped. Each layer is decoded as a video of one frame.
        """
        h, w = self.tokens(height, width)
        batch, length, channels = latents.shape
        frames = length // (h * w)
        if frames < 2 or length != frames * h * w:
            raise ValueError(f"{length} tokens are not (L+1) frames of {h}x{w}")
        grid = latents.to(self.device).view(batch, frames, h, w, channels // 4, 2, 2)
        grid = grid.permute(0, 1, 4, 2, 5, 3, 6).reshape(batch, frames, channels // 4, 2 * h, 2 * w)
        mean, std = self._latent_statistics(grid)
        layers = grid[:, 1:].reshape(-1, channels // 4, 1, 2 * h, 2 * w).to(self.dtype)
        # dividing by the reciprocal, as the pipeline does, for its bits
        pixels = self.decoder(layers / (1.0 / std.to(self.dtype)) + mean.to(self.dtype))
        pixels = (pixels.float() * 0.5 + 0.5).clamp(0, 1)
        return pixels.view(batch, frames - 1, 4, height, width)

    def layers_uint8(self, latents: torch.Tensor, height: int, width: int) -> np.ndarray:
        """Layer stacks `(B, L, H, W, 4)` uint8 of final latents, rounded to nearest as the pipeline does."""
        pixels = (self.decode(latents, height, width) * 255).round().to(torch.uint8)
        return pixels.permute(0, 1, 3, 4, 2).contiguous().cpu().numpy()

    # ---- adapter

    def trainable_parameters(self) -> dict[str, torch.nn.Parameter]:
        """Name -> parameter of what requires a gradient (the adapter's matrices), in the model's order."""
        return {name: p for name, p in self.transformer.named_parameters() if p.requires_grad}

    @contextlib.contextmanager
    def without_adapter(self) -> Iterator[None]:
        """Within this context the policy is the frozen base, bit for bit."""
        adapted = bool(getattr(self.transformer, "_hf_peft_config_loaded", False))
        trainable = [p for name, p in self.transformer.named_parameters() if ".lora_" in name and p.requires_grad]
        if adapted:
            self.transformer.disable_adapters()
        try:
            yield
        finally:
            if adapted:
                self.transformer.enable_adapters()  # makes every adapter trainable, a frozen one as well
                self.transformer.requires_grad_(False)
                for parameter in trainable:
                    parameter.requires_grad_(True)

    # ---- packing

    def _latent_statistics(self, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The VAE's per-channel mean and standard deviation, `(1, 16, 1, 1, 1)` as `like`'s dtype and device."""
        shape = (1, self.latent_channels, 1, 1, 1)
        mean = torch.tensor(self.vae.config.latents_mean).view(shape).to(like.device, like.dtype)
        std = torch.tensor(self.vae.config.latents_std).view(shape).to(like.device, like.dtype)
        return mean, std

    @staticmethod
    def _pack(frames: torch.Tensor) -> torch.Tensor:
        """`(B, F, C, 2h, 2w)` -> `(B, F*h*w, 4C)`, channels of a token in the order (c, row, column)."""
        b, f, c, rows, columns = frames.shape
        patches = frames.reshape(b, f, c, rows // 2, 2, columns // 2, 2).permute(0, 1, 3, 5, 2, 4, 6)
        return patches.reshape(b, f * (rows // 2) * (columns // 2), 4 * c)
