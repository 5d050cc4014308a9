"""A low-rank adapter on the transformer: its layers, putting one on and taking it off.

The base is of any dtype and frozen; adapter weights are float32. Reading files and merging are in `adapters.py`,
writing files in `adapter_files.py`.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from layerloop.components.policy.adapters import (
    NAME,
    Adapter,
    read_adapter,
    shape_text,
)
from layerloop.components.schema.errors import LayerloopError
from layerloop.components.schema.learning import LoraRecipe
from layerloop.components.schema.seeds import seed_for

# ---- which modules


def dead_modules(transformer: Any) -> list[str]:
    """Linear layers that cannot change the output: the text side of the last block, except its keys and values.

    The model reads only the image stream after the last block, so there the text stream's attention output (its
    projection, and its queries, which only that output depends on) and its feed-forward go nowhere: their gradient is
    absent or exactly zero, which breaks data-parallel training and wastes an optimizer's memory.
    """
    last = f"transformer_blocks.{len(transformer.get_submodule('transformer_blocks')) - 1}."
    dead = ("attn.to_add_out", "attn.add_q_proj", "txt_mlp")
    return [
        name
        for name, module in transformer.named_modules()
        if isinstance(module, torch.nn.Linear)
        and any(name == last + part or name.startswith(f"{last}{part}.") for part in dead)
    ]


def target_modules(transformer: Any, targets: Iterable[str]) -> list[str]:
    """Linear layers whose name is a target or ends with `.<target>`, without the dead ones, in the model's order.

    Raises:
        LayerloopError: a target matches no linear layer.
    """
    names = list(_shapes(transformer))
    chosen: set[str] = set()
    for target in targets:
        hits = {name for name in names if name == target or name.endswith(f".{target}")}
        if not hits:
            raise LayerloopError(
                f"recipe.lora.targets has {target!r}, which is not a linear layer of the model: "
                f"layers of a block are {', '.join(_block_layers(names))}"
            )
        chosen |= hits
    dead = set(dead_modules(transformer))
    return [name for name in names if name in chosen and name not in dead]


def _block_layers(names: Iterable[str]) -> list[str]:
    prefix = "transformer_blocks.0."
    return [name.removeprefix(prefix) for name in names if name.startswith(prefix)]


# ---- on a transformer


def new_adapter(transformer: Any, recipe: LoraRecipe, *, seed: int) -> Adapter:
    """An untrained adapter: float32, A gaussian with std 1/r, B zero, so that with it the policy is the base exactly.

    Each A is drawn by its own seed, hashed from `seed` and the module's name: the same on every rank and for any subset
    of targets.

    Raises:
        LayerloopError: a target matches no linear layer.
    """
    modules = target_modules(transformer, recipe.targets)
    shapes = _shapes(transformer)
    state = {}
    for module in modules:
        outputs, inputs = shapes[module]
        generator = torch.Generator().manual_seed(seed_for(seed, module, "lora_A"))
        state[f"{module}.lora_A.weight"] = torch.randn(recipe.rank, inputs, generator=generator) / recipe.rank
        state[f"{module}.lora_B.weight"] = torch.zeros(outputs, recipe.rank)
    return Adapter(dict(sorted(state.items())), recipe.rank, recipe.alpha)


def put_adapter(transformer: Any, adapter: Adapter, *, where: str = "adapter") -> None:
    """Put `adapter` on `transformer`, trainable; the base stays frozen. `where` names it in errors.

    Weights of dead modules, which other trainers include, are left out: they change nothing.

    Raises:
        LayerloopError: a module that the base lacks or a shape that does not fit, the first by name.
    """
    from peft import LoraConfig

    fitting = fitted(transformer, adapter, where=where)
    config = LoraConfig(
        r=adapter.rank,
        lora_alpha=config_alpha(adapter),
        init_lora_weights=True,
        **module_lists(transformer, fitting.modules),
    )
    transformer.add_adapter(config, adapter_name=NAME)
    set_adapter_state(transformer, fitting.state)
    for module in fitting.modules:
        layer = transformer.get_submodule(module)
        layer.forward = types.MethodType(_adapted_forward, layer)


def _adapted_forward(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """An adapted layer: float32 weights, multiplied in the precision of the activations.

    peft's own forward casts the activations to float32, writes the adapter's full-width output in float32, scales it
    and adds the two in float32, which at the full model's size costs as much as the base layer itself. Here the
    low-rank product is added inside one matrix product (accumulated in float32, rounded once).

    A float32 base samples with peft's own bits, against which a published adapter is verified: there the product is
    added in place and not multiplied by a scale of 1. Only in training is the sum left to the matrix product.
    """
    result = layer.base_layer(x)
    if layer.disable_adapters:
        return result
    for name in layer.active_adapters:
        if name in layer.lora_A:
            a, b, scale = layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name]
            low = torch.nn.functional.linear(x, a.to(x.dtype))
            if x.dtype == torch.float32 and not (scale == 1 and torch.is_grad_enabled()):
                wide = torch.nn.functional.linear(low, b)
                result = result.add_(wide if scale == 1 else wide * scale)
            else:
                b = (b if scale == 1 else b * scale).to(x.dtype)
                result = torch.addmm(result.flatten(0, -2), low.flatten(0, -2), b.T).view_as(result)
    return result


def replace_adapter(transformer: Any, adapter: Adapter, *, where: str = "adapter") -> None:
    """Put `adapter` on `transformer` in place of the present one, if any.

    Where the two have the same modules, rank and scale the weights are copied: modules and parameters stay the same
    objects, so what was compiled or sharded around them stays valid.

    Raises:
        LayerloopError: the adapter does not fit the base.
    """
    fitting = fitted(transformer, adapter, where=where)
    if has_adapter(transformer):
        present = transformer.peft_config[NAME]
        keys = {key for key, _ in _lora_linears(transformer)}
        if (keys, present.r, float(present.lora_alpha)) == (set(fitting.state), fitting.rank, float(fitting.alpha)):
            set_adapter_state(transformer, fitting.state)
            return
        remove_adapter(transformer)
    put_adapter(transformer, fitting, where=where)


def has_adapter(transformer: Any) -> bool:
    """Whether an adapter is on `transformer`."""
    return NAME in (getattr(transformer, "peft_config", None) or {})


def remove_adapter(transformer: Any) -> None:
    """Take the adapter off `transformer`, which has the base's own modules again; nothing happens if there is none."""
    if has_adapter(transformer):
        transformer.unload_lora()


