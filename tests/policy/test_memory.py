"""The memory of a step on one GPU: what takes more takes more, and a smaller GPU is one line."""

from __future__ import annotations

from typing import Any

import pytest

from layerloop.components.policy.memory import Use, check_gpu, gpu_bytes
from layerloop.components.policy.size import TransformerSize
from layerloop.components.schema.errors import LayerloopError, UnavailableError
from layerloop.components.schema.recipe import Recipe, parse_recipe
from layerloop.components.schema.run_recipe import packaged_recipes
from layerloop.components.schema.runtime import Runtime

PAPER = parse_recipe(packaged_recipes()["paper"])


def gigabytes(use: Use, runtime: dict[str, Any] | None = None, **model: Any) -> float:
    recipe = PAPER.model_dump()
    recipe["model"] |= model
    runtime_ = Runtime.model_validate(runtime or {})
    return gpu_bytes(TransformerSize(), Recipe.model_validate(recipe), runtime_, use) / 1e9


def test_the_paper_recipe_fits_80_gb_and_in_float8_48() -> None:
    """By hand: 40.9 of the base, 1.7 of the adapter in training, 4.1 of checkpoints, 2 to 3 of one block."""
    assert 48 < gigabytes("update") < 53
    assert 42 < gigabytes("sampling") < gigabytes("update")
    assert gigabytes("update", fp8_base=True) < 48 * 0.9
    assert gigabytes("update") - gigabytes("update", fp8_base=True) == pytest.approx(20.4, abs=0.2)


def test_batches_and_kept_activations_take_more() -> None:
    more = gigabytes("sampling", {"rollout": {"batch_size": 4}}) - gigabytes("sampling")
    assert more == pytest.approx(3 * (gigabytes("sampling", {"rollout": {"batch_size": 2}}) - gigabytes("sampling")))
    assert more > 2
    assert gigabytes("update", {"model": {"gradient_checkpointing": False}}) > 150
    assert gigabytes("update", {"update": {"microbatch": 2}}) > gigabytes("update") + 6
    assert gigabytes("evaluation", {"evaluation": {"batch_size": 8}}) > gigabytes("evaluation") + 4


def test_a_smaller_gpu_is_refused_in_one_line() -> None:
    check_gpu(50e9, use="update", free=50e9, total=80e9, name="cuda:0")
    with pytest.raises(LayerloopError) as caught:
        check_gpu(50.5e9, use="update", free=44.5e9, total=47.7e9, name="cuda:0 (NVIDIA L40S)")
    assert type(caught.value) is LayerloopError  # no other attempt is worth it
    assert str(caught.value) == (
        "cuda:0 (NVIDIA L40S) has 44.5 of 47.7 GB free, update needs about 50.5 GB: take a larger GPU, share the base "
        "with runtime.model.fsdp, lower runtime.update.microbatch to 1, or begin a campaign with recipe.model.fp8_base"
    )
    with pytest.raises(UnavailableError, match="50.5 GB: end what else runs on it, take"):
        check_gpu(50.5e9, use="sampling", free=30e9, total=80e9, name="cuda:0")
