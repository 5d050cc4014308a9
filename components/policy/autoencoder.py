"""Decoding single frames with the video VAE at the cost of images.

The VAE's convolutions are causal in time: a frame sees itself and zero padding before it. For a video of one frame
only the last temporal slice of each kernel meets data, so the 3-D convolution equals a 2-D convolution with that
slice, at about half the time; channels-last weights save another third on a CPU.
"""

from __future__ import annotations

import copy

import torch
from diffusers import AutoencoderKLQwenImage
from diffusers.models.autoencoders.autoencoder_kl_qwenimage import QwenImageCausalConv3d


class FrameConv(torch.nn.Conv2d):
    """A causal 3-D convolution restricted to one frame: `(B, C, 1, H, W)` -> `(B, C', 1, H', W')`."""

    def __init__(self, conv: QwenImageCausalConv3d) -> None:
        left, _, top, _, front, _ = conv._padding
        if front != conv.kernel_size[0] - 1:
            raise ValueError(f"kernel {conv.kernel_size} with {front} frames of padding in front is not causal")
        super().__init__(
            conv.in_channels, conv.out_channels, conv.kernel_size[1:], stride=conv.stride[1:], padding=(top, left),
            device="meta",
        )  # fmt: skip
        weight = conv.weight.detach()[:, :, -1].clone(memory_format=torch.channels_last)
        self.weight = torch.nn.Parameter(weight, requires_grad=False)
        self.bias = None if conv.bias is None else torch.nn.Parameter(conv.bias.detach().clone(), requires_grad=False)

    def forward(self, x: torch.Tensor, cache_x: torch.Tensor | None = None) -> torch.Tensor:
        return super().forward(x[:, :, 0]).unsqueeze(2)


class FrameDecoder(torch.nn.Module):
    """`vae.decode` for videos of one frame, one at a time, with folded convolutions; `vae` is left as it is."""

    def __init__(self, vae: AutoencoderKLQwenImage, *, fold: bool = True) -> None:
        super().__init__()
        self.post_quant_conv = copy.deepcopy(vae.post_quant_conv)
        self.decoder = copy.deepcopy(vae.decoder)
        if fold:
            _fold_convolutions(self)

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        """`(N, 16, 1, 2h, 2w)` -> `(N, 4, 1, H, W)` in [-1, 1].

        One frame after another: the peak of memory is that of one image whatever N is, and a frame's pixels do not
        depend on the other frames.
        """
        frames = [self.decoder(self.post_quant_conv(frame)) for frame in latents.split(1)]
        return torch.cat(frames).clamp(-1.0, 1.0)


def _fold_convolutions(module: torch.nn.Module) -> None:
    """Replace every causal 3-D convolution in `module` by a `FrameConv`, in place."""
    for name, child in list(module.named_children()):
        if name == "time_conv":  # between frames only: never runs on the first frame
            delattr(module, name)
        elif isinstance(child, QwenImageCausalConv3d):
            setattr(module, name, FrameConv(child))
        else:
            _fold_convolutions(child)
