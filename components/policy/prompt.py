"""The prompt's embedding, made once for a campaign: the only use of the text encoder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from layerloop.components.policy.base_files import TEXT, base_folder
from layerloop.components.policy.loading import DTYPES, load_text
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


def embed_prompt(model: ModelRecipe, *, device: str | torch.device = "cpu", folder: Path | None = None) -> torch.Tensor:
    """`(T, E)` float32 of the recipe's prompt: see `embed_prompts`."""
    return embed_prompts(model, [model.prompt], device=device, folder=folder)[0]


def embed_prompts(
    model: ModelRecipe, prompts: Sequence[str], *, device: str | torch.device = "cpu", folder: Path | None = None
) -> list[torch.Tensor]:
    """`(T, E)` float32 of each prompt, loading nothing of the base but its text encoder.

    Args:
        folder: a local copy of the base that the caller fetched, for a base that is an object store's URI.

    Raises:
        LayerloopError: the base cannot be found, or lacks a file of its text encoder or tokenizer.
    """
    folder = base_folder(model, parts=tuple(TEXT)) if folder is None else folder
    tokenizer, encoder = load_text(folder, dtype=DTYPES[model.dtype])
    encoder = encoder.to(device)
    return [embed_text(prompt, tokenizer, encoder) for prompt in prompts]
