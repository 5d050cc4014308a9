"""Keys of adapter files as trainers write them, brought to `<module>.lora_A.weight` and `<module>.lora_B.weight`.

| written by | a key |
|---|---|
| peft | `base_model.model.transformer_blocks.0.attn.to_q.lora_A.weight` |
| diffusers | `transformer.transformer_blocks.0.attn.to_q.lora_A.weight` |
| ai-toolkit, ComfyUI, musubi-tuner | `diffusion_model.transformer_blocks.0.attn.to_q.lora_down.weight`, `....alpha` |
| DiffSynth-Studio | `pipe.dit.transformer_blocks.0.attn.to_q.lora_A.default.weight` |
| OneTrainer | `transformer.transformer_blocks.0.attn.to_q.lora_down.weight`, or `lora_transformer_...` as kohya |
| kohya | `lora_unet_transformer_blocks_0_attn_to_q.lora_down.weight`, `....alpha` |

`....alpha` is a module's own alpha, where lora_down and lora_up are not scaled yet. What is more than a product of two
matrices (DoRA, LoHa, LoKr and others) is refused by name: read as plain LoRA it would be another function.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import torch

from layerloop.components.schema.errors import LayerloopError

PREFIXES = (
    "base_model.model.", "model.diffusion_model.", "diffusion_model.", "transformer.", "pipe.dit.", "dit.",
    "unet.", "module.",
)  # fmt: skip
FLAT_PREFIXES = ("lora_unet_", "lora_transformer_", "lora_dit_", "lycoris_")
KINDS = {  # part of a key -> the kind of adapter that has it
    r"dora_scale|lora_magnitude_vector": "DoRA",
    r"lokr_(?:w|t)\d?": "LoKr",
    r"hada_(?:w|t)\d": "LoHa",
    r"oft_(?:blocks|diag|r)\b": "OFT",
    r"boft_[rs]\b": "BOFT",
    r"ia3_l\b": "IA3",
    r"lora_mid\.": "a LoCon with a middle matrix",
    r"(?:^|\.)diff(?:_b)?$|\.w_norm$|\.b_norm$|set_weight$": "full weight differences",
    r"\.(?:a|b)[12]\.weight$": "GLoRA",
    r"lora_embedding_[AB]": "a LoRA of embeddings",
}
TEXT_ENCODERS = re.compile(r"(?:text_encoder|text_model|conditioner|clip_|te\d?_|lora_te|lora_text|pipe\.text)")
BLOCK = (
    "attn.to_q",
    "attn.to_k",
    "attn.to_v",
    "attn.to_out.0",
    "attn.add_q_proj",
    "attn.add_k_proj",
    "attn.add_v_proj",
    "attn.to_add_out",
    "img_mod.1",
    "txt_mod.1",
    "img_mlp.net.0.proj",
    "img_mlp.net.2",
    "txt_mlp.net.0.proj",
    "txt_mlp.net.2",
)  # fmt: skip - the linear layers of a block of QwenImageTransformer2DModel
OUTER = (
    "img_in",
    "txt_in",
    "proj_out",
    "norm_out.linear",
    "time_text_embed.timestep_embedder.linear_1",
    "time_text_embed.timestep_embedder.linear_2",
)  # fmt: skip - and those outside of its blocks
_FLAT = {name.replace(".", "_"): name for name in (*BLOCK, *OUTER)}
_SIDES = re.compile(
    r"[._](?:lora_(?P<AB>[AB])|lora_(?P<way>down|up)|lora[._](?P<dot>down|up)|lora_linear_layer\.(?P<old>down|up))"
    r"(?:\.[A-Za-z]\w*)??\.weight$"
)


LONGEST_KEY = 300  # characters


def check_keys(keys: Iterable[str], file: Path) -> None:
    """Refuse a file by its keys, before anything of it is read.

    Raises:
        LayerloopError: another kind of adapter, a layer that the transformer does not have, or no LoRA weight.
    """
    for key in keys:
        if len(key) > LONGEST_KEY:
            raise LayerloopError(f"{file} has a key of {len(key)} characters, {key[:60]}...: it is no adapter")
        _refuse_other_kinds(key, file)
        name = _plain_key(key, file)
        if not name.endswith((".lora_A.weight", ".lora_B.weight", ".alpha")):
            raise LayerloopError(f"{file}: {name} is not a LoRA weight: only plain LoRA of linear layers is supported")


def plain_state(tensors: dict[str, torch.Tensor], file: Path) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """(state, alphas): tensors by `<module>.lora_A.weight` `[r, in]` and `<module>.lora_B.weight` `[out, r]`, and the
    alpha of each module that has one of its own. The keys have been checked (`check_keys`).

    Raises:
        LayerloopError: an alpha that is no number or of no module, or one weight under two keys.
    """
    state: dict[str, torch.Tensor] = {}
    alphas: dict[str, float] = {}
    written: dict[str, str] = {}
    for key, value in tensors.items():
        name, alpha = _plain_key(key, file), None
        if name.endswith(".alpha"):
            alpha, name = value, name.removesuffix(".alpha")
            if value.numel() != 1:
                raise LayerloopError(f"{file}: {key} has {value.numel()} numbers: an alpha is one")
            if value.is_complex() or value.dtype == torch.bool or float(value) == 0:
                raise LayerloopError(
                    f"{file}: {key} is {value.item()}, which is no scale: set it to the alpha of the training, or "
                    "leave it out"
                )
            alphas[name] = float(value)
        else:
            state[name] = value
        slot = f"{name} alpha" if alpha is not None else name
        if slot in written:
            raise LayerloopError(f"{file}: {written[slot]} and {key} are one weight: keep one of them")
        written[slot] = key
    for module in alphas:
        if f"{module}.lora_A.weight" not in state:
            raise LayerloopError(
                f"{file}: {written[f'{module} alpha']} belongs to no LoRA weight: the file is incomplete"
            )
    return state, alphas


def _refuse_other_kinds(key: str, file: Path) -> None:
    for pattern, kind in KINDS.items():
        if re.search(pattern, key):
            raise LayerloopError(
                f"{file}: {key} makes it {kind}: only plain LoRA of linear layers is supported; train one of these"
            )
    if TEXT_ENCODERS.match(key):
        raise LayerloopError(f"{file}: {key} adapts a text encoder: only the transformer's layers are supported")


def _plain_key(key: str, file: Path) -> str:
    """The key in the plain layout; one of no known layout as it is, but for its prefix."""
    name, foreign = key, not key.startswith(("base_model.model.", "transformer."))
    while prefix := next((prefix for prefix in PREFIXES if name.startswith(prefix)), ""):
        name = name.removeprefix(prefix)
    if flat := next((prefix for prefix in FLAT_PREFIXES if name.startswith(prefix)), ""):
        module, dot, rest = name.removeprefix(flat).partition(".")
        name = f"{_dotted(module) or module}{dot}{rest}"
    side = _SIDES.search(name)
    if side is not None:
        way = side["AB"] or {"down": "A", "up": "B"}[side["way"] or side["dot"] or side["old"]]
        module = name[: side.start()]
        name = f"{module}.lora_{way}.weight"
        if foreign and not _is_layer(module):
            raise LayerloopError(
                f"{file}: {key} is of no layer of Qwen-Image's transformer, such as transformer_blocks.0.attn.to_q: "
                "the adapter is for another base, or from a trainer whose keys are not known"
            )
    return name


def _dotted(flat: str) -> str | None:
    """`transformer_blocks_0_attn_to_q` as `transformer_blocks.0.attn.to_q`; None of a name that is not known."""
    block = re.fullmatch(r"(?:transformer_)?transformer_blocks_(\d+)_(\w+)", flat)
    if block is not None:
        inner = _FLAT.get(block[2])
        return None if inner is None else f"transformer_blocks.{block[1]}.{inner}"
    return _FLAT.get(flat.removeprefix("transformer_"))


def _is_layer(module: str) -> bool:
    block = re.fullmatch(r"transformer_blocks\.\d+\.(.+)", module)
    return (block[1] in BLOCK) if block else module in OUTER
