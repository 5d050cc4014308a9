"""The published files, and the proof that each is the campaign's adapter.

What can be exact is exact. Each file is loaded by the library of its users, peft's by `PeftModel.from_pretrained` and
diffusers' by `QwenImageLayeredPipeline.load_lora_weights`, on a base that carries nothing of ours. Then:

- the model's adapted layers are the adapter's, each on the base's own layer, and every other layer is the base's own;
- rank, scale and each weight are the campaign's, compared as the library holds them (diffusers rounds them to the
  base's dtype) and, unrounded, in the file;
- each adapted layer gives c + (alpha / r) B (A x) for what its base layer gives, c: computed in float32 on the CPU by
  the library's own forward, within the bound of float32 rounding (`_rounding`). c has the size of the adapter's own
  product, so that the bound is relative to the adapter, however small its effect is, and the base, which may be 41 GB
  of bfloat16, is not needed.

From these the functions are equal: the models differ in nothing but adapted layers, and those are equal.

The velocities of the whole model are compared as well. On a float32 base they have to agree: two ways to compute the
same layer may differ by twice its rounding bound, and errors of that size, put on every adapted layer, show how far
that moves the velocity. In bfloat16 no such bound is of use: two forms of the same arithmetic differ by more than a
young adapter does. There the difference is measured, beside the one between two such forms in the same run, and
reported.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from layerloop.components.policy.adapter_files import write_layouts
from layerloop.components.policy.adapters import (
    DIFFUSERS_BFLOAT16,
    DIFFUSERS_PREFIX,
    DIFFUSERS_WEIGHTS,
    PEFT,
    PEFT_PREFIX,
    PEFT_WEIGHTS,
    Adapter,
    folded,
)
from layerloop.components.policy.float8 import Float8Linear
from layerloop.components.policy.lora import put_adapter, remove_adapter
from layerloop.components.policy.model import Condition
from layerloop.components.schema.errors import LayerloopError
from layerloop.components.schema.seeds import seed_for

if TYPE_CHECKING:
    from layerloop.components.policy.model import LayeredPolicy

PROBES = ((1, 0.98), (2, 0.7), (3, 0.2))  # (layers, sigma) of the passes that are compared
ROWS = 4  # inputs that each adapted layer is tried on: a wrong product agrees on random ones with probability 0
REMEDY = "nothing is published; check the versions of peft and diffusers"


@dataclass(frozen=True)
class RoundTrip:
    """Root mean squares over all probes of differences of the velocity.

    `effect` is between the adapter and the base. `noise` is between two forms of the campaign's own arithmetic that are
    equal in mathematics: the low-rank product added inside one matrix product, or rounded and then added. The others
    are between a file, loaded by its library, and the campaign's adapter.
    """

    effect: float
    noise: float
    peft: float
    diffusers: float
    bfloat16: float  # diffusers' file of bfloat16 weights


@dataclass(frozen=True)
class _File:
    """A published file, how it is loaded, and the adapter that it has to hold."""

    name: str  # relative to the publication
    loader: str
    prefix: str
    load: Callable[[LayeredPolicy, Path], Any]  # a context manager with the adapter on the policy
    adapter: Adapter


def publish_files(adapter: Adapter, folder: Path, *, policy: LayeredPolicy, base: str | None) -> list[Path]:
    """Write all files of weights into `folder`; returns them, relative to it. `base` is the base's name on the hub."""
    write_layouts(adapter, folder, transformer=policy.transformer, base=base)
    return sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())


@torch.compiler.set_stance("force_eager")  # a compiled base would be compiled anew for each way to adapt it
def verify_round_trip(adapter: Adapter, folder: Path, *, policy: LayeredPolicy, prompt_embeds: Tensor) -> RoundTrip:
    """Load every file of `folder` back and prove it; `policy` is the base, and is the base again afterwards.

    Args:
        prompt_embeds: `prompt_embeds[T, E]`, the campaign's prompt.

    Raises:
        LayerloopError: a file cannot be loaded, or is not this adapter: the first layer and weight by name.
    """
    transformer = policy.transformer
    own = dict(transformer.named_modules())
    if any("lora_" in name for name in own):
        raise ValueError("the policy has an adapter on it: what is loaded back would reuse its layers")
    velocities = {"base": _velocities(policy, prompt_embeds)}
    with _campaigns(policy, adapter) as layers:
        expected = _velocities(policy, prompt_embeds)
        _compute_by(layers, _rounded_then_added if policy.dtype != torch.float32 else _added_inside)
        velocities["noise"] = _velocities(policy, prompt_embeds)
        allowed = None
        if policy.dtype == torch.float32:
            _compute_by(layers, _off_by_the_bound)
            with torch.random.fork_rng():
                torch.manual_seed(0)
                allowed = _rms(_velocities(policy, prompt_embeds) - expected)
    for key, file in _files(adapter).items():
        with file.load(policy, folder):
            loaded = _check_layers(transformer, file, own)
            velocities[key] = _velocities(policy, prompt_embeds)
            for module, layer in loaded.items():
                _check_arithmetic(module, layer, file)
        _check_weights_in(folder / file.name, file)
        difference = _rms(velocities[key] - expected)
        if allowed is not None and key != "bfloat16" and not difference <= allowed:
            raise LayerloopError(
                f"{file.name}, loaded by {file.loader}, changes the velocity by {difference:.3g} (root mean square) "
                f"where float32 rounding allows {allowed:.3g}: {REMEDY}"
            )
    differences = {key: _rms(velocity - expected) for key, velocity in velocities.items()}
    return RoundTrip(effect=differences.pop("base"), **differences)


