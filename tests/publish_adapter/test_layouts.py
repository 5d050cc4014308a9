"""The proof that the published files are the campaign's adapter: right ones pass, wrong ones do not."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft.tuners.lora import Linear
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from layerloop.components.policy.adapters import Adapter, folded
from layerloop.components.policy.lora import put_adapter
from layerloop.components.policy.model import LayeredPolicy
from layerloop.components.publish_adapter.layouts import publish_files, verify_round_trip
from layerloop.components.schema.errors import LayerloopError
from layerloop.components.schema.recipe import Recipe

from ..campaigns import prompt_embeds, trained_adapter
from .conftest import velocity

PROMPT = prompt_embeds()
PEFT, ROOT, HALF = (
    "peft/adapter_model.safetensors", "pytorch_lora_weights.safetensors", "pytorch_lora_weights.bf16.safetensors",
)  # fmt: skip
Tensors, Config = dict[str, torch.Tensor], dict[str, object]
Bare = Callable[..., tuple[LayeredPolicy, Adapter]]


@pytest.fixture(scope="module")
def bare(tiny_base: Path) -> Bare:
    """`bare(dtype, rank=4, alpha=8.0, scale=0.05)`: a bare base and an adapter for it, both of which are kept."""

    @functools.cache
    def base(dtype: str, fp8_base: bool) -> LayeredPolicy:
        return LayeredPolicy.load(recipe_of(dtype, fp8_base).model)

    def recipe_of(dtype: str, fp8_base: bool, **lora: float) -> Recipe:
        model = {"base": str(tiny_base), "dtype": dtype, "fp8_base": fp8_base}
        return Recipe.model_validate({"name": "shop", "model": model, "lora": lora})

    @functools.cache
    def make(
        dtype: str, *, rank: int = 4, alpha: float = 8.0, scale: float = 0.05, fp8_base: bool = False
    ) -> tuple[LayeredPolicy, Adapter]:
        recipe = recipe_of(dtype, fp8_base, rank=rank, alpha=alpha)
        adapter = trained_adapter(LayeredPolicy.load(recipe.model), recipe, seed=1, scale=scale)
        return base(dtype, fp8_base), adapter

    return make


# ---- right ones


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("scale", [0.0, 1e-42, 1e-5, 0.05, 10.0])
def test_an_adapter_of_any_effect_is_proven(bare: Bare, tmp_path: Path, dtype: str, scale: float) -> None:
    policy, adapter = bare(dtype, scale=scale)
    before = velocity(policy)
    publish_files(adapter, tmp_path, policy=policy, base="org/base")
    found = verify_round_trip(adapter, tmp_path, policy=policy, prompt_embeds=PROMPT)
    assert torch.equal(velocity(policy), before), "the base is the base again"
    assert not any("lora_" in name for name, _ in policy.transformer.named_modules())
    if scale in (0.0, 1e-42):
        assert found.effect == found.peft == found.diffusers == found.noise == 0.0
    elif dtype == "float32":
        assert (
            found.effect > 0.1 * min(scale, 1)
            and found.peft < 1e-5 * found.effect
            and found.diffusers < 1e-5 * found.effect
        )
        assert 1e-4 * found.effect < found.bfloat16 < 0.1 * found.effect
    elif scale >= 0.05:
        assert 0 < found.peft < 2 * found.noise and 0 < found.diffusers < 2 * found.noise


@pytest.mark.parametrize(("rank", "alpha"), [(2, 2.0), (3, 8.0), (16, 32.0), (4, 6.0)])
def test_layouts_that_round_otherwise_than_we_do_are_proven(
    bare: Bare, tmp_path: Path, rank: int, alpha: float
) -> None:
    policy, adapter = bare("float32", rank=rank, alpha=alpha)
    publish_files(adapter, tmp_path, policy=policy, base="org/base")
    found = verify_round_trip(adapter, tmp_path, policy=policy, prompt_embeds=PROMPT)
    assert found.peft < 1e-6 and found.diffusers < 1e-6 < found.effect


def test_a_base_that_is_stored_in_float8_is_proven(bare: Bare, tmp_path: Path) -> None:
    policy, adapter = bare("bfloat16", fp8_base=True)
    before = velocity(policy)
    publish_files(adapter, tmp_path, policy=policy, base="org/base")
    found = verify_round_trip(adapter, tmp_path, policy=policy, prompt_embeds=PROMPT)
    assert torch.equal(velocity(policy), before) and 0 < found.peft < 2 * found.noise < found.effect


def test_a_policy_with_an_adapter_on_it_proves_nothing(bare: Bare, tmp_path: Path, tiny_base: Path) -> None:
    policy, adapter = bare("float32")
    publish_files(adapter, tmp_path, policy=policy, base="org/base")
    taken = LayeredPolicy.load(Recipe.model_validate({"name": "r", "model": {"base": str(tiny_base)}}).model)
    put_adapter(taken.transformer, adapter)
    with pytest.raises(ValueError, match="what is loaded back would reuse its layers"):
        verify_round_trip(adapter, tmp_path, policy=taken, prompt_embeds=PROMPT)


# ---- wrong ones


def lora_of(tensors: Tensors, module: str) -> tuple[str, str]:
    """The keys of a module's A and B."""
    a, b = sorted(key for key in tensors if f"{module}.lora_" in key)
    return a, b


