"""Checks before a campaign starts: whatever later steps would refuse of the base, found without its weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from layerloop.components.policy.adapter_files import write_peft
from layerloop.components.policy.lora import adapter_of, new_adapter, put_adapter
from layerloop.components.policy.model import LayeredPolicy
from layerloop.components.policy.preflight import preflight
from layerloop.components.schema.errors import LayerloopError
from layerloop.components.schema.learning import LoraRecipe
from layerloop.components.schema.recipe import Recipe, parse_recipe
from layerloop.components.schema.runtime import ModelRuntime
from layerloop.pipelines.inputs import packaged_recipes


@pytest.fixture
def folder(random_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(random_folder, tmp_path / "model"))


def recipe_for(base: Path | str, **sections: Any) -> Recipe:
    return Recipe.model_validate({"name": "test", "model": {"base": str(base), "dtype": "float32"}, **sections})


def refusal(recipe: Recipe, **more: Any) -> str:
    with pytest.raises(LayerloopError) as caught:
        preflight(recipe, **more)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def without_weights(folder: Path) -> None:
    """Every file is there, and none of the large ones can be read."""
    for file in folder.rglob("*.safetensors"):
        file.write_bytes(b"never read")


def change_config(file: Path, **fields: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def test_no_weights_are_read(folder: Path) -> None:
    without_weights(folder)
    preflight(recipe_for(folder))


def test_the_released_models_size_is_checked_without_its_memory(folder: Path) -> None:
    """20 billion weights as float32 would be 82 GB."""
    without_weights(folder)
    size = {"num_layers": 60, "num_attention_heads": 24, "attention_head_dim": 128, "axes_dims_rope": [16, 56, 56]}
    change_config(folder / "transformer/config.json", **size)
    preflight(recipe_for(folder))
    assert "recipe.lora.targets has '60.attn.to_q'" in refusal(recipe_for(folder, lora={"targets": ["60.attn.to_q"]}))
    preflight(recipe_for(folder, lora={"targets": ["59.attn.to_q"]}))


@pytest.mark.parametrize(
    "name",
    [
        "transformer/diffusion_pytorch_model.safetensors",
        "vae/config.json",
        "scheduler/scheduler_config.json",
        "text_encoder/model.safetensors",
        "tokenizer/tokenizer_config.json",
        "tokenizer/tokenizer.json",
    ],
)
def test_a_missing_file_of_any_part_is_named_with_the_recipes_field(folder: Path, name: str) -> None:
    (folder / name).unlink()
    assert refusal(recipe_for(folder)).startswith(f"recipe.model.base is {folder}: {folder}/{name} is missing")


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("transformer/config.json", {"use_layer3d_rope": False}, "transformer/config.json has use_layer3d_rope False"),
        (
            "transformer/config.json",
            {"num_layers": "many"},
            "transformer/config.json does not describe a transformer that can be built ('str' object",
        ),
        ("vae/config.json", {"dim_mult": 3}, "vae/config.json does not describe a vae that can be built ("),
        (
            "transformer/config.json",
            {"joint_attention_dim": 24},
            "its text encoder makes tokens of width 16, its transformer takes 24",
        ),
    ],
    ids=["kind", "transformer", "vae", "text"],
)
def test_configs_of_no_such_model_are_refused(folder: Path, name: str, fields: dict[str, object], message: str) -> None:
    change_config(folder / name, **fields)
    line = refusal(recipe_for(folder))
    assert line.startswith(f"recipe.model.base is {folder}: ")
    assert message in line


def test_sides_are_multiples_of_what_the_autoencoder_takes(folder: Path) -> None:
    preflight(recipe_for(folder, data={"multiple": 32}))
    line = refusal(recipe_for(folder, data={"multiple": 24}))
    assert line == (
        f"recipe.data.multiple is 24 but {folder} takes sides that are multiples of 16: choose 16 or a multiple of it"
    )
    assert LayeredPolicy.load(recipe_for(folder).model).pixel_multiple == 16


def test_targets_are_those_that_learning_takes(folder: Path) -> None:
    for good in (["to_q"], ["img_mod.1"], ["transformer_blocks.0.attn.to_add_out"], ["proj_out"]):
        preflight(recipe_for(folder, lora={"targets": good}))
        transformer = LayeredPolicy.load(recipe_for(folder).model).transformer
        put_adapter(transformer, new_adapter(transformer, LoraRecipe(targets=tuple(good)), seed=0))
    line = refusal(recipe_for(folder, lora={"targets": ["to_qq"]}))
    assert line.startswith(
        "recipe.lora.targets has 'to_qq', which is not a linear layer of the model: layers of a block "
    )
    assert "attn.to_q, attn.to_k, attn.to_v" in line
    dead = recipe_for(folder, lora={"targets": ["transformer_blocks.1.attn.to_add_out"]})
    line = refusal(dead)
    assert line.startswith("recipe.lora.targets is transformer_blocks.1.attn.to_add_out, which names only layers of ")
    assert "add one of img_mod.1, attn.to_q, attn.to_k" in line
    transformer = LayeredPolicy.load(dead.model).transformer
    with pytest.raises(LayerloopError):
        put_adapter(transformer, new_adapter(transformer, dead.lora, seed=0))


def test_an_adapter_to_start_from_has_to_fit(folder: Path, tmp_path: Path) -> None:
    policy = LayeredPolicy.load(recipe_for(folder).model)
    put_adapter(policy.transformer, new_adapter(policy.transformer, LoraRecipe(rank=2, targets=("to_q",)), seed=0))
    write_peft(adapter_of(policy.transformer), tmp_path / "adapter")
    without_weights(folder)
    lora = {"rank": 2, "targets": ["to_q"], "start_from": "s3://bucket/adapter"}
    start = {"start": tmp_path / "adapter"}
    preflight(recipe_for(folder, lora=lora), **start)
    field = "recipe.lora.start_from is s3://bucket/adapter: "
    line = refusal(recipe_for(folder, lora=lora | {"rank": 4}), **start)
    assert line.startswith(field)
    assert line.endswith("has rank 2 but recipe.lora.rank is 4: set recipe.lora.rank to 2")
    line = refusal(recipe_for(folder, lora=lora | {"targets": ["to_q", "to_k"]}), **start)
    assert line.startswith(field)
    assert "which recipe.lora.targets asks for" in line
    assert refusal(recipe_for(folder, lora=lora), start=folder).startswith(f"{field}{folder} is not an adapter")


def test_an_attention_that_diffusers_does_not_know_is_refused(folder: Path) -> None:
    line = refusal(recipe_for(folder), runtime=ModelRuntime(attention="flesh"))
    assert line.startswith("runtime.model.attention is 'flesh': choose one of ")
    assert "native" in line


def test_of_the_hub_only_configs_and_the_tokenizer_are_needed(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a cache as the hub's client leaves it after those were fetched."""
    repository, commit = tmp_path / "hub/models--someone--some-model", "0" * 40
    shutil.copytree(folder, repository / "snapshots" / commit, ignore=shutil.ignore_patterns("*.safetensors"))
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    preflight(recipe_for("someone/some-model"))
    line = refusal(recipe_for("someone/some-model", lora={"targets": ["to_qq"]}))
    assert line.startswith("recipe.lora.targets has 'to_qq'")
    (repository / "snapshots" / commit / "tokenizer/tokenizer.json").unlink()
    assert refusal(recipe_for("someone/some-model")).startswith("recipe.model.base is someone/some-model: ")


def test_packaged_recipes_pass() -> None:
    """Those for the embedded policy; the others name a model of the hub."""
    recipes = [parse_recipe(text) for text in packaged_recipes().values()]
    tiny = [recipe for recipe in recipes if recipe.model.shipped]
    assert len(tiny) == 2
    for recipe in tiny:
        preflight(recipe)
