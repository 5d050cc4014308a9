"""What a user types, checked before anything starts."""

from __future__ import annotations

import asyncio
import difflib
import importlib.resources
import os
import re
import sys
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from layerloop.components.schema.addresses import without_secrets
from layerloop.components.schema.errors import LayerloopError
from layerloop.components.schema.judging import JudgeRecipe
from layerloop.components.schema.recipe import TINY, Recipe, parse_recipe, parse_recipe_runtime
from layerloop.components.schema.record import validate
from layerloop.components.schema.run_recipe import packaged_recipes
from layerloop.components.schema.runtime import JudgeRuntime, checked_values, flat, merged, runtime_key, split_runtime
from layerloop.components.schema.yaml_text import read_by_hand
from layerloop.components.storage.runtime import runtime_values
from layerloop.pipelines.plan_work import Assumptions


def runtime_text() -> str:
    """YAML text of the runtime's defaults, with comments."""
    return (importlib.resources.files("layerloop.pipelines") / "runtime.yaml").read_text()


def recipe_and_runtime(value: str, changes: Sequence[str] = (), runtime: str = "") -> tuple[str, dict[str, Any]]:
    """What to run: a recipe's YAML text, checked, and the runtime's values that were given.

    Args:
        value: a packaged recipe's name or a file. Values of the runtime in it are taken for this run, and said.
        changes: such as `judge.model=my-model` of the recipe, or `judge.concurrency=64` of the runtime.
        runtime: a file (or text) of the runtime; it goes over the recipe file's values, and `changes` over it.

    Raises:
        LayerloopError: neither a name nor a readable file, not a recipe, no runtime, a change that is none, or a rubric
            that is none.
    """
    packaged = packaged_recipes()
    if value in packaged:
        text = packaged[value]
    else:
        try:
            text = read_by_hand(value)
        except (OSError, UnicodeDecodeError) as error:
            reason = "is not text" if isinstance(error, UnicodeDecodeError) else f"cannot be read ({error.strerror})"
            close = difflib.get_close_matches(value, packaged, n=1)
            meant = f"; did you mean {close[0]!r}?" if close else ""
            names = ", ".join(packaged)
            raise LayerloopError(f"recipe {value} {reason}: name a YAML file or one of {names}{meant}") from None
    _, found = parse_recipe_runtime(text)
    if found:
        names = ", ".join(flat(found))
        print(
            f"recipe {value}: {names} say where and how fast: they hold for this run, the campaign does not keep them; "
            "move them to a file for --runtime",
            file=sys.stderr,
        )
        text = yaml.safe_dump(split_runtime(yaml.safe_load(text))[0], sort_keys=False)
    text, changed = _changed(text, changes)
    text = _with_rubric(text, parse_recipe(text).judge)
    return text, merged(merged(found, runtime_values(runtime)), changed)


def _with_rubric(text: str, judge: JudgeRecipe) -> str:
    """The recipe's text with what its rubric's file holds in the place of the path: pods do not see the file, and a
    campaign keeps the rubric that it began with. A path from the root that is not here is left to pods that may see it.

    Raises:
        LayerloopError: the rubric is not one, or lacks a text that the recipe's methods need.
    """
    from layerloop.components.judge.methods import rubric_of
    from layerloop.components.judge.rubric import file_content, is_file

    rubric = judge.rubric
    elsewhere = isinstance(rubric, str) and Path(rubric).is_absolute() and not Path(rubric).exists()
    if rubric == JudgeRecipe().rubric or elsewhere:
        return text
    rubric_of(judge)
    if not isinstance(rubric, str) or not is_file(rubric):
        return text
    recipe: dict[str, Any] = yaml.safe_load(text)
    recipe["judge"]["rubric"] = file_content(rubric)
    return yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True)


def recipe_text(value: str, changes: Sequence[str] = ()) -> str:
    """The recipe of `recipe_and_runtime`, without the runtime.

    Raises:
        LayerloopError: as there.
    """
    return recipe_and_runtime(value, changes)[0]