Q, K = "transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_k"
UNTRAINED = "transformer_blocks.0.img_mod.1"  # no target of the recipe


def swapped(tensors: Tensors, config: Config) -> None:
    for q, k in zip(lora_of(tensors, Q), lora_of(tensors, K), strict=True):
        tensors[q], tensors[k] = tensors[k], tensors[q]


def other_alpha(tensors: Tensors, config: Config) -> None:
    config["lora_alpha"] = 16


def without_a_module(tensors: Tensors, config: Config) -> None:
    """Left out of the weights and of the config's layers."""
    for key in lora_of(tensors, Q):
        del tensors[key]
    targets = config["target_modules"]
    assert isinstance(targets, list)
    if Q in targets:
        targets.remove(Q)
    else:
        config["exclude_modules"] = [*(config["exclude_modules"] or ()), Q]  # type: ignore[misc]


def without_weights(tensors: Tensors, config: Config) -> None:
    """Left out of the weights only: both libraries warn, and leave the module as it began."""
    del tensors[lora_of(tensors, Q)[1]]


def with_another_module(tensors: Tensors, config: Config) -> None:
    a, b = lora_of(tensors, Q)
    tensors[a.replace(Q, UNTRAINED)] = torch.zeros_like(tensors[a])
    tensors[b.replace(Q, UNTRAINED)] = torch.zeros(6 * tensors[b].shape[0], tensors[b].shape[1]).to(tensors[b])
    config["target_modules"] = [*config["target_modules"], UNTRAINED]  # type: ignore[misc]


def one_sign(tensors: Tensors, config: Config) -> None:
    tensors[lora_of(tensors, Q)[1]][3, 2] *= -1


def one_step_of_bfloat16(tensors: Tensors, config: Config) -> None:
    weights = tensors[lora_of(tensors, K)[0]]
    weights[1, 5] = float(torch.nextafter(weights[1, 5].bfloat16(), torch.tensor(float("inf")).bfloat16()))


def a_wider_rank(tensors: Tensors, config: Config) -> None:
    """Padded with zeros and with the alpha for it: the same function as another adapter."""
    for key, value in tensors.items():
        tensors[key] = torch.nn.functional.pad(value, (0, 0, 0, 4) if "lora_A" in key else (0, 4))
    config["r"], config["lora_alpha"] = 8, 2 * config["lora_alpha"]  # type: ignore[operator]


def a_config_of_another_rank(tensors: Tensors, config: Config) -> None:
    config["r"] = 2


