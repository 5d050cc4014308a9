"""The base in float8: a bound on its error at any scale of the weights, and no error beyond it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from layerloop.components.policy.float8 import Float8Linear, to_float8
from layerloop.components.policy.loading import load_base
from layerloop.components.policy.model import LayeredPolicy
from layerloop.components.schema.recipe import ModelRecipe


def stored(weight: torch.Tensor, bias: torch.Tensor | None = None) -> Float8Linear:
    layer = Float8Linear(weight.shape[1], weight.shape[0], bias=bias is not None, dtype=weight.dtype)
    layer.store(weight)
    if bias is not None:
        layer.bias = torch.nn.Parameter(bias, requires_grad=False)
    return layer


@pytest.mark.parametrize("std", [1e-6, 0.002, 0.005, 0.02, 1.0, 300.0])
def test_the_error_is_the_same_at_any_scale_of_the_weights(std: float) -> None:
    weight = torch.randn(64, 1024, generator=torch.Generator().manual_seed(0)) * std
    found = stored(weight).dequantised()
    error = (found - weight).norm(dim=1) / weight.norm(dim=1)
    assert 0.025 < error.mean() < 0.0275  # of a Gaussian row, on average
    assert error.max() < 0.03
    scale = to_float8(weight)[1][:, None]
    assert bool(((found - weight).abs() <= (weight.abs() / 16).clamp(min=2**-10 * scale)).all())


def test_each_row_has_a_scale_of_its_own() -> None:
    weight = torch.randn(3, 256, generator=torch.Generator().manual_seed(0)) * torch.tensor([[1e-4], [1.0], [0.0]])
    small, scale = to_float8(weight)
    assert scale[2] == 1 and not small[2].float().any()
    assert bool(((small.float().abs().amax(1) > 224) | (scale == 1)).all())  # the rows use float8's whole range
    assert torch.equal(torch.frexp(scale)[0], torch.full((3,), 0.5))  # powers of two
    assert bool(torch.isfinite(stored(torch.full((1, 4), 448.0)).dequantised()).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_has_the_bits_of_one_with_its_weights_written_out(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(48, 96, generator=generator) * torch.logspace(-4, 2, 48)[:, None]).to(dtype)
    bias = torch.randn(48, generator=generator).to(dtype)
    x = torch.randn(5, 96, generator=generator).to(dtype)
    layer = stored(weight, bias)
    assert torch.equal(layer(x), torch.nn.functional.linear(x, layer.dequantised().to(dtype), bias))
    plain = stored(weight)
    assert torch.equal(plain(x), torch.nn.functional.linear(x, plain.dequantised().to(dtype)))


def test_the_blocks_are_cast_while_they_are_read(random_folder: Path) -> None:
    full, *_ = load_base(random_folder, dtype=torch.bfloat16)
    small, *_ = load_base(random_folder, dtype=torch.bfloat16, float8=True)
    layers = dict(small.named_modules())
    inside = [
        name
        for name, module in full.named_modules()
        if isinstance(module, torch.nn.Linear) and name.startswith("transformer_blocks.")
    ]
    assert len(inside) == 2 * 14
    for name, module in full.named_modules():
        if isinstance(module, torch.nn.Linear):
            assert isinstance(layers[name], Float8Linear) == (name in inside)
            if name in inside:
                assert layers[name].weight.dtype == torch.float8_e4m3fn
                assert torch.equal(layers[name].weight.view(torch.uint8), to_float8(module.weight)[0].view(torch.uint8))
            else:
                assert torch.equal(layers[name].weight, module.weight)


def test_velocities_differ_by_little_more_than_the_weights(base_recipe, condition) -> None:  # type: ignore[no-untyped-def]
    """Were the scales lost on the way, they would have nothing in common."""
    base: ModelRecipe = base_recipe
    found = []
    for fp8 in (False, True):
        policy = LayeredPolicy.load(base.model_copy(update={"fp8_base": fp8}))
        with torch.no_grad():
            found.append(policy.velocity(policy.noise(0, 2, 64, 64), 0.7, condition))
    assert 0 < (found[1] - found[0]).norm() / found[0].norm() < 0.1