def _changed(text: str, changes: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """The recipe's text with those changes that are the recipe's, and the others, which are the runtime's."""
    recipe: dict[str, Any] = yaml.safe_load(text)
    runtime: dict[str, Any] = {}
    for change in changes:
        path, separator, value = change.partition("=")
        path = re.sub(r"^(recipe|runtime)\.", "", path)  # as messages write it
        keys = path.split(".")
        if not separator or not keys[-1]:
            raise LayerloopError(f"--set {change!r} is not a change: write it as judge.model=name")
        name = runtime_key(*keys[:2]) if len(keys) > 1 else None
        *sections, key = [keys[0], name, *keys[2:]] if name else keys
        section_values: Any = runtime if name else recipe
        for section in sections:
            section_values = section_values.setdefault(section, {})
            if not isinstance(section_values, dict):
                raise LayerloopError(f"--set {path}: recipe.{section} is not a section of the recipe")
        try:
            section_values[key] = _value_of(keys, value)
        except yaml.YAMLError:
            raise LayerloopError(f"--set {path}: {value!r} is not a YAML value: quote it") from None
    recipe, found = split_runtime(recipe)  # of a change such as judge={...}
    if recipe != yaml.safe_load(text):
        text = yaml.safe_dump(recipe, sort_keys=False)
    return text, checked_values(merged(found, runtime), where="runtime")


def plan_assumptions(changes: Sequence[str]) -> tuple[Assumptions, list[str]]:
    """The plan's assumptions with the changes that begin with `plan.`, and the other changes.

    Raises:
        LayerloopError: no such assumption, or an impossible value.
    """
    ours = [change for change in changes if change.startswith("plan.")]
    values: dict[str, Any] = {}
    for change in ours:
        key, separator, value = change.removeprefix("plan.").partition("=")
        if not separator:
            raise LayerloopError(f"--set {change!r} is not a change: write it as plan.tflops=600")
        try:
            values[key] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise LayerloopError(f"--set plan.{key}: {value!r} is not a YAML value: quote it") from None
    return validate(Assumptions, values, where="plan"), [change for change in changes if change not in ours]


def _value_of(keys: Sequence[str], text: str) -> Any:
    """The value that `--set` writes as `text`: YAML, and for a list also `2,3` or a single item.

    Raises:
        yaml.YAMLError: neither.
    """
    value = yaml.safe_load(text)
    annotation: Any = Recipe
    for key in keys:
        field = getattr(annotation, "model_fields", {}).get(key)
        annotation = field.annotation if field else None
    if typing.get_origin(annotation) is not tuple or isinstance(value, list | dict | types.NoneType):
        return value
    return [yaml.safe_load(item) for item in text.split(",")]


def what_is_trained(recipe: Recipe) -> str:
    """The first line of a run: which model learns, at what size."""
    size = f"{recipe.data.resolution} pixels"
    if recipe.model.shipped:
        faults = "" if recipe.model.base == TINY else ", with faults to unlearn"
        return (
            f"recipe {recipe.name}: trains the tiny policy that ships with layerloop{faults}, at {size}, to try things "
            "out; `--recipe paper` trains Qwen-Image-Layered, on a GPU of 80 GB"
        )
    return f"recipe {recipe.name}: trains {recipe.model.base} at {size}, in {recipe.model.dtype}"


def absolute(uri: str) -> str:
    """A path made absolute, because every step runs as a process of its own; URIs and the empty string as they are."""
    return uri if "://" in uri or not uri else os.path.abspath(os.path.expanduser(uri))


def check_judge_url(url: str) -> None:
    """Refuse what is no base URL.

    Raises:
        LayerloopError: it does not begin with http:// or https://.
    """
    if not url.startswith(("http://", "https://")):
        raise LayerloopError(f"judge URL is {without_secrets(url)!r}: give a base URL such as http://127.0.0.1:8788/v1")


def check_judge(url: str, recipe: JudgeRecipe, runtime: JudgeRuntime) -> list[str]:
    """Ask the judge for its models, and one of them a short question, before a run, so that a wrong URL, key or model
    costs seconds and not rollouts.

    The key is taken from OPENAI_API_KEY.

    Raises:
        LayerloopError: no URL, nobody answers, the key is refused, the recipe's model is not served there, or its
            rubric lacks a text.
    """
    from layerloop.components.judge.client import Judge
    from layerloop.components.judge.methods import rubric_of

    rubric_of(recipe)
    check_judge_url(url)

    async def models() -> list[str]:
        async with Judge(url, recipe, runtime) as judge:
            return await judge.check_reachable(probe=True)

    return asyncio.run(models())
