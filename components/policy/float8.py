"""Keeping the frozen base's weights in float8, for half the memory of bfloat16."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from diffusers import QwenImageTransformer2DModel


class Float8Linear(torch.nn.Linear):
    """A frozen linear layer whose weight is stored in float8_e4m3fn and cast to the activations' dtype to be used."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, self.weight.to(x.dtype), self.bias)


def store_in_float8(transformer: QwenImageTransformer2DModel) -> None:
    """Make every linear layer of the blocks (99 % of the full model's weights) a `Float8Linear`, in place.

    Biases, norms and what lies outside the blocks keep their dtype: they are small and sensitive. Diffusers' layerwise
    casting does the same with hooks that swap a module's parameters around its forward, which torch.compile refuses.
    """
    for layer in transformer.transformer_blocks.modules():
        if isinstance(layer, torch.nn.Linear):
            weight = layer.weight.data.to(torch.float8_e4m3fn)
            layer.__class__ = Float8Linear
            layer.weight = torch.nn.Parameter(weight, requires_grad=False)