WRONG = [
    (swapped, r"has transformer_blocks\.0\.attn\.to_[qk]\.lora_[AB]\.weight\[0, 0\] = .*, the campaign's is "),
    (other_alpha, r"scale alpha / rank 4\.0, the campaign has [12]\.0"),
    (without_a_module, r"has no adapter on transformer_blocks\.0\.attn\.to_q, unlike the campaign's"),
    (without_weights, r"has (no )?transformer_blocks\.0\.attn\.to_q\.lora_B\.weight"),
    (with_another_module, r"has an adapter on transformer_blocks\.0\.img_mod\.1, unlike the campaign's"),
    (one_sign, r"has transformer_blocks\.0\.attn\.to_q\.lora_B\.weight\[3, 2\] = "),
    (one_step_of_bfloat16, r"has transformer_blocks\.0\.attn\.to_k\.lora_A\.weight\[1, 5\] = "),
    (a_wider_rank, r"rank 8, the campaign has 4"),
    (a_config_of_another_rank, r"cannot load the adapter back|rank 2, the campaign has 4"),
]


def damage(folder: Path, name: str, change: Callable[[Tensors, Config], None]) -> None:
    """Change the weights and the config of one published file."""
    file = folder / name
    with safe_open(file, framework="pt") as reader:
        metadata = reader.metadata()
    tensors = load_file(file)
    prefix = "" if name == PEFT else "transformer."
    beside = file.parent / "adapter_config.json"
    text = beside.read_text() if name == PEFT else metadata["lora_adapter_metadata"]
    config = {key.removeprefix(prefix): value for key, value in json.loads(text).items()}
    change(tensors, config)
    text = json.dumps({prefix + key: value for key, value in config.items()})
    if name == PEFT:
        beside.write_text(text)
    else:
        metadata["lora_adapter_metadata"] = text
    save_file({key: value.contiguous() for key, value in tensors.items()}, file, metadata=metadata)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", [PEFT, ROOT, HALF])
@pytest.mark.parametrize(("change", "message"), WRONG, ids=[change.__name__ for change, _ in WRONG])
def test_a_wrong_adapter_is_refused(
    bare: Bare, tmp_path: Path, dtype: str, name: str, change: Callable[[Tensors, Config], None], message: str
) -> None:
    policy, adapter = bare(dtype)
    before = velocity(policy)
    publish_files(adapter, tmp_path, policy=policy, base="org/base")
    damage(tmp_path, name, change)
    with pytest.raises(LayerloopError, match=message) as refusal:
        verify_round_trip(adapter, tmp_path, policy=policy, prompt_embeds=PROMPT)
    assert name in str(refusal.value) or "cannot load the adapter back" in str(refusal.value)
    assert torch.equal(velocity(policy), before), "the base is the base again"


def test_a_weight_that_only_float32_shows_is_refused_on_a_bfloat16_base(bare: Bare, tmp_path: Path) -> None:
    """Diffusers rounds it away in loading; on another base it would not."""
    policy, adapter = bare("bfloat16")
    publish_files(adapter, tmp_path, policy=policy, base="org/base")

    def one_step_of_float32(tensors: Tensors, config: Config) -> None:
        weights = tensors[lora_of(tensors, Q)[0]]
        weights[0, 0] = torch.nextafter(weights[0, 0], torch.tensor(0.0))

    damage(tmp_path, ROOT, one_step_of_float32)
    where = r"transformer\.transformer_blocks\.0\.attn\.to_q\.lora_A\.weight\[0, 0\] = "
    with pytest.raises(LayerloopError, match=rf"^{ROOT} has {where}"):
        verify_round_trip(adapter, tmp_path, policy=policy, prompt_embeds=PROMPT)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("scale", [1e-5, 0.05])
