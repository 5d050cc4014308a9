"""Finding a base model's files, checking them, and loading diffusers' modules from them one by one."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import time
import uuid
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from layerloop.components.policy.float8 import Float8Linear, use_float8
from layerloop.components.policy.weights import read_weights
from layerloop.components.schema.errors import LayerloopError
from layerloop.components.schema.hub import hub_error
from layerloop.components.schema.recipe import FAULTY, TINY, ModelRecipe

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
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


def fingerprint(folder: Path) -> str:
    """SHA-256, hex, over relative names and contents of all files that decide what the frozen base computes.

    Those of large files are kept beside them, in `.layerloop-sha256.json` of the folder, so that not every pod reads
    41 GB for them; one is taken from there while its file has the size and the times that it had then.

    Raises:
        LayerloopError: naming the first missing file.
    """
    files = base_files(folder)
    digests = _kept_digests(folder)
    missing = [file for file in files if file not in digests]
    with ThreadPoolExecutor(max_workers=4) as pool:  # hashing releases the interpreter lock; 40 GB in shards
        digests |= dict(zip(missing, pool.map(_sha256, missing), strict=True))
    _keep_digests(folder, {file: digests[file] for file in files})
    total = hashlib.sha256()
    for file in sorted(files):
        total.update(f"{file.relative_to(folder).as_posix()} {digests[file]}\n".encode())
    return total.hexdigest()


def base_files(folder: Path) -> list[Path]:
    """All files that decide what the frozen base computes, configs first.

    Raises:
        LayerloopError: naming the first missing file.
    """
    files = [_require_file(folder / part / name) for part, name in BASE.items()]
    return files + [file for part in ("transformer", "vae") for file in weight_files(folder, part)]


def _sha256(file: Path) -> str:
    blob = file.resolve().name
    if file.is_symlink() and re.fullmatch(r"[0-9a-f]{64}", blob):
        return blob  # the hub's cache names large files by their sha256
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


DIGESTS = ".layerloop-sha256.json"
WORTH_KEEPING = 2**28  # bytes of a file whose sha256 is kept: it takes a second and more
SETTLED = 2.0  # seconds since a file's last change: within a clock's step it may change again and look the same


def _state(file: Path) -> dict[str, int]:
    """What changes whenever a file's content does."""
    found = file.stat()
    return {"bytes": found.st_size, "modified_ns": found.st_mtime_ns, "changed_ns": found.st_ctime_ns}


def _kept_digests(folder: Path) -> dict[Path, str]:
    """Digests that still hold, of those kept beside the files."""
    try:
        kept = json.loads((folder / DIGESTS).read_bytes())
        return {
            folder / name: str(entry["sha256"])
            for name, entry in kept.items()
            if (folder / name).is_file() and entry == _state(folder / name) | {"sha256": entry["sha256"]}
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _keep_digests(folder: Path, digests: Mapping[Path, str]) -> None:
    """Keep the digests of large files that have not changed just now, if the folder can be written to."""
    now, kept = time.time_ns(), {}
    for file, sha256 in digests.items():
        state = _state(file)
        settled = now - max(state["modified_ns"], state["changed_ns"]) > SETTLED * 1e9
        if not file.is_symlink() and state["bytes"] >= WORTH_KEEPING and settled:
            kept[file.relative_to(folder).as_posix()] = state | {"sha256": sha256}
    text = json.dumps(kept, indent=1, sort_keys=True).encode()
    target = folder / DIGESTS
    with contextlib.suppress(OSError):  # a read-only claim: every pod hashes, as before
        if kept and (not target.is_file() or target.read_bytes() != text):
            partial = folder / f"{DIGESTS}.{uuid.uuid4().hex}"
            partial.write_bytes(text)
            partial.replace(target)