def _files(adapter: Adapter) -> dict[str, _File]:
    plain = folded(adapter)
    rounded = Adapter({k: v.bfloat16().float() for k, v in plain.state.items()}, plain.rank, plain.alpha)
    return {
        "peft": _File(f"{PEFT}/{PEFT_WEIGHTS}", "peft", PEFT_PREFIX, _by_peft, adapter),
        "diffusers": _File(DIFFUSERS_WEIGHTS, "diffusers", DIFFUSERS_PREFIX, _by_diffusers, plain),
        "bfloat16": _File(DIFFUSERS_BFLOAT16, "diffusers", DIFFUSERS_PREFIX, _by_diffusers_bfloat16, rounded),
    }


# ---- exactly


def _check_layers(transformer: nn.Module, file: _File, own: Mapping[str, nn.Module]) -> dict[str, Any]:
    """The adapted layers by name, after checking that they are the adapter's and all else is the base's own.

    Raises:
        LayerloopError: naming the layer that is missing, extra or other.
    """
    from peft.tuners.lora import Linear
    from peft.tuners.tuners_utils import BaseTunerLayer

    adapter, where = file.adapter, f"{file.name}, loaded by {file.loader},"
    layers = {name: module for name, module in transformer.named_modules() if isinstance(module, BaseTunerLayer)}
    for module in sorted(layers.keys() ^ set(adapter.modules)):
        what = "has an adapter on" if module in layers else "has no adapter on"
        raise LayerloopError(f"{where} {what} {module}, unlike the campaign's: {REMEDY}")
    for name, module in own.items():
        now = layers[name].base_layer if name in layers else transformer.get_submodule(name)
        if now is not module:
            raise LayerloopError(f"{where} replaces {name or 'the transformer'} of the base: {REMEDY}")
    scale = adapter.alpha / adapter.rank
    for module, layer in layers.items():
        if not isinstance(layer, Linear) or len(layer.lora_A) != 1 or "forward" in vars(layer):
            raise LayerloopError(
                f"{where} makes {module} a {type(layer).__name__} that is not one plain LoRA: {REMEDY}"
            )
        (name,) = layer.lora_A
        for what, found, wanted in (
            ("rank", layer.r[name], adapter.rank),
            ("scale alpha / rank", layer.scaling[name], scale),
            ("active adapters", [] if layer.disable_adapters or layer.merged else layer.active_adapters, [name]),
            ("variant", layer.lora_variant.get(name), None),
            ("bias", layer.lora_B[name].bias, None),
        ):
            if found != wanted:
                raise LayerloopError(f"{where} gives {module} {what} {found}, the campaign has {wanted}: {REMEDY}")
        for side in ("lora_A", "lora_B"):
            key = f"{module}.{side}.weight"
            weight = getattr(layer, side)[name].weight.detach()
            if weight.is_meta:  # what diffusers makes of a weight that the file lacks
                raise LayerloopError(f"{where} has no {key}, unlike the campaign's: {REMEDY}")
            _check_equal(weight.cpu(), adapter.state[key], f"{where} has {key}")
    return layers


def _check_weights_in(path: Path, file: _File) -> None:
    """Raises LayerloopError where the file does not hold the adapter's weights to the last bit, and nothing else."""
    from safetensors.torch import load_file

    tensors = load_file(path)
    wanted = {file.prefix + key: value for key, value in file.adapter.state.items()}
    for key in sorted(tensors.keys() ^ wanted.keys()):
        raise LayerloopError(f"{file.name} {'has' if key in tensors else 'lacks'} {key}: {REMEDY}")
    for key, value in wanted.items():
        _check_equal(tensors[key], value, f"{file.name} has {key}")


