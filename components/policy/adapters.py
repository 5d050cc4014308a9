"""Adapters as files and as matrices: reading peft's and diffusers' layouts, and merging several into one.

An adapter replaces a linear layer's W x by W x + (alpha / r) B A x with A `[r, in]` and B `[out, r]`. In memory
(`Adapter`) keys are those of the transformer, `transformer_blocks.0.attn.to_q.lora_A.weight`; peft's files put
`base_model.model.` before them, diffusers' files `transformer.`. Putting an adapter on a model is in `lora.py`, writing
files in `adapter_files.py`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
import reprlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from layerloop.components.policy.alphas import Scales
from layerloop.components.policy.layouts import check_keys, plain_state
from layerloop.components.schema.errors import LayerloopError
from layerloop.components.schema.messages import size_text
from layerloop.components.schema.record import parse_json
from layerloop.components.schema.tensor_files import LENGTH, PICKLE, check_header

NAME = "default"  # peft's name for the one adapter of a model
PEFT_WEIGHTS, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
DIFFUSERS_WEIGHTS = "pytorch_lora_weights.safetensors"
PICKLED = ("adapter_model.bin", "pytorch_lora_weights.bin")  # what old versions of both wrote
# No name that ends as the one above: of several such files in a repository diffusers takes any.
DIFFUSERS_BFLOAT16 = "pytorch_lora_weights.bf16.safetensors"
PEFT, DIFFUSERS = "peft", "diffusers"  # subfolders by layout: peft's of every publication, diffusers' of old ones
PEFT_PREFIX, DIFFUSERS_PREFIX = "base_model.model.", "transformer."
LONGEST_CONFIG = 10_000_000  # bytes of an adapter_config.json
MOST_NUMBERS = 2**32  # in matrices of one rank: 16 GB; rank 256 on every layer of a 20 B model is a third of it
# Fields of peft's config that make more of an adapter than two matrices beside a layer's own, with their usual values.
UNSUPPORTED = {
    "use_dora": False, "lora_bias": False, "modules_to_save": None, "bias": "none", "fan_in_fan_out": False,
    "use_qalora": False, "use_bdlora": None, "target_parameters": None, "layer_replication": None, "arrow_config": None,
    "alora_invocation_tokens": None, "trainable_token_indices": None,
}  # fmt: skip
# What trainers write into a file's metadata of other bases (kohya's sd-scripts, musubi-tuner; Stability's ModelSpec).
OTHER_BASES = r"flux|chroma|stable-|sd[_-]?[v\dx]|wan|hunyuan|framepack|ltx|lumina|hidream|z-?image|kandinsky|cogvideo"
# Values of `init_lora_weights` with which peft changes the base's own weights: without that it is another function.
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclasses.dataclass(frozen=True)
class Adapter:
    """`state` maps `<module>.lora_A.weight` `[r, in]` and `<module>.lora_B.weight` `[out, r]` to float32 CPU tensors,
    in sorted order; every module has rank `rank` and scale `alpha / rank`."""

    state: dict[str, torch.Tensor]
    rank: int
    alpha: float

    @property
    def modules(self) -> list[str]:
        """Names of the adapted linear layers, sorted."""
        return [key.removesuffix(".lora_A.weight") for key in self.state if key.endswith(".lora_A.weight")]

    @property
    def parameters(self) -> int:
        """Number of weights in all matrices."""
        return sum(tensor.numel() for tensor in self.state.values())


def folded(adapter: Adapter) -> Adapter:
    """The same function with alpha equal to the rank: B takes the scale, rounded once, exact for powers of two.

    Readers that know no alpha (ComfyUI without `.alpha` tensors, diffusers without metadata) take a scale of 1.
    """
    scale = adapter.alpha / adapter.rank
    if scale == 1:
        return adapter
    state = {k: (v.double() * scale).float() if k.endswith("lora_B.weight") else v for k, v in adapter.state.items()}
    return Adapter(state, adapter.rank, float(adapter.rank))


# ---- reading


def read_adapter(path: Path | str) -> Adapter:
    """Read an adapter: a folder or a safetensors file, in peft's or diffusers' layout or one of `layouts.py`.

    A publication or a merge is read as it stands; old ones have no weights at their root, but a subfolder per layout,
    and the released Stable-Layers has one subfolder.

    Ranks and scales that differ between modules are made uniform without changing the function: B takes the scale, and
    smaller ranks are padded with zeros.

    Raises:
        LayerloopError: no adapter at `path`, an unsupported kind, a broken file, or NaN in it.
    """
    file = _weights_file(Path(path))
    tensors, metadata = _read_tensors(file)
    _refuse_other_bases(metadata, file)
    config, config_of = None, file
    if file.name != PEFT_WEIGHTS and "lora_adapter_metadata" in metadata:  # its own, whatever lies beside it
        config = _transformer_metadata(metadata["lora_adapter_metadata"], file) or None
        _refuse_more(config or {}, file)
    elif file.name == PEFT_WEIGHTS or (file.parent / PEFT_CONFIG).is_file():
        config, config_of = _peft_config(file), file.parent / PEFT_CONFIG
    tensors, alphas = plain_state(tensors, file)
    if alphas and config is not None:
        raise LayerloopError(
            f"{file}: {next(iter(alphas))}.alpha and {config_of.name} both give a scale: leave out one of them"
        )
    return _uniform(tensors, Scales(config, config_of, alphas), file)


def _weights_file(path: Path) -> Path:
    names = (PEFT_WEIGHTS, DIFFUSERS_WEIGHTS)
    inside = (*names, f"{PEFT}/{PEFT_WEIGHTS}", f"{DIFFUSERS}/{DIFFUSERS_WEIGHTS}")
    try:
        if path.is_file():
            return path
        for name in inside:
            if (path / name).is_file():
                return path / name
        exists = path.exists()
        inner = [file for name in names for file in sorted(path.glob(f"*/{name}"))]
        others = sorted(file for file in path.glob("*.safetensors") if file.is_file() and file.name[0] != ".")
    except OSError as error:
        raise LayerloopError(f"{path} cannot be read ({error.strerror}): give an adapter that can") from None
    if not exists:
        raise LayerloopError(f"{path} is not an adapter: there is no such file or folder; correct the path")
    found = sorted({file.parent for file in inner})
    if len(found) == 1:  # as the released Stable-Layers, whose weights are in `model`
        return inner[0]
    if found:
        raise LayerloopError(f"{path} has several adapters, {found[0].name} and {found[1].name}: give one of them")
    if len(others) == 1:  # as people share theirs
        return others[0]
    if others:
        raise LayerloopError(f"{path} has several files, {others[0].name} and {others[1].name}: give one of them")
    if pickled := next((name for name in PICKLED if (path / name).is_file()), None):
        raise LayerloopError(f"{path / pickled} is {PICKLE}")
    raise LayerloopError(
        f"{path} is not an adapter: it has neither {' nor '.join(names)}; give the folder that has one, or the "
        "safetensors file itself"
    )


def weights_sha256(path: Path | str) -> str:
    """SHA-256, hex, of an adapter's weights file in either layout.

    Raises:
        LayerloopError: no adapter at `path`, or one that cannot be read.
    """
    found = _weights_file(Path(path))
    try:
        with found.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise LayerloopError(f"{found} cannot be read ({error.strerror}): give an adapter that can") from None


def _read_tensors(file: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    if re.search(r"-\d{5}-of-(?!00001)\d{5}$", file.stem):
        raise LayerloopError(f"{file} is one of several parts of an adapter: save all of them as one file")
    if not _is_unicode(str(file)):
        raise LayerloopError(f"{file} has a name that is not UTF-8, which safetensors cannot open: rename it")
    try:
        with file.open("rb") as opened:
            check_header(opened.read(LENGTH), where=str(file))
        with safe_open(str(file), framework="pt") as reader:
            check_keys(reader.keys(), file)  # before any number of a file that may be a whole model
            tensors = {key: reader.get_tensor(key) for key in reader.keys()}  # noqa: SIM118 - it is not a mapping
            metadata = reader.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise LayerloopError(f"{file} cannot be read ({error}): it was truncated or is another kind of file") from None
    for key, value in tensors.items():
        if value.is_floating_point():
            try:
                tensors[key] = value.float()  # exact for float8 too, for which torch implements little else
            except NotImplementedError:  # torch converts float8, but not float4
                raise LayerloopError(
                    f"{file}: {key} has dtype {str(value.dtype).removeprefix('torch.')}, which cannot be read: "
                    "save the adapter in float32 or bfloat16"
                ) from None
            if not torch.isfinite(tensors[key]).all():
                raise LayerloopError(
                    f"{file}: {key} has NaN or infinite values: the adapter is broken, take an earlier one"
                )
    return tensors, metadata


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _peft_config(file: Path) -> dict[str, Any]:
    path = file.parent / PEFT_CONFIG
    try:
        if path.stat().st_size > LONGEST_CONFIG:
            raise LayerloopError(f"{path} has {path.stat().st_size} bytes, over {LONGEST_CONFIG}: fetch it again")
        config = parse_json(path.read_bytes())
    except FileNotFoundError:
        raise LayerloopError(f"{path} is missing: {file.name} in peft's layout needs it for its alpha") from None
    except OSError as error:
        raise LayerloopError(f"{path} cannot be read ({error.strerror}): fetch it again") from None
    except (ValueError, RecursionError):
        config = None
    if not isinstance(config, dict):
        raise LayerloopError(f"{path} is not a JSON object: fetch it again")
    _refuse_more(config, path)
    return config


def _refuse_other_bases(metadata: dict[str, str], file: Path) -> None:
    """Refuse a file that names another base than Qwen-Image's. FLUX has layers of the same names and width."""
    for field in ("modelspec.architecture", "ss_base_model_version"):
        said = metadata.get(field, "")
        if re.match(OTHER_BASES, said, re.IGNORECASE):
            raise LayerloopError(f"{file} has {field} {said[:60]!r}: it is for another base; give one of Qwen-Image's")


