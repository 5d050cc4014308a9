"""Which recipe a run has: the one that it names, else the pipeline's, else the campaign's, with the run's changes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from layerloop.components.schema.errors import LayerloopError
from layerloop.components.schema.recipe import Recipe, parse_recipe_runtime
from layerloop.components.schema.run_recipe import overridden, packaged_recipes
from layerloop.components.schema.runtime import Runtime, flat, merged
from layerloop.components.storage.campaign import RECIPE, Campaign
from layerloop.components.storage.stores import MissingObjectError, Store, read_uri


def choose_recipe(
    recipe: str, overrides: Mapping[str, Any], *, default: str, store: Store
) -> tuple[Recipe, dict[str, Any]]:
    """The recipe that a run asks for (its own, else the pipeline's, else the campaign's) with the run's changes, and
    the runtime values among them.

    Raises:
        LayerloopError: no recipe anywhere, no such file, not a recipe, or changes that do not fit it.
    """
    if recipe.strip():
        chosen, moved = read_recipe(recipe)
    elif default.strip():
        chosen, moved = parse_recipe_runtime(default)
    elif store.exists(RECIPE):
        chosen, moved = Campaign.open(store.uri).recipe, {}
    else:
        names = ", ".join(packaged_recipes())
        raise LayerloopError(f"recipe is empty and {store.uri} has none yet: name one of {names}, or give a file's URI")
    changed, free = overridden(chosen, overrides)
    if store.exists(RECIPE):
        changed = _with_named_rubric(changed, Campaign.open(store.uri).recipe)
    return changed, merged(moved, free)


def _with_named_rubric(chosen: Recipe, frozen: Recipe) -> Recipe:
    """`chosen`, with its rubric named by its file as in a campaign of earlier versions, which froze the path, where
    the file still holds that rubric."""
    from layerloop.components.judge.rubric import file_content, is_file

    path, rubric = frozen.judge.rubric, chosen.judge.rubric
    if isinstance(rubric, str) or not isinstance(path, str) or not is_file(path) or file_content(path) != rubric:
        return chosen
    return chosen.model_copy(update={"judge": chosen.judge.model_copy(update={"rubric": path})})


def read_recipe(recipe: str) -> tuple[Recipe, dict[str, Any]]:
    """A recipe given as a packaged name, as the path or URI of a file, or as text; and the runtime's values in it.

    Raises:
        LayerloopError: no such name or file, or not a recipe.
    """
    text, packaged = recipe.strip(), packaged_recipes()
    if text in packaged:
        return parse_recipe_runtime(packaged[text])
    if "\n" in text or text.startswith(("{", "#")) or ": " in text:
        try:
            return parse_recipe_runtime(text)
        except LayerloopError:
            if "\n" in text or not (text.startswith("#") or text.count(": ") > 1):
                raise
            raise LayerloopError(  # a form field of one line takes the line breaks
                f"recipe is {text[:40]!r}..., which is not a recipe on one line: give {', '.join(packaged)} or the "
                "URI of a file, and the changes as overrides"
            ) from None
    try:
        return parse_recipe_runtime(read_uri(text))
    except MissingObjectError as error:
        if "/" in text or text.endswith((".yaml", ".yml", ".json")):
            raise
        raise LayerloopError(f"recipe is {text}, which is not one of {', '.join(packaged)}, and {error}") from None


def check_nothing_lost(moved: Mapping[str, Any], runtime: Runtime) -> None:
    """Refuse values of the runtime that were given in the recipe, unless the run has them anyway: the recipe reaches
    this step only, so the steps that need them would not get them.

    Raises:
        LayerloopError: naming them, and where they belong.
    """
    given, used = flat(moved), flat(runtime.model_dump(mode="json"))
    if lost := {key: value for key, value in given.items() if value != used[key]}:
        named = ", ".join(f"recipe.{key} is {value!r}" for key, value in lost.items())
        raise LayerloopError(
            f"{named}: that says where and how fast to run, which is not kept in a recipe: take it out and give the "
            f"parameter runtime {json.dumps(moved)}"
        )
