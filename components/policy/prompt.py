"""The prompt's embedding, made once for a campaign: the only use of the text encoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from layerloop.components.policy.loading import (
    BASE,
    DTYPES,
    TEXT,
    check_configs,
    check_files,
    from_hub,
    load_text,
    local_folder,
)
from layerloop.components.schema.recipe import ModelRecipe


@torch.no_grad()
def embed_text(text: str, tokenizer: Any, encoder: Any) -> torch.Tensor:
    """`(T, E)` float32 of `text` in the pipeline's own template, without the template's first 34 tokens."""
    from diffusers import QwenImageLayeredPipeline

    pipeline = QwenImageLayeredPipeline(
        tokenizer=tokenizer, text_encoder=encoder, scheduler=None, vae=None, transformer=None, processor=None
    )
    embeds, mask = pipeline.encode_prompt(text, device=encoder.device)
    assert mask is None  # one prompt has no padding
    return embeds[0].float().cpu()


def text_folder(model: ModelRecipe, *, folder: Path | None = None) -> tuple[Path, int]:
    """A folder that `embed_prompt` can take, and of how many pixels image sides must be multiples for this base.

    A base that later steps could not load is refused here, before a campaign begins with it: its configs are read, and
    its files must be there. From the hub, nothing of transformer and VAE is fetched but their configs.

    Raises:
        LayerloopError: the base cannot be found, lacks a file, or is not a layered model.
    """
    if folder is None:
        folder = local_folder(model, parts=(*TEXT, *(f"{part}/{name}" for part, name in BASE.items())))
    check_files(folder, {part: name for part, name in BASE.items() if not from_hub(model)})
    vae = check_configs(folder)
    return folder, 2 * 2 ** len(vae.get("temperal_downsample", (False, True, True)))


def embed_prompt(model: ModelRecipe, *, device: str | torch.device = "cpu", folder: Path | None = None) -> torch.Tensor:
    """`(T, E)` float32 of the recipe's prompt, loading nothing of the base but its text encoder.

    Args:
        folder: a local copy of the base that the caller fetched, for a base that is an object store's URI.

    Raises:
        LayerloopError: the base cannot be found, or lacks a file of its text encoder or tokenizer.
    """
    folder = local_folder(model, parts=tuple(TEXT)) if folder is None else folder
    tokenizer, encoder = load_text(folder, dtype=DTYPES[model.dtype])
    return embed_text(model.prompt, tokenizer, encoder.to(device))
