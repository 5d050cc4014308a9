"""A step's runtime, merged from five sources of rising priority."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Final

from layerloop.components.schema.errors import LayerloopError
from layerloop.components.schema.recipe import Recipe
from layerloop.components.schema.runtime import TINY, Runtime, checked_values, merged
from layerloop.components.schema.yaml_text import load_yaml
from layerloop.components.storage.stores import LARGEST_RECORD, read_uri

VARIABLE: Final = "LAYERLOOP_RUNTIME"


def read_runtime(
    given: str | Mapping[str, Any],
    recipe: Recipe,
    *,
    stored: Mapping[str, Any] | None = None,
    where: str = "recipe.json",
) -> Runtime:
    """The runtime of a step. Sources, highest first: `given`, the environment's LAYERLOOP_RUNTIME, values in the
    campaign's recipe.json (earlier versions kept them there), the defaults of the tiny base, the defaults.

    Args:
        given: the step's parameter: YAML or JSON text, the path or URI of a file, or a mapping; empty for none.
        recipe: the campaign's.
        stored: runtime values found in the campaign's recipe.json.
        where: that file, for errors.

    Raises:
        LayerloopError: a file that cannot be read, an unknown key, an impossible value, or fsdp with fp8_base.
    """
    sources = [
        TINY if recipe.model.shipped else {},
        checked_values(stored or {}, where=where),
        runtime_values(os.environ.get(VARIABLE, ""), where=VARIABLE),
        runtime_values(given),
    ]
    values: dict[str, Any] = {}
    for source in sources:
        values = merged(values, source)
    runtime = Runtime.model_validate(values)
    if runtime.model.fsdp and recipe.model.fp8_base:
        raise LayerloopError(
            "runtime.model.fsdp is true and so is recipe.model.fp8_base: set fsdp to false, either makes the base "
            "smaller"
        )
    return runtime


def runtime_values(given: str | Mapping[str, Any], *, where: str = "runtime") -> dict[str, Any]:
    """The values that one source names, checked, nothing added.

    Raises:
        LayerloopError: a file that cannot be read, not a mapping, an unknown key, or an impossible value.
    """
    value: Any = given
    if isinstance(given, str):
        text = given.strip()
        if text and not ("\n" in text or ": " in text or text.startswith("{")):
            try:
                text = read_uri(os.path.expanduser(text), most=LARGEST_RECORD).decode()
            except (LayerloopError, UnicodeDecodeError) as error:
                reason = "it is not text" if isinstance(error, UnicodeDecodeError) else error
                raise LayerloopError(
                    f"{where} is {given.strip()}, which cannot be read ({reason}): give YAML or JSON text, or the path "
                    "or URI of a file"
                ) from None
        value = load_yaml(text, where=where)
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise LayerloopError(f"{where} is {value!r}, not a mapping: write it as judge: {{concurrency: 8}}")
    return checked_values(value, where=where)