def _refuse_more(config: dict[str, Any], path: Path) -> None:
    """Refuse a config of another function than that of two matrices beside the base's weights."""
    if config.get("peft_type", "LORA") != "LORA":
        raise LayerloopError(f"{path} has peft_type {config['peft_type']!r}: only LORA is supported")
    for name, usual in UNSUPPORTED.items():
        if config.get(name) not in (usual, None, [], {}, False):
            raise LayerloopError(f"{path} has {name} {reprlib.repr(config[name])}: only plain LoRA is supported")
    first = config.get("init_lora_weights")
    if isinstance(first, str) and first.lower().startswith(CHANGES_BASE):
        raise LayerloopError(
            f"{path} has init_lora_weights {first[:40]!r}, which changed the base's own weights in training: convert "
            "it to plain LoRA (peft's path_initial_model_for_weight_conversion)"
        )


def _transformer_metadata(text: str, file: Path) -> dict[str, Any]:
    """The peft config that diffusers writes into a file's metadata, as `transformer.<field>`."""
    try:
        fields = parse_json(text)
        return {k.removeprefix(DIFFUSERS_PREFIX): v for k, v in fields.items() if k.startswith(DIFFUSERS_PREFIX)}
    except (ValueError, AttributeError, RecursionError):
        raise LayerloopError(f"{file} has lora_adapter_metadata that is not JSON: write the adapter again") from None