@pytest.mark.parametrize("wrong", ["no scale", "twice the base", "another precision"])
def test_a_library_that_computes_otherwise_is_refused(
    bare: Bare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, scale: float, wrong: str
) -> None:
    """Weights and scales are right here; the layer's own product is not."""
    policy, adapter = bare(dtype, scale=scale)
    publish_files(adapter, tmp_path, policy=policy, base="org/base")

    def forward(layer: Linear, x: torch.Tensor) -> torch.Tensor:
        (name,) = layer.lora_A
        a, b = (side[name].weight for side in (layer.lora_A, layer.lora_B))
        base, low = layer.base_layer(x), torch.nn.functional.linear(x.to(a.dtype), a)
        if wrong == "another precision":
            low = low.bfloat16().to(a.dtype)
        product = torch.nn.functional.linear(low, b) * (1.0 if wrong == "no scale" else layer.scaling[name])
        return (base * (2 if wrong == "twice the base" else 1) + product).to(base.dtype)

    monkeypatch.setattr(Linear, "forward", forward)
    with pytest.raises(LayerloopError, match=r"loaded by peft, gives for .* another product than \(alpha / rank\) B A"):
        verify_round_trip(adapter, tmp_path, policy=policy, prompt_embeds=PROMPT)


# ---- other readers


def test_a_reader_that_knows_no_alpha_reads_the_same_function(bare: Bare, tmp_path: Path) -> None:
    """Alpha 32 on rank 16: with a scale of 1 the weights as trained would have half the effect."""
    policy, adapter = bare("float32", rank=16, alpha=32.0)
    publish_files(adapter, tmp_path, policy=policy, base="org/base")
    read = load_file(tmp_path / ROOT)
    for module in adapter.modules:
        a, b = (adapter.state[f"{module}.lora_{side}.weight"] for side in "AB")
        found = read[f"transformer.{module}.lora_B.weight"] @ read[f"transformer.{module}.lora_A.weight"]
        assert torch.equal(found, 2.0 * (b @ a)), module
    with safe_open(tmp_path / ROOT, framework="pt") as reader:
        config = json.loads(reader.metadata()["lora_adapter_metadata"])
    assert config["transformer.lora_alpha"] == config["transformer.r"] == 16, "a reader of the metadata reads it too"
    save_file(read, tmp_path / ROOT)  # without metadata
    assert verify_round_trip(adapter, tmp_path, policy=policy, prompt_embeds=PROMPT).diffusers < 1e-6


def test_a_scale_that_is_no_power_of_two_is_folded_with_one_rounding(bare: Bare) -> None:
    _, adapter = bare("float32", rank=3, alpha=8.0)
    for key, value in folded(adapter).state.items():
        exact = value.double() if "lora_A" in key else adapter.state[key].double() * 8 / 3
        assert ((value.double() - exact).abs() <= 2.0**-24 * exact.abs()).all()


def test_every_key_is_in_the_map_of_comfyui(bare: Bare, tmp_path: Path) -> None:
    """Its loader (comfy/lora.py, model_lora_keys_unet, QwenImage) maps `transformer.<layer>` for each weight of the
    model, whose layers have diffusers' names, and takes `<mapped>.lora_A.weight` with `<mapped>.lora_B.weight`."""
    policy, adapter = bare("float32")
    publish_files(adapter, tmp_path, policy=policy, base="org/base")
    names = [key for key in policy.transformer.state_dict() if key.endswith(".weight")]
    mapped = {f"transformer.{name.removesuffix('.weight')}" for name in names}
    for file in (ROOT, HALF):
        keys = set(load_file(tmp_path / file))
        layers = {key.split(".lora_")[0] for key in keys}
        assert layers <= mapped and len(layers) == len(adapter.modules)
        assert keys == {f"{layer}.lora_{side}.weight" for layer in layers for side in "AB"}
    assert not {key.split(".lora_")[0] for key in load_file(tmp_path / PEFT)} & mapped, "peft's are not"


def test_the_copy_is_the_weights_rounded_to_bfloat16(bare: Bare, tmp_path: Path) -> None:
    policy, adapter = bare("float32")
    publish_files(adapter, tmp_path, policy=policy, base="org/base")
    whole, half = load_file(tmp_path / ROOT), load_file(tmp_path / HALF)
    assert whole.keys() == half.keys()
    assert all(half[key].dtype == torch.bfloat16 and torch.equal(half[key], whole[key].bfloat16()) for key in whole)
