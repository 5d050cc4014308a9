"""How much memory of a GPU a step takes, by arithmetic and without torch: what `layerloop plan` prints and what a step
refuses a smaller GPU by, before it loads anything.
"""

from __future__ import annotations

from typing import Literal

from layerloop.components.policy.size import TOKEN_PIXELS, AdapterSize, Tokens, TransformerSize
from layerloop.components.schema.errors import LayerloopError, UnavailableError
from layerloop.components.schema.recipe import Recipe
from layerloop.components.schema.runtime import Runtime

Use = Literal["sampling", "update", "evaluation"]

AUTOENCODER_BYTES = 0.25e9  # 126.9 M parameters in bfloat16
RESERVED_BYTES = 1.5e9  # CUDA's context, kernels' workspaces, decoding one layer at 640 pixels (estimate)
PROMPT_TOKENS = 32  # a short prompt's; a text of 1,000 tokens would be a tenth of one more layer


def gpu_bytes(size: TransformerSize, recipe: Recipe, runtime: Runtime, use: Use) -> float:
    """Most memory that a step takes of one GPU that holds the whole base, for square pictures and the most layers.

    The base, the adapter (in the update with gradients and AdamW's moments), and the activations: of one block, or in
    the update the inputs of all blocks and one block's, without gradient checkpointing all blocks'.
    """
    pixels = recipe.data.resolution if use == "evaluation" else recipe.sampled_resolution
    side = pixels // TOKEN_PIXELS
    layers = max(recipe.evaluation.layers) if use == "evaluation" else recipe.rollout.max_layers
    tokens, dtype = Tokens(layers, side, side, PROMPT_TOKENS), recipe.model.dtype
    adapter = AdapterSize.of(size, rank=recipe.lora.rank, targets=recipe.lora.targets)
    held = size.base_bytes(dtype=dtype, float8=recipe.model.fp8_base) + AUTOENCODER_BYTES + RESERVED_BYTES
    if use != "update":
        batch = (runtime.rollout if use == "sampling" else runtime.evaluation).batch_size
        return held + 4 * adapter.parameters + batch * size.block_bytes(tokens, dtype=dtype, gradients=False)
    block = size.block_bytes(tokens, dtype=dtype, gradients=True)
    checkpointed = runtime.model.gradient_checkpointing
    kept = size.checkpoint_bytes(tokens, dtype=dtype) + block if checkpointed else size.blocks * block
    return held + adapter.training_bytes + runtime.update.microbatch * kept


def check_gpu(needed: float, *, use: Use, free: float, total: float, name: str, remedy: str = "") -> None:
    """Refuse a GPU that has less memory free than a use needs: it would end in the middle, after the base was loaded.

    Raises:
        LayerloopError: naming the GPU, both numbers in GB, and what takes less: `remedy`, or that of a step. An
            UnavailableError where something else takes the memory, as a process that was killed does for a while.
    """
    if free >= needed:
        return
    key = {"sampling": "rollout.batch_size", "update": "update.microbatch", "evaluation": "evaluation.batch_size"}[use]
    busy = "end what else runs on it, " if total >= needed else ""
    less = remedy or (
        f"share the base with runtime.model.fsdp, lower runtime.{key} to 1, or begin a campaign with "
        "recipe.model.fp8_base"
    )
    raise (UnavailableError if busy else LayerloopError)(
        f"{name} has {free / 1e9:.1f} of {total / 1e9:.1f} GB free, {use} needs about {needed / 1e9:.1f} GB: {busy}"
        f"take a larger GPU, {less}"
    )