def lora_parameters(transformer: Any) -> list[torch.nn.Parameter]:
    """The adapter's matrices, trainable or not; empty where there is no adapter."""
    return [linear.weight for _, linear in _lora_linears(transformer)]


def train_adapter(transformer: Any, trainable: bool) -> None:
    """Set whether the adapter's matrices require gradients; gradients that they had are dropped."""
    for parameter in lora_parameters(transformer):
        parameter.requires_grad_(trainable)
        parameter.grad = None


def set_adapter_state(transformer: Any, state: Mapping[str, torch.Tensor]) -> None:
    """Copy `state` into the adapter, making its weights float32.

    Raises:
        LayerloopError: keys or shapes are not those of the adapter.
    """
    parameters = dict(_lora_linears(transformer))
    for key in sorted(state.keys() | parameters.keys()):
        if key not in parameters or key not in state:
            raise LayerloopError(f"adapter weight {key} is {'not in the model' if key in state else 'missing'}")
        linear, value = parameters[key], state[key]
        if tuple(linear.weight.shape) != tuple(value.shape):
            raise LayerloopError(
                f"adapter weight {key} has shape {shape_text(value)}, the model's is {shape_text(linear.weight)}"
            )
        weight = value.detach().to(linear.weight.device, torch.float32)
        if linear.weight.dtype == torch.float32:
            with torch.no_grad():
                linear.weight.copy_(weight)
        else:
            linear.weight = torch.nn.Parameter(weight, requires_grad=linear.weight.requires_grad)


def adapter_state(transformer: Any) -> dict[str, torch.Tensor]:
    """The adapter's weights by `Adapter` key, sorted: detached copies on the CPU, float32.

    Raises:
        LayerloopError: the model has no adapter.
    """
    state = {
        key: linear.weight.detach().to("cpu", torch.float32, copy=True) for key, linear in _lora_linears(transformer)
    }
    if not state:
        raise LayerloopError("the model has no adapter: put one on it first")
    return dict(sorted(state.items()))


def adapter_of(transformer: Any) -> Adapter:
    """The adapter of a transformer, as `put_adapter` takes it.

    Raises:
        LayerloopError: the model has no adapter.
    """
    state = adapter_state(transformer)
    config = transformer.peft_config[NAME]
    return Adapter(state, int(config.r), float(config.lora_alpha))


