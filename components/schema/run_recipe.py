"""The recipe of a run: a packaged name, a file or text, and changes on top of it."""

from __future__ import annotations

import importlib.resources
from collections.abc import Mapping
from typing import Any

from layerloop.components.schema.errors import LayerloopError
from layerloop.components.schema.recipe import Recipe, split_recipe


def packaged_recipes() -> dict[str, str]:
    """YAML text of the recipes that ship with layerloop, by name.

    They are stored in the pipelines' folder and read as data: no code of the pipelines is imported.
    """
    folder = importlib.resources.files("layerloop.pipelines") / "recipes"
    files = [file for file in folder.iterdir() if file.name.endswith(".yaml")]
    return dict(sorted((file.name.removesuffix(".yaml"), file.read_text()) for file in files))


def overridden(recipe: Recipe, overrides: Mapping[str, Any]) -> tuple[Recipe, dict[str, Any]]:
    """`recipe` with `overrides` merged into it, section by section, and the
    runtime values among the overrides, which are not part of a recipe.

    A value that is not a mapping replaces the old one.
    Numbers of a Kubeflow STRUCT may arrive as floats: one without a fraction is taken as an integer.

    Raises:
        LayerloopError: a key that neither has, or a value that does not fit, in one line.
    """
    if not overrides:
        return recipe, {}
    try:
        return split_recipe(_merged(recipe.model_dump(mode="json"), overrides), where="recipe")
    except LayerloopError as error:
        raise LayerloopError(f"overrides: {error}") from None


def _merged(ours: Any, theirs: Any) -> Any:
    if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
        return {**ours, **{key: _merged(ours.get(key), value) for key, value in theirs.items()}}
    return _integral(theirs)


def _integral(value: Any) -> Any:
    """The value, with 3.0 made 3 at any depth."""
    if isinstance(value, Mapping):
        return {key: _integral(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_integral(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value
