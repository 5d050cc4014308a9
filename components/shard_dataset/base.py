"""The recipe's base as this step needs it: checked while the recipe can still be corrected, then asked for the prompt's
embedding.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Self

from layerloop.components.runtime.progress import log
from layerloop.components.schema.addresses import without_secrets
from layerloop.components.schema.errors import LayerloopError
from layerloop.components.schema.recipe import ModelRecipe, Recipe
from layerloop.components.schema.runtime import ModelRuntime
from layerloop.components.storage.campaign import BASE_COMMIT
from layerloop.components.storage.folders import local_adapter, local_folder


@dataclasses.dataclass(frozen=True)
class CheckedBase:
    """A base that the recipe fits. `folder` is a local copy of one at a URI, else None; `commit` is the one
    that the revision of a Hugging Face base points to, and `model` names it, so that all is read from the same."""

    model: ModelRecipe
    folder: Path | None
    commit: str | None

    @classmethod
    def of(cls, recipe: Recipe, runtime: ModelRuntime) -> Self:
        """The base of a recipe, checked without loading its weights.

        Raises:
            LayerloopError: later steps would refuse the base, the recipe's use of it, or the adapter that the recipe
                starts from.
        """
        from layerloop.components.policy.preflight import preflight

        base, start = recipe.model.base, recipe.lora.start_from
        remote = "://" in base and not base.startswith("file://")
        folder = _fetched("recipe.model.base", base, local_folder) if remote else None
        adapter = _fetched("recipe.lora.start_from", start, local_adapter) if start is not None else None
        commit = preflight(recipe, runtime, folder=folder, start=adapter)
        model = recipe.model.model_copy(update={"revision": commit}) if commit else recipe.model
        return cls(model, folder, commit)

    def embed_prompt(self) -> bytes:
        """The prompt's embedding `prompt_embeds[T, E]` float32 as safetensors: later steps never load the text encoder.
        Its metadata holds the commit of a base on the hub (`base_commit`).

        Raises:
            LayerloopError: the text encoder or the tokenizer cannot be loaded.
        """
        import numpy as np
        from safetensors.numpy import save

        from layerloop.components.policy.prompt import embed_prompt

        log(f"embedding the prompt {self.model.prompt!r} with {self.model.base}")
        embeds = embed_prompt(self.model, folder=self.folder).numpy()
        metadata = {BASE_COMMIT: self.commit} if self.commit else None
        return save({"prompt_embeds": np.ascontiguousarray(embeds, np.float32)}, metadata=metadata)


def base_commit(embedding: bytes) -> str | None:
    """The commit of the base that made a prompt's embedding; None where the base is not of the hub."""
    length = int.from_bytes(embedding[:8], "little")
    header = json.loads(embedding[8 : 8 + length])
    return (header.get("__metadata__") or {}).get(BASE_COMMIT)


def _fetched(field: str, uri: str, fetch: Callable[[str], Path]) -> Path:
    try:
        return fetch(uri)
    except LayerloopError as error:
        raise error.reworded(f"{field} is {without_secrets(uri)}: {error}") from None