def starting_adapter(transformer: Any, recipe: LoraRecipe, folder: Path | str) -> Adapter:
    """The adapter in `folder` as one of `recipe`'s rank, alpha and targets.

    Another alpha / r is folded into B, so the function is the same.

    Raises:
        LayerloopError: its rank or its modules are not the recipe's.
    """
    source = fitted(transformer, read_adapter(folder), where=str(folder))
    if source.rank != recipe.rank:
        raise LayerloopError(
            f"{folder} has rank {source.rank} but recipe.lora.rank is {recipe.rank}: "
            f"set recipe.lora.rank to {source.rank}"
        )
    wanted, given = target_modules(transformer, recipe.targets), set(source.modules)
    for module in sorted(given.symmetric_difference(wanted)):
        raise LayerloopError(
            f"{folder} has {'no weights' if module in wanted else 'weights'} for {module}, which recipe.lora.targets "
            f"{'asks for' if module in wanted else 'leaves out'}: set recipe.lora.targets to the adapter's modules"
        )
    ratio = (source.alpha / source.rank) / (recipe.alpha / recipe.rank)
    state = {k: v * ratio if k.endswith("lora_B.weight") and ratio != 1 else v for k, v in source.state.items()}
    return Adapter(state, recipe.rank, recipe.alpha)


def fitted(transformer: Any, adapter: Adapter, *, where: str) -> Adapter:
    """`adapter` without dead modules, after checking that its weights fit linear layers of `transformer`.

    Raises:
        LayerloopError: naming the first key that does not fit, with both shapes.
    """
    shapes, dead = _shapes(transformer), set(dead_modules(transformer))
    remedy = "give one of this base, or set recipe.model.base to that one"
    state = {}
    for key, value in adapter.state.items():
        module, side = key.removesuffix(".weight").rsplit(".", 1)
        if module not in shapes:
            raise LayerloopError(
                f"{where}: {key} is for {module}, which the base does not have: the adapter was made for another base; "
                f"{remedy}"
            )
        outputs, inputs = shapes[module]
        expected = (adapter.rank, inputs) if side == "lora_A" else (outputs, adapter.rank)
        if tuple(value.shape) != expected:
            raise LayerloopError(
                f"{where}: {key} has shape {shape_text(value)}, the base needs {'x'.join(map(str, expected))}: "
                f"the adapter was made for another base; {remedy}"
            )
        if module not in dead:
            state[key] = value
    if not state:
        raise LayerloopError(f"{where} has no weight that reaches the output of the base")
    return dataclasses.replace(adapter, state=state)


def _shapes(transformer: Any) -> dict[str, tuple[int, int]]:
    """(out, in) of every linear layer of the base, by its name without an adapter on it."""
    return {
        name.removesuffix(".base_layer"): (module.out_features, module.in_features)
        for name, module in transformer.named_modules()
        if isinstance(module, torch.nn.Linear) and ".lora_" not in name
    }


def _lora_linears(transformer: Any) -> Iterator[tuple[str, Any]]:
    """(`Adapter` key, peft's linear) of the adapter."""
    for path, module in transformer.named_modules():
        for side in ("lora_A", "lora_B"):
            if path.endswith(f".{side}.{NAME}"):
                yield f"{path.removesuffix(f'.{NAME}')}.weight", module


def module_lists(transformer: Any, modules: Sequence[str]) -> dict[str, list[str]]:
    """`target_modules` and `exclude_modules` of a peft config that mean exactly `modules`, as short as suffixes
    allow."""
    names, chosen = _shapes(transformer), set(modules)
    suffixes = sorted({_suffix(name) for name in modules})
    hit = [n for n in names if any(n == s or n.endswith(f".{s}") for s in suffixes)]
    excluded = [n for n in hit if n not in chosen]
    if len(excluded) < len(modules):
        return {"target_modules": suffixes, "exclude_modules": excluded}
    return {"target_modules": sorted(modules), "exclude_modules": []}


def config_alpha(adapter: Adapter) -> float:
    """The adapter's alpha, as an int where it is integral, as other programs write it."""
    return int(adapter.alpha) if float(adapter.alpha).is_integer() else adapter.alpha


def _suffix(module: str) -> str:
    """`transformer_blocks.3.attn.to_q` -> `attn.to_q`; a layer outside the blocks keeps its full name."""
    parts = module.split(".")
    return ".".join(parts[2:]) if parts[0] == "transformer_blocks" else module
