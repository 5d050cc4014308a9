"""The tiny policy with faults to unlearn: the shipped weights with the shipped adapter of faults merged into them.

The 20 B base has faults that supervised training left in it; the tiny policy has hardly any, so that a demonstration on
it could only show zeros. components/research/faults.py trains the adapter.
"""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from layerloop.components.policy.adapters import PEFT_CONFIG, PEFT_WEIGHTS, Adapter, read_adapter
from layerloop.components.policy.tiny import tiny_folder
from layerloop.components.schema.errors import LayerloopError
from layerloop.components.schema.messages import reason_of
from layerloop.components.storage.folders import cache_folder
from layerloop.components.storage.owners import scratch_folder

FAULTS = "faults"  # folder of the adapter, beside the parts of the tiny policy
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


def faulty_folder() -> Path:
    """The folder of the faulty base in diffusers' layout, made in the cache of this machine where it is not there yet.

    Equal on every machine, and so is its fingerprint.

    Raises:
        LayerloopError: the weights are not here, or the cache cannot be written to.
    """
    try:
        tiny = tiny_folder()
    except FileNotFoundError as error:
        raise LayerloopError(f"recipe.model.base is 'tiny-faulty': {error}") from None
    made_of = (tiny / WEIGHTS, tiny / FAULTS / PEFT_WEIGHTS, tiny / FAULTS / PEFT_CONFIG)
    digest = hashlib.sha256(b"".join(hashlib.sha256(file.read_bytes()).digest() for file in made_of)).hexdigest()
    folder = cache_folder() / "bases" / f"tiny-faulty-{digest[:16]}"
    if folder.is_dir():  # it has its name only once it is whole
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with scratch_folder(folder.parent) as temporary:
            staged = temporary / "base"
            shutil.copytree(tiny, staged, ignore=shutil.ignore_patterns(FAULTS))
            save_file(
                merged(load_file(tiny / WEIGHTS), read_adapter(tiny / FAULTS)), staged / WEIGHTS, {"format": "pt"}
            )
            _rename(staged, folder)
    except OSError as error:
        raise LayerloopError(
            f"recipe.model.base is 'tiny-faulty', which is made in {folder.parent}, and that cannot be written to "
            f"({reason_of(error)}): set LAYERLOOP_CACHE to a folder that can"
        ) from None
    return folder


def _rename(staged: Path, folder: Path) -> None:
    """Give a whole folder its name, unless another process was faster."""
    try:
        staged.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise


def merged(weights: dict[str, torch.Tensor], adapter: Adapter) -> dict[str, torch.Tensor]:
    """`weights` of a transformer with `adapter` in them, each of the dtype that it has.

    With an alpha that is the rank and float16 matrices whose entries are below 1, products are multiples of 2^-48 and
    sums below 2^5, so float64 holds every one of them exactly: the result does not depend on the order of a sum.
    """
    out = dict(weights)
    for module in adapter.modules:
        a, b = (adapter.state[f"{module}.lora_{side}.weight"].double() for side in "AB")
        name = f"{module}.weight"
        out[name] = (weights[name].double() + adapter.alpha / adapter.rank * (b @ a)).to(weights[name].dtype)
    return out