def _uniform(tensors: dict[str, torch.Tensor], scales_of: Scales, file: Path) -> Adapter:
    """An adapter of one rank and one scale from checked tensors; `file` is named in errors."""
    modules = sorted({key.rsplit(".lora_", 1)[0] for key in tensors})
    for key in tensors:
        if not tensors[key].is_floating_point():
            raise LayerloopError(
                f"{file}: {key} has dtype {str(tensors[key].dtype).removeprefix('torch.')}, which a LoRA weight cannot "
                "have: save the adapter in float32 or bfloat16"
            )
    for module in modules:
        for side in ("lora_A", "lora_B"):
            if f"{module}.{side}.weight" not in tensors:
                raise LayerloopError(f"{file}: {module}.{side}.weight is missing: the adapter is incomplete")
        a, b = (tensors[f"{module}.{side}.weight"] for side in ("lora_A", "lora_B"))
        if not a.numel() or not b.numel():
            raise LayerloopError(
                f"{file}: {module} has lora_A {shape_text(a)} and lora_B {shape_text(b)}, without a number: the "
                "adapter is broken, take an earlier one"
            )
        if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
            raise LayerloopError(
                f"{file}: {module} has lora_A {shape_text(a)} and lora_B {shape_text(b)}, which do not multiply"
            )
    if not modules:
        raise LayerloopError(f"{file} has no LoRA weights")
    ranks = {module: tensors[f"{module}.lora_A.weight"].shape[0] for module in modules}
    scales = {module: scales_of.scale(module, rank) for module, rank in ranks.items()}
    rank = max(ranks.values())
    if len(set(scales.values())) == 1 and len(set(ranks.values())) == 1:
        return Adapter(dict(sorted(tensors.items())), rank, next(iter(scales.values())) * rank)
    widths = sum(t.numel() // ranks[key.rsplit(".lora_", 1)[0]] for key, t in tensors.items())
    if rank * widths > MOST_NUMBERS:
        raise LayerloopError(
            f"{file} has ranks from {min(ranks.values())} to {rank}, as one rank {size_text(4.0 * rank * widths)}: "
            "reduce the largest"
        )
    state = {}
    for module in modules:
        a, b = tensors[f"{module}.lora_A.weight"], tensors[f"{module}.lora_B.weight"] * scales[module]
        state[f"{module}.lora_A.weight"] = torch.nn.functional.pad(a, (0, 0, 0, rank - ranks[module]))
        state[f"{module}.lora_B.weight"] = torch.nn.functional.pad(b, (0, rank - ranks[module]))
    return Adapter(dict(sorted(state.items())), rank, float(rank))


def shape_text(tensor: torch.Tensor) -> str:
    """A shape for messages, such as `4x64`."""
    return "x".join(map(str, tensor.shape))


# ---- merging


def merge_adapters(parts: Sequence[tuple[Path | str, float]], *, rank: int | None = None) -> Adapter:
    """The weighted sum of adapters: its update of every module is sum_i w_i (alpha_i / r_i) B_i A_i.

    Averaging the As and the Bs, as is often done, is not that sum. Here it is exact: the factors are stacked, A from
    the A_i and B from the w_i (alpha_i / r_i) B_i, so ranks add up (and may differ, as may the modules). With `rank`
    the sum is replaced by its best approximation of that rank (truncated SVD, the least Frobenius error: Eckart and
    Young 1936), computed from the factors in float64.

    Raises:
        LayerloopError: no adapters, one that cannot be read, two that disagree about a module's size, or a weight so
            large that the product overflows float32.
    """
    if not parts:
        raise LayerloopError("no adapters to merge: give at least one folder")
    adapters = [(read_adapter(path), weight, path) for path, weight in parts]
    total = sum(adapter.rank for adapter, _, _ in adapters)
    state = {}
    for module in sorted({module for adapter, _, _ in adapters for module in adapter.modules}):
        factors: list[tuple[torch.Tensor, torch.Tensor]] = []
        for adapter, weight, path in adapters:
            if f"{module}.lora_A.weight" in adapter.state:
                scale = weight * adapter.alpha / adapter.rank
                a = adapter.state[f"{module}.lora_A.weight"].double()
                b = adapter.state[f"{module}.lora_B.weight"].double() * scale
                if factors and (a.shape[1], b.shape[0]) != (factors[0][0].shape[1], factors[0][1].shape[0]):
                    raise LayerloopError(
                        f"{path}: {module} is {b.shape[0]}x{a.shape[1]}, another adapter's is "
                        f"{factors[0][1].shape[0]}x{factors[0][0].shape[1]}: they are for different bases; "
                        "merge adapters of one base"
                    )
                if not torch.isfinite(b.float()).all():
                    raise LayerloopError(
                        f"{path} times its weight {weight:g} has NaN or infinite values in {module}: "
                        "choose a smaller weight"
                    )
                factors.append((a, b))
        stacked = torch.cat([a for a, _ in factors]), torch.cat([b for _, b in factors], dim=1)
        a, b = _truncate(*stacked, rank) if rank is not None else stacked
        width = total if rank is None else rank
        state[f"{module}.lora_A.weight"] = torch.nn.functional.pad(a, (0, 0, 0, width - a.shape[0])).float()
        state[f"{module}.lora_B.weight"] = torch.nn.functional.pad(b, (0, width - b.shape[1])).float()
    width = total if rank is None else rank
    return Adapter(state, width, float(width))


def _truncate(a: torch.Tensor, b: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The best rank-`rank` factors of b @ a: SVD of the small core between two QR factors, the root of each singular
    value on either side."""
    qb, rb = torch.linalg.qr(b)
    qa, ra = torch.linalg.qr(a.T)
    u, s, vt = torch.linalg.svd(rb @ ra.T)
    keep = min(rank, s.numel())
    root = s[:keep].sqrt()
    return root[:, None] * (vt[:keep] @ qa.T), (qb @ u[:, :keep]) * root