def _check_equal(found: Tensor, wanted: Tensor, what: str) -> None:
    """Raises LayerloopError where `found` is not `wanted`, rounded to its dtype."""
    if found.shape != wanted.shape:
        raise LayerloopError(f"{what} of shape {tuple(found.shape)}, the campaign's is {tuple(wanted.shape)}: {REMEDY}")
    found, wanted = found.double(), wanted.to(found.dtype).double()
    if not torch.equal(found, wanted):
        index = tuple(int(i) for i in (found != wanted).nonzero()[0])
        raise LayerloopError(
            f"{what}{list(index)} = {float(found[index]):.9g}, the campaign's is {float(wanted[index]):.9g}: {REMEDY}"
        )


class _Given(nn.Module):
    """A base layer whose output is given."""

    def __init__(self, output: Tensor) -> None:
        super().__init__()
        self.output = output

    def forward(self, x: Tensor) -> Tensor:
        return self.output.clone()


@torch.no_grad()
def _check_arithmetic(module: str, layer: Any, file: _File) -> None:
    """Raises LayerloopError unless `layer` gives c + (alpha / r) B (A x) where its base layer gives c.

    The exact value is computed in float64, the layer's own in float32 on the CPU; its weights stay there.
    """
    (name,) = layer.lora_A
    layer.lora_A[name].to("cpu", torch.float32)
    layer.lora_B[name].to("cpu", torch.float32)
    a, b = layer.lora_A[name].weight.double(), layer.lora_B[name].weight.double()
    scale = file.adapter.alpha / file.adapter.rank
    generator = torch.Generator().manual_seed(seed_for("publish", module))
    x = torch.randn(ROWS, a.shape[1], generator=generator)
    product = scale * (x.double() @ a.T @ b.T)
    given = torch.randn(product.shape, generator=generator) * (_rms(product) or 1.0)
    base, layer.base_layer = layer.base_layer, _Given(given)
    try:
        found = layer(x).double()
    finally:
        layer.base_layer = base
    bound = _rounding(x.double(), a, b, scale, given.double().abs(), terms=0)
    if not ((found - (given + product)).abs() <= bound).all():
        raise LayerloopError(
            f"{file.name}, loaded by {file.loader}, gives for {module} another product than (alpha / rank) B A x: "
            f"it is off by {_rms(found - given - product):.3g} of {_rms(product):.3g} (root mean squares): {REMEDY}"
        )


def _rounding(x: Tensor, a: Tensor, b: Tensor, scale: float, base: Tensor, *, terms: int) -> Tensor:
    """Bound on the float32 error of base(x) + scale B (A x), element by element, in whatever order it is summed.

    An inner product of n terms is off by at most gamma_n of the inner product of absolute values, gamma_n =
    n u / (1 - n u) with u = 2^-24 (Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., section 3.1); each
    further product or sum adds one to n. Numbers under the smallest normal one may be lost entirely.

    Args:
        x: `[..., in]`; a: `[r, in]`; b: `[out, r]`.
        base: `[..., out]`, the inner product of absolute values of the base layer, |W| |x| + |bias|.
        terms: summands of the base layer: 0 where its output is given, `in` and 1 for a bias.
    """
    rank, inputs = a.shape
    n = max(terms, inputs + rank + 1) + 1
    gamma = n * 2.0**-24 / (1 - n * 2.0**-24)
    lost = n * 2.0**-126 * (1 + abs(scale) * b.abs().sum(1))
    return gamma * (base + abs(scale) * (x.abs() @ a.abs().T @ b.abs().T)) + lost


# ---- measured


@torch.no_grad()
def _velocities(policy: LayeredPolicy, prompt_embeds: Tensor) -> Tensor:
    """Velocities of all probes in one vector: random latents and condition from hashed seeds, 2 x 4 tokens each."""
    height, width = 2 * policy.pixel_multiple, 4 * policy.pixel_multiple
    outputs = []
    for layers, sigma in PROBES:
        latents = policy.noise(seed_for("publish", layers), layers, height, width).to(policy.device)
        condition_latents = policy.noise(seed_for("publish", "condition"), 0, height, width).to(policy.device)
        prompt = prompt_embeds[None].to(policy.device, policy.dtype)
        condition = Condition(latents=condition_latents, prompt_embeds=prompt, height=height, width=width)
        outputs.append(policy.velocity(latents, sigma, condition).flatten().cpu())
    return torch.cat(outputs)


