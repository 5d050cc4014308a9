"""Writing an adapter: the files of peft's layout and of diffusers'. Reading them is in adapters.py."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from layerloop.components.policy.adapters import (
    DIFFUSERS_BFLOAT16,
    DIFFUSERS_PREFIX,
    DIFFUSERS_WEIGHTS,
    PEFT,
    PEFT_CONFIG,
    PEFT_PREFIX,
    PEFT_WEIGHTS,
    Adapter,
    folded,
)
from layerloop.components.policy.lora import config_alpha, fitted, module_lists
from layerloop.components.schema.errors import LayerloopError


def write_peft(adapter: Adapter, folder: Path | str, *, transformer: Any = None, base: str | None = None) -> None:
    """Write `adapter_model.safetensors` and `adapter_config.json`, as `PeftModel.from_pretrained(transformer, folder)`
    reads them. `transformer` is the base that the adapter is for, checked against it and named by suffixes; without one
    every layer is named in full. `base` is its human-readable name.

    Raises:
        LayerloopError: NaN in the adapter, or weights that do not fit the base; nothing is written then.
    """
    _check_finite(adapter)
    config = json.dumps(_config(adapter, transformer, base), indent=2, sort_keys=True) + "\n"
    state = {PEFT_PREFIX + key: value.contiguous() for key, value in adapter.state.items()}
    _replace_files(
        Path(folder),
        {
            PEFT_CONFIG: lambda file: file.write_text(config),
            PEFT_WEIGHTS: lambda file: save_file(state, file, metadata={"format": "pt"}),
        },
    )


def write_diffusers(adapter: Adapter, folder: Path | str, *, transformer: Any = None) -> None:
    """Write `pytorch_lora_weights.safetensors`, as `pipeline.load_lora_weights(folder)` reads it, and a bfloat16 copy.

    The scale is folded into B, since readers that ignore the metadata take a scale of 1 (`folded`). The metadata has
    the complete config (diffusers fails on a part of one). Layers are named in full: diffusers warns of excluded ones.

    Raises:
        LayerloopError: NaN in the adapter, or weights that do not fit the base; nothing is written then.
    """
    if transformer is not None:
        fitted(transformer, adapter, where="adapter")
    adapter = folded(adapter)
    _check_finite(adapter)
    config = {DIFFUSERS_PREFIX + key: value for key, value in _config(adapter, None, None).items()}
    # one key only: safetensors writes several in any order, and equal adapters must give equal bytes
    metadata = {"lora_adapter_metadata": json.dumps(config, indent=2, sort_keys=True)}
    state = {DIFFUSERS_PREFIX + key: value.contiguous() for key, value in adapter.state.items()}
    halves = {key: value.bfloat16() for key, value in state.items()}
    _replace_files(
        Path(folder),
        {
            DIFFUSERS_BFLOAT16: lambda file: save_file(halves, file, metadata=metadata),
            DIFFUSERS_WEIGHTS: lambda file: save_file(state, file, metadata=metadata),
        },
    )


def write_layouts(adapter: Adapter, folder: Path | str, *, transformer: Any = None, base: str | None = None) -> None:
    """Write a folder that people's programs load as it stands: diffusers' layout at the root, peft's in `peft/`.

    Raises:
        LayerloopError: NaN in the adapter, or weights that do not fit the base.
    """
    write_peft(adapter, Path(folder) / PEFT, transformer=transformer, base=base)
    write_diffusers(adapter, folder, transformer=transformer)


def _config(adapter: Adapter, transformer: Any, base: str | None) -> dict[str, Any]:
    """peft's own config of this adapter, as JSON values in a fixed order."""
    from peft import LoraConfig

    lists: dict[str, Any] = {"target_modules": sorted(adapter.modules)}
    if transformer is not None:
        fitted(transformer, adapter, where="adapter")
        lists = module_lists(transformer, adapter.modules)
    config = LoraConfig(
        r=adapter.rank, lora_alpha=config_alpha(adapter), base_model_name_or_path=base, inference_mode=True, **lists
    ).to_dict()
    return {k: sorted(v) if isinstance(v, set) else getattr(v, "value", v) for k, v in config.items()}


def _check_finite(adapter: Adapter) -> None:
    for key, value in adapter.state.items():
        if not torch.isfinite(value).all():
            raise LayerloopError(
                f"adapter weight {key} has NaN or infinite values: nothing was written, take an earlier adapter"
            )


def _replace_files(folder: Path, writers: Mapping[str, Callable[[Path], object]]) -> None:
    """Write files under other names, and rename them into `folder` once all are complete: in order, the one that makes
    a folder an adapter last. A reader finds the old adapter, none, or the new one, whenever this ends."""
    folder.mkdir(parents=True, exist_ok=True)
    partial = {name: folder / f".{name}.partial" for name in writers}
    try:
        for name, write in writers.items():
            write(partial[name])
        for name in reversed(partial):
            (folder / name).unlink(missing_ok=True)
        for name, file in partial.items():
            file.replace(folder / name)
    finally:
        for file in partial.values():
            file.unlink(missing_ok=True)
