"""Loading diffusers' modules one by one, from the files that base_files.py finds and checks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from layerloop.components.policy.base_files import TEXT, check_base, check_files, weight_files
from layerloop.components.policy.float8 import Float8Linear, use_float8
from layerloop.components.policy.weights import read_weights
from layerloop.components.schema.errors import LayerloopError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def load_base(
    folder: Path, *, dtype: torch.dtype, device: torch.device | str = "cpu", float8: bool = False
) -> tuple[Any, Any, Any]:
    """(transformer, VAE, scheduler) from a local diffusers folder: what diffusers' `from_pretrained` makes of it, bit
    for bit, read from the files' beginning to their end straight into place (weights.py).

    The scheduler is the shipped one: its kind of time shift differs between models that share all else.

    Args:
        device: where the modules go; tensor by tensor, so that the host never holds the model.
        float8: store the linear weights of the transformer's blocks in float8, cast before they reach the device.

    Raises:
        LayerloopError: a file is missing or broken, or the weights are not those of the config.
    """
    from diffusers import AutoencoderKLQwenImage, FlowMatchEulerDiscreteScheduler, QwenImageTransformer2DModel

    check_base(folder)
    modules: list[torch.nn.Module] = []
    for part, kind in (("transformer", QwenImageTransformer2DModel), ("vae", AutoencoderKLQwenImage)):
        with _loading_errors(folder / part):
            modules.append(_load_module(kind, folder, part, dtype=dtype, device=device, float8=float8))
    with _loading_errors(folder / "scheduler"):
        scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(
            folder, subfolder="scheduler", local_files_only=True
        )
    return modules[0], modules[1], scheduler


def _load_module(
    kind: Any, folder: Path, part: str, *, dtype: torch.dtype, device: torch.device | str, float8: bool
) -> torch.nn.Module:
    from accelerate import init_empty_weights

    with init_empty_weights():  # as diffusers: parameters on the meta device, what is computed for real
        module: torch.nn.Module = kind.from_config(kind.load_config(folder, subfolder=part))
    module.register_to_config(_name_or_path=folder)  # type: ignore[operator]
    if float8 and part == "transformer":
        use_float8(module)
    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    found: dict[str, tuple[int, ...]] = {}

    def take(name: str, tensor: torch.Tensor) -> None:
        found[name] = tuple(tensor.shape)
        if expected.get(name) == found[name]:
            _put(module, name, tensor.to(dtype) if tensor.is_floating_point() else tensor, device)

    read_weights(weight_files(folder, part), take)
    for keys, what in (
        (expected.keys() - found.keys(), "lack"),
        (found.keys() - expected.keys(), "have"),
        ({name for name, shape in found.items() if expected.get(name, shape) != shape}, "have another"),
    ):
        if keys:
            raise LayerloopError(
                f"the weights in {folder / part} {what} {min(keys)}, unlike its config: fetch it again"
            )
    return module.eval().to(device)  # buffers, which no file holds


def _put(module: torch.nn.Module, name: str, tensor: torch.Tensor, device: torch.device | str) -> None:
    """Make `tensor` the parameter or buffer `name`, on `device`."""
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    if isinstance(owner, Float8Linear) and leaf == "weight":
        owner.store(tensor, device)
    elif leaf in owner._parameters:
        owner._parameters[leaf] = torch.nn.Parameter(tensor.to(device), requires_grad=False)
    else:
        owner._buffers[leaf] = tensor.to(device)


def load_text(folder: Path, *, dtype: torch.dtype) -> tuple[Any, Any]:
    """(tokenizer, text encoder) of a local diffusers folder.

    Raises:
        LayerloopError: a file is missing or broken.
    """
    from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

    check_files(folder, TEXT)
    with _loading_errors(folder / "tokenizer"):
        tokenizer = Qwen2Tokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
    with _loading_errors(folder / "text_encoder"), _without_bars():
        encoder = Qwen2_5_VLForConditionalGeneration.from_pretrained(
            folder / "text_encoder", dtype=dtype, local_files_only=True
        )
    return tokenizer, encoder.eval().requires_grad_(False)


@contextlib.contextmanager
def _without_bars() -> Iterator[None]:
    """Keep transformers' bar over a model's tensors out of logs."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


@contextlib.contextmanager
def _loading_errors(where: Path) -> Iterator[None]:
    """Raise a loader's errors about broken files as a LayerloopError of one line."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        reason = " ".join(str(error).split())[:300]
        raise LayerloopError(
            f"{where} does not fit the GPU's memory ({reason}): end what else runs on it, or take a larger one"
        ) from None
    except (OSError, ValueError, RuntimeError, TypeError, KeyError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        raise LayerloopError(f"{where} cannot be loaded ({reason}): fetch it again") from error
