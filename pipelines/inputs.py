"""What a user types, checked before anything starts."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from layerloop.components.schema.errors import LayerloopError
from layerloop.components.schema.judging import JudgeRecipe
from layerloop.components.schema.recipe import parse_recipe
from layerloop.components.schema.run_recipe import packaged_recipes


def recipe_text(value: str, changes: Sequence[str] = ()) -> str:
    """YAML text of a packaged recipe's name or of a file, with changes such as `judge.model=my-model`, checked.

    Raises:
        LayerloopError: neither a name nor a readable file, not a recipe, or a change that is none.
    """
    packaged = packaged_recipes()
    if value in packaged:
        text = packaged[value]
    else:
        try:
            text = Path(value).read_text()
        except (OSError, UnicodeDecodeError) as error:
            reason = "is not text" if isinstance(error, UnicodeDecodeError) else f"cannot be read ({error.strerror})"
            raise LayerloopError(f"recipe {value} {reason}: name a YAML file or one of {', '.join(packaged)}") from None
    parse_recipe(text)
    if changes:
        text = _changed(text, changes)
        parse_recipe(text)
    return text


def _changed(text: str, changes: Sequence[str]) -> str:
    import yaml

    recipe = yaml.safe_load(text)
    for change in changes:
        path, separator, value = change.partition("=")
        *sections, key = path.split(".")
        if not separator or not key:
            raise LayerloopError(f"--set {change!r} is no change: write it as judge.model=name")
        place: Any = recipe
        for section in sections:
            place = place.setdefault(section, {})
            if not isinstance(place, dict):
                raise LayerloopError(f"--set {path}: recipe.{section} is no section of the recipe")
        try:
            place[key] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise LayerloopError(f"--set {path}: {value!r} is no YAML value: quote it") from None
    return yaml.safe_dump(recipe, sort_keys=False)


def absolute(uri: str) -> str:
    """A path made absolute, because every step runs as a process of its own; URIs and the empty string as they are."""
    return uri if "://" in uri or not uri else os.path.abspath(os.path.expanduser(uri))


def check_judge(url: str, recipe: JudgeRecipe) -> list[str]:
    """Ask the judge for its models before a run, so that a wrong URL, key or model costs seconds and not rollouts.

    The key is taken from OPENAI_API_KEY.

    Raises:
        LayerloopError: no URL, nobody answers, the key is refused, or the recipe's model is not served there.
    """
    from layerloop.components.judge.client import Judge

    if not url.startswith(("http://", "https://")):
        raise LayerloopError(f"judge URL is {url!r}: give a base URL such as http://127.0.0.1:8788/v1")

    async def models() -> list[str]:
        async with Judge(url, recipe) as judge:
            return await judge.check_reachable()

    return asyncio.run(models())
