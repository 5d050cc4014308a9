"""Checks of a recipe before a campaign freezes it: its base and its adapter, without loading the base's weights.

Whatever later steps would refuse has to be refused before that, while the recipe can still be changed. It takes
seconds, whatever the size of the base.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from layerloop.components.policy.base_files import (
    BASE,
    TEXT,
    base_folder,
    check_configs,
    check_files,
    commit_of,
    from_hub,
    read_json,
)
from layerloop.components.schema.errors import LayerloopError
from layerloop.components.schema.recipe import Recipe
from layerloop.components.schema.runtime import ModelRuntime


def preflight(
    recipe: Recipe, runtime: ModelRuntime | None = None, *, folder: Path | None = None, start: Path | None = None
) -> str | None:
    """Refuse what later steps could not start from: a base that is missing, incomplete, of another kind, or for other
    image sides than the recipe's; LoRA targets that it does not have; an adapter to start from that does not fit.

    From the Hugging Face hub only the base's configs and tokenizer are fetched; the weights are not looked for there.
    Returns the commit that they are of, None for a base that is not of the hub.

    Args:
        folder: a local copy of the base that the caller fetched, for a base that is an object store's URI.
        start: a local copy of the adapter `recipe.lora.start_from`.

    Raises:
        LayerloopError: naming the recipe's field, its value and the base's.
    """
    model, hub = recipe.model, from_hub(recipe.model)
    if folder is None:
        small = [f"{part}/{name}" for part, name in (BASE | TEXT).items()]
        folder = base_folder(model, parts=(*small, "tokenizer"))
    try:
        check_files(folder, BASE | TEXT, weights=not hub)
        check_configs(folder)
        transformer, vae = _modules_without_weights(folder)
        _check_text(folder, transformer)
    except LayerloopError as error:  # a path in a cache means nothing to the reader
        raise LayerloopError(f"recipe.model.base is {model.base}: {error}") from error.__cause__
    _check_attention((runtime or ModelRuntime()).attention)
    sides = 2 * 2 ** len(vae.temperal_downsample)  # `LayeredPolicy.pixel_multiple`
    if recipe.data.multiple % sides:
        raise LayerloopError(
            f"recipe.data.multiple is {recipe.data.multiple} but {model.base} takes sides that are multiples of "
            f"{sides}: choose {sides} or a multiple of it"
        )
    _check_lora(recipe, transformer, start)
    return commit_of(folder) if hub else None


def _modules_without_weights(folder: Path) -> tuple[Any, Any]:
    """(transformer, VAE) of the configs, on torch's meta device: every layer with its shape, and no memory for any."""
    from diffusers import AutoencoderKLQwenImage, QwenImageTransformer2DModel

    built: list[Any] = []
    for part, kind in (("transformer", QwenImageTransformer2DModel), ("vae", AutoencoderKLQwenImage)):
        file = folder / part / BASE[part]
        config = read_json(file)
        try:
            with torch.device("meta"):
                built.append(kind.from_config(config))
        except Exception as error:  # its layers raise many kinds on impossible sizes
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise LayerloopError(
                f"{file} does not describe a {part} that can be built ({reason}): fetch it again"
            ) from error
    return built[0], built[1]


def _check_text(folder: Path, transformer: Any) -> None:
    """Raises LayerloopError where the text encoder's tokens are not as wide as those that the transformer takes."""
    config = read_json(folder / "text_encoder/config.json")
    text = config.get("text_config")  # without one the numbers are at the top, as older programs wrote them
    width = (text if isinstance(text, dict) else config).get("hidden_size", config.get("hidden_size"))
    needed = transformer.config.joint_attention_dim
    if width is not None and width != needed:
        raise LayerloopError(
            f"its text encoder makes tokens of width {width}, its transformer takes {needed}: the two are of different "
            "models, fetch it again"
        )


def _check_attention(name: str) -> None:
    """Raises LayerloopError for a name that diffusers does not know; whether it is available is known only on the
    machine that runs it."""
    from diffusers.models.attention_dispatch import AttentionBackendName

    known = sorted(backend.value for backend in AttentionBackendName)
    if name.lower() not in known:
        raise LayerloopError(f"runtime.model.attention is {name!r}: choose one of {', '.join(known)}")


def _check_lora(recipe: Recipe, transformer: Any, start: Path | None) -> None:
    """Raises LayerloopError for targets that name no layer or none that changes the output, and for an adapter that
    `recipe.lora.start_from` cannot name."""
    from layerloop.components.policy.lora import starting_adapter, target_modules

    targets = recipe.lora.targets
    if not target_modules(transformer, targets):
        block = "transformer_blocks.0."
        layers = target_modules(transformer, [name for name in _linears(transformer) if name.startswith(block)])
        raise LayerloopError(
            f"recipe.lora.targets is {', '.join(targets)}, which names only layers of {recipe.model.base} that cannot "
            f"change its output (the text side of its last block): add one of "
            f"{', '.join(name.removeprefix(block) for name in layers)}"
        )
    if start is not None:
        try:
            starting_adapter(transformer, recipe.lora, start)
        except LayerloopError as error:
            raise LayerloopError(f"recipe.lora.start_from is {recipe.lora.start_from}: {error}") from error.__cause__


def _linears(transformer: Any) -> list[str]:
    return [name for name, module in transformer.named_modules() if isinstance(module, torch.nn.Linear)]
