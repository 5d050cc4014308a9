"""Finding a base model's files, and checking that they are there and those of a layered model."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from layerloop.components.schema.errors import LayerloopError
from layerloop.components.schema.hub import hub_error
from layerloop.components.schema.recipe import FAULTY, TINY, ModelRecipe

BASE = {"transformer": "config.json", "vae": "config.json", "scheduler": "scheduler_config.json"}  # part -> config
TEXT = {"text_encoder": "config.json", "tokenizer": "tokenizer_config.json"}
VOCABULARY = ("vocab.json", "merges.txt")  # or tokenizer.json, which holds both
WEIGHTS = {  # file stems of diffusers and of transformers
    "transformer": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model",
}  # fmt: skip


def base_folder(model: ModelRecipe, *, parts: Collection[str] = tuple(BASE)) -> Path:
    """The local folder of `model.base`.

    "tiny" is in the package, "tiny-faulty" is made from it, a folder is itself, a Hugging Face id is downloaded to the
    hub's cache (only `parts`: subfolders, or single files of them).
    An object store's URI has to be fetched by the step, which hands the folder to `LayeredPolicy.load`.

    Raises:
        LayerloopError: no such folder or repository, or a URI.
    """
    base = model.base
    if base == TINY:
        from layerloop.components.policy.tiny import tiny_folder

        try:
            return tiny_folder()
        except FileNotFoundError as error:
            raise LayerloopError(f"recipe.model.base is 'tiny': {error}") from None
    if base == FAULTY:
        from layerloop.components.policy.faulty import faulty_folder

        return faulty_folder()
    if "://" in base and not base.startswith("file://"):
        raise LayerloopError(f"recipe.model.base is {base}: copy it to a local folder first and load that")
    path = Path(base.removeprefix("file://")).expanduser()
    if path.is_dir():
        return path
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", base):
        raise LayerloopError(
            f"recipe.model.base is {base!r}: no such folder; give 'tiny', a folder, an s3:// URI, or a Hugging Face id"
        )
    return _from_hub(model, parts)


def commit_of(folder: Path) -> str | None:
    """The commit whose files a folder of the hub's cache holds; None of any other folder."""
    commit = folder.name if folder.parent.name == "snapshots" else ""
    return commit if re.fullmatch(r"[0-9a-f]{40}", commit) else None


def from_hub(model: ModelRecipe) -> bool:
    """Whether `model.base` is a Hugging Face id."""
    path = Path(model.base.removeprefix("file://")).expanduser()
    return not model.shipped and "://" not in model.base and not path.is_dir()


def _from_hub(model: ModelRecipe, parts: Collection[str]) -> Path:
    from huggingface_hub import snapshot_download

    patterns = [part if "/" in part else f"{part}/*" for part in parts]
    try:
        return Path(snapshot_download(model.base, revision=model.revision, allow_patterns=patterns))
    except Exception as error:  # the hub raises a dozen kinds; each means that the model is not available
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise hub_error(
            error,
            f"recipe.model.base is {model.base!r}: neither a local folder nor a model that the Hugging Face hub gives "
            f"({reason}): check the name, recipe.model.revision, and HF_TOKEN or HF_ENDPOINT",
        ) from None


def weight_files(folder: Path, part: str) -> list[Path]:
    """The safetensors files of one part of a diffusers folder, in order, all of them present.

    Raises:
        LayerloopError: naming the first missing file.
    """
    stem = folder / part / WEIGHTS[part]
    index = Path(f"{stem}.safetensors.index.json")
    if index.is_file():
        try:
            shards = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError):
            raise LayerloopError(f"{index} is not an index of safetensors shards: fetch it again") from None
        files = [folder / part / name for name in shards]
    else:
        files = [Path(f"{stem}.safetensors")]
    for file in files:
        _require_file(file)
    return files


def _require_file(file: Path) -> Path:
    if not file.is_file():
        raise LayerloopError(
            f"{file} is missing: {file.parent.parent} is not a complete diffusers folder of the model; fetch it again"
        )
    return file


def check_files(folder: Path, parts: Mapping[str, str], *, weights: bool = True) -> None:
    """Check that every file that loading `parts` (part -> its config) needs exists; weights only if `weights`.

    Raises:
        LayerloopError: naming the first missing file.
    """
    for part, name in parts.items():
        _require_file(folder / part / name)
        if part in WEIGHTS and weights:
            weight_files(folder, part)
        if part == "tokenizer":
            _require_vocabulary(folder / part)


def _require_vocabulary(folder: Path) -> None:
    """Raises LayerloopError without a vocabulary: the tokenizer would load all the same, and give no tokens."""
    missing = [name for name in VOCABULARY if not (folder / name).is_file()]
    if not missing or (folder / "tokenizer.json").is_file():
        return
    if len(missing) < len(VOCABULARY):
        _require_file(folder / missing[0])
    raise LayerloopError(
        f"{folder / 'tokenizer.json'} is missing, and so are {' and '.join(VOCABULARY)}, which would do instead: "
        f"{folder.parent} is not a complete diffusers folder of the model; fetch it again"
    )


def check_base(folder: Path) -> None:
    """Check that the files of the base exist and that it is a layered model.

    Raises:
        LayerloopError: naming the first missing file or the setting that is wrong.
    """
    check_files(folder, BASE)
    check_configs(folder)


def check_configs(folder: Path) -> None:
    """Check that the configs of the base are those of a layered model; its weights are not needed.

    Raises:
        LayerloopError: naming the first missing file or the setting that is wrong.
    """
    for part, name in BASE.items():
        _require_file(folder / part / name)
    config, vae, scheduler = (read_json(folder / part / name) for part, name in BASE.items())
    for file, name, value, needed in (
        ("transformer/config.json", "use_additional_t_cond", config.get("use_additional_t_cond"), True),
        ("transformer/config.json", "use_layer3d_rope", config.get("use_layer3d_rope"), True),
        ("transformer/config.json", "in_channels", config.get("in_channels", 64), 64),
        ("transformer/config.json", "zero_cond_t", config.get("zero_cond_t", False), False),
        ("transformer/config.json", "guidance_embeds", config.get("guidance_embeds", False), False),
        ("vae/config.json", "input_channels", vae.get("input_channels"), 4),
        ("vae/config.json", "z_dim", vae.get("z_dim", 16), 16),
        ("scheduler/scheduler_config.json", "stochastic_sampling", scheduler.get("stochastic_sampling", False), False),
        ("scheduler/scheduler_config.json", "invert_sigmas", scheduler.get("invert_sigmas", False), False),
    ):
        if value != needed:
            raise LayerloopError(
                f"{folder / file} has {name} {value!r}, not {needed!r}: this is not a model of "
                "Qwen-Image-Layered's kind"
            )


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in a config file.

    Raises:
        LayerloopError: not a JSON object.
    """
    try:
        value = json.loads(file.read_bytes())
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise LayerloopError(f"{file} is not a JSON object: fetch it again")
    return value


def base_files(folder: Path) -> list[Path]:
    """All files that decide what the frozen base computes, configs first.

    Raises:
        LayerloopError: naming the first missing file.
    """
    files = [_require_file(folder / part / name) for part, name in BASE.items()]
    return files + [file for part in ("transformer", "vae") for file in weight_files(folder, part)]