def _compute_by(layers: list[Any], forward: Callable[[Any, Tensor], Tensor]) -> None:
    for layer in layers:
        layer.forward = types.MethodType(forward, layer)


def _factors(layer: Any) -> tuple[Tensor, Tensor, float]:
    (name,) = layer.lora_A
    return layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name]


def _rounded_then_added(layer: Any, x: Tensor) -> Tensor:
    """An adapted layer as it is written: the low-rank product in the activations' dtype, then the sum."""
    a, b, scale = _factors(layer)
    low = torch.nn.functional.linear(x, a.to(x.dtype))
    return layer.base_layer(x) + torch.nn.functional.linear(low, b.to(x.dtype)) * scale


def _added_inside(layer: Any, x: Tensor) -> Tensor:
    """An adapted layer whose low-rank product is added inside its second matrix product, rounded once."""
    a, b, scale = _factors(layer)
    low, result = torch.nn.functional.linear(x, a.to(x.dtype)), layer.base_layer(x)
    return torch.addmm(result.flatten(0, -2), low.flatten(0, -2), (b * scale).to(x.dtype).T).view_as(result)


def _off_by_the_bound(layer: Any, x: Tensor) -> Tensor:
    """A float32 layer that is off by what two ways to compute it may differ by, with signs at random."""
    a, b, scale = _factors(layer)
    base, bias = layer.base_layer, layer.base_layer.bias
    weight = base.dequantised() if isinstance(base, Float8Linear) else base.weight.float()
    size = x.abs() @ weight.abs().T
    if bias is not None:
        size = size + bias.abs()
    bound = _rounding(x, a, b, scale, size, terms=x.shape[-1] + 1)
    signs = torch.empty_like(size).bernoulli_(0.5) * 2 - 1
    return _rounded_then_added(layer, x) + 2 * bound * signs


# ---- loading


@contextmanager
def _campaigns(policy: LayeredPolicy, adapter: Adapter) -> Iterator[list[Any]]:
    """The campaign's adapter on the policy; gives its layers."""
    put_adapter(policy.transformer, adapter)
    try:
        yield [policy.transformer.get_submodule(module) for module in adapter.modules]
    finally:
        remove_adapter(policy.transformer)


@contextmanager
def _by_peft(policy: LayeredPolicy, folder: Path) -> Iterator[None]:
    from peft import PeftModel

    try:  # puts the adapter into the transformer that it is given; the returned model wraps it
        with _weights_of_its_dtype(policy):
            loaded = PeftModel.from_pretrained(policy.transformer, str(folder), subfolder=PEFT)
    except Exception as error:  # peft raises many kinds; each means that users could not load it either
        policy.transformer.unload_lora()  # a failure leaves layers behind
        raise LayerloopError(f"peft cannot load the adapter back: {_one_line(error)}: nothing is published") from error
    try:
        yield
    finally:
        loaded.unload()


@contextmanager
def _by_diffusers(policy: LayeredPolicy, folder: Path, **options: str) -> Iterator[None]:
    from diffusers import QwenImageLayeredPipeline

    pipeline = QwenImageLayeredPipeline(
        scheduler=policy.scheduler, vae=policy.vae, transformer=policy.transformer,
        text_encoder=None, tokenizer=None, processor=None,
    )  # fmt: skip
    try:
        with _weights_of_its_dtype(policy):
            pipeline.load_lora_weights(str(folder), **options)
    except Exception as error:
        policy.transformer.unload_lora()  # a failure leaves layers behind
        raise LayerloopError(
            f"diffusers cannot load the adapter back: {_one_line(error)}: nothing is published"
        ) from error
    try:
        yield
    finally:
        pipeline.unload_lora_weights()


def _by_diffusers_bfloat16(policy: LayeredPolicy, folder: Path) -> Any:
    return _by_diffusers(policy, folder, weight_name=DIFFUSERS_BFLOAT16)


@contextmanager
def _weights_of_its_dtype(policy: LayeredPolicy) -> Iterator[None]:
    """The base with the dtype that it computes in, also where its weights are stored in float8: the libraries give an
    adapter the dtype of its base layer's weight, which they read while they load, its values not."""
    stored = {m: m.weight for m in policy.transformer.modules() if isinstance(m, Float8Linear)}
    for module, weight in stored.items():
        module.weight = nn.Parameter(torch.empty(0, dtype=policy.dtype, device=weight.device), requires_grad=False)
    try:
        yield
    finally:
        for module, weight in stored.items():
            module.weight = weight


def _rms(values: Tensor) -> float:
    return float(values.double().square().mean().sqrt())


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
