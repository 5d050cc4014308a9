"""Adapters: which layers, both layouts on disk, foreign files, merging."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import QwenImageLayeredPipeline, QwenImageTransformer2DModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from layerloop.components.policy import adapter_files, adapters, lora, merge
from layerloop.components.policy.model import Condition, LayeredPolicy
from layerloop.components.schema.errors import LayerloopError
from layerloop.components.schema.learning import LoraRecipe

EVERY_LINEAR = LoraRecipe(rank=3, alpha=6, targets=(*LoraRecipe().targets, "img_mod.1", "txt_mod.1"))


def output(policy: LayeredPolicy, condition: Condition) -> torch.Tensor:
    with torch.no_grad():
        return policy.velocity(policy.noise(0, 2, 64, 64), 0.7, condition)


def update_of(adapter: adapters.Adapter) -> dict[str, torch.Tensor]:
    """What the adapter adds to each weight, float64."""
    return {
        module: adapter.alpha
        / adapter.rank
        * adapter.state[f"{module}.lora_B.weight"].double()
        @ adapter.state[f"{module}.lora_A.weight"].double()
        for module in adapter.modules
    }


@pytest.fixture
def trained(base_recipe, shake):  # type: ignore[no-untyped-def]
    """A policy with an adapter that does something, alpha / r = 2."""
    policy = LayeredPolicy.load(base_recipe)
    lora.put_adapter(policy.transformer, lora.new_adapter(policy.transformer, LoraRecipe(rank=4, alpha=8), seed=5))
    shake(policy.transformer)
    return policy


# ---- which layers


@pytest.mark.parametrize("recipe", [LoraRecipe(rank=2), EVERY_LINEAR], ids=["paper", "every linear layer"])
def test_every_adapter_weight_gets_a_gradient(policy, condition, shake, recipe) -> None:  # type: ignore[no-untyped-def]
    lora.put_adapter(policy.transformer, lora.new_adapter(policy.transformer, recipe, seed=0))
    shake(policy.transformer)
    noise = torch.cat([policy.noise(seed, 2, 64, 64) for seed in range(2)])
    policy.velocity(noise, 0.7, condition).square().mean().backward()
    idle = [name for name, p in policy.trainable_parameters().items() if p.grad is None or not p.grad.abs().sum() > 0]
    assert idle == []
    blocks = len(policy.transformer.transformer_blocks)
    per_block = len(recipe.targets) + 2  # "net.0.proj" and "net.2" are in both streams' feed-forward
    assert len(policy.trainable_parameters()) == 2 * (blocks * per_block - 4)


def test_the_layers_left_out_get_no_gradient_at_all(policy, condition) -> None:  # type: ignore[no-untyped-def]
    """Each dead layer's own weight, through the complete model: leaving them out loses nothing."""
    weights = {name: policy.transformer.get_submodule(name).weight for name in lora.dead_modules(policy.transformer)}
    assert sorted(weights) == [
        f"transformer_blocks.1.{name}"
        for name in ("attn.add_q_proj", "attn.to_add_out", "txt_mlp.net.0.proj", "txt_mlp.net.2")
    ]
    for weight in weights.values():
        weight.requires_grad_(True)
    noise = policy.noise(0, 2, 64, 64).requires_grad_(True)
    policy.velocity(noise, 0.7, condition).square().mean().backward()
    assert all(weight.grad is None or not weight.grad.any() for weight in weights.values())


def test_dead_layers_are_those_of_the_last_block_of_any_depth() -> None:
    with torch.device("meta"):
        deep = QwenImageTransformer2DModel(
            num_layers=5, num_attention_heads=1, attention_head_dim=16, axes_dims_rope=(4, 6, 6)
        )
    dead = lora.dead_modules(deep)
    assert len(dead) == 4 and all(name.startswith("transformer_blocks.4.") for name in dead)
    targets = lora.target_modules(deep, LoraRecipe().targets)
    assert len(targets) == 5 * 12 - 4 and not set(dead) & set(targets)


def test_the_full_model_gets_the_papers_adapter() -> None:
    """106.2 M parameters with r = 16 on attention and feed-forward of 60 blocks, and less the dead four."""
    with torch.device("meta"):
        full = QwenImageTransformer2DModel(use_additional_t_cond=True, use_layer3d_rope=True)
    shapes = {name: full.get_submodule(name).weight.shape for name in lora.target_modules(full, LoraRecipe().targets)}
    assert len(shapes) == 60 * 12 - 4
    dead = sum(16 * sum(full.get_submodule(name).weight.shape) for name in lora.dead_modules(full))
    assert 16 * sum(sum(shape) for shape in shapes.values()) + dead == pytest.approx(106.2e6, rel=1e-3)


def test_a_target_that_matches_nothing_is_named(policy) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(
        LayerloopError, match=r"recipe\.lora\.targets has 'img_mlp\.net\.2\.proj', which is not a linear"
    ):
        lora.put_adapter(
            policy.transformer,
            lora.new_adapter(policy.transformer, LoraRecipe(targets=("to_q", "img_mlp.net.2.proj")), seed=0),
        )


# ---- a new adapter


def test_a_new_adapter_is_reproducible_gaussian_and_silent(base_recipe) -> None:  # type: ignore[no-untyped-def]
    states = []
    for seed in (1, 1, 2):
        policy = LayeredPolicy.load(base_recipe)
        torch.manual_seed(seed * 17 + len(states))  # of no influence
        lora.put_adapter(policy.transformer, lora.new_adapter(policy.transformer, LoraRecipe(rank=8), seed=seed))
        states.append(lora.adapter_state(policy.transformer))
    first, again, other = states
    assert first.keys() == again.keys() and all(torch.equal(first[key], again[key]) for key in first)
    a = torch.cat([value.flatten() for key, value in first.items() if "lora_A" in key])
    assert not torch.equal(a, torch.cat([value.flatten() for key, value in other.items() if "lora_A" in key]))
    assert abs(float(a.mean())) < 0.005 and float(a.std()) == pytest.approx(1 / 8, rel=0.02)
    assert all(not value.any() for key, value in first.items() if "lora_B" in key)


def test_a_layer_starts_alike_whatever_else_is_adapted(base_recipe) -> None:  # type: ignore[no-untyped-def]
    few, many = LayeredPolicy.load(base_recipe), LayeredPolicy.load(base_recipe)
    lora.put_adapter(few.transformer, lora.new_adapter(few.transformer, LoraRecipe(targets=("to_q",)), seed=1))
    lora.put_adapter(many.transformer, lora.new_adapter(many.transformer, LoraRecipe(), seed=1))
    state = lora.adapter_state(many.transformer)
    assert all(torch.equal(value, state[key]) for key, value in lora.adapter_state(few.transformer).items())


# ---- on disk


def test_both_layouts_load_in_their_own_programs_with_identical_outputs(
    trained, condition, random_folder, base_recipe, tmp_path
) -> None:  # type: ignore[no-untyped-def]
    from peft import PeftModel

    expected = output(trained, condition)
    adapter = lora.adapter_of(trained.transformer)
    adapter_files.write_peft(adapter, tmp_path / "peft", transformer=trained.transformer, base="a base")
    adapter_files.write_diffusers(adapter, tmp_path / "diffusers", transformer=trained.transformer)

    wrapped = LayeredPolicy.load(base_recipe)
    assert not torch.equal(output(wrapped, condition), expected)
    PeftModel.from_pretrained(wrapped.transformer, tmp_path / "peft")  # injects into the module that it is given
    assert torch.equal(output(wrapped, condition), expected)

    pipe = QwenImageLayeredPipeline.from_pretrained(random_folder, processor=None, dtype=torch.float32)
    pipe.load_lora_weights(tmp_path / "diffusers", adapter_name="rl")
    theirs = LayeredPolicy(transformer=pipe.transformer, vae=pipe.vae, scheduler=pipe.scheduler)
    assert torch.equal(output(theirs, condition), expected)

    for folder in ("peft", "diffusers"):
        policy = LayeredPolicy.load(base_recipe)
        lora.put_adapter(policy.transformer, adapters.read_adapter(tmp_path / folder))
        assert torch.equal(output(policy, condition), expected)
        assert len(policy.trainable_parameters()) == len(adapter.state)


def test_what_is_written_is_read_back_exactly(trained, tmp_path) -> None:  # type: ignore[no-untyped-def]
    adapter = lora.adapter_of(trained.transformer)
    assert (adapter.rank, adapter.alpha) == (4, 8)
    adapter_files.write_peft(adapter, tmp_path / "a", transformer=trained.transformer)
    adapter_files.write_diffusers(adapter, tmp_path / "b", transformer=trained.transformer)
    for folder, alpha, factor in (("a", 8, 1), ("b", 4, 2)):  # diffusers' file has the scale in B
        again = adapters.read_adapter(tmp_path / folder)
        assert (again.rank, again.alpha) == (4, alpha) and list(again.state) == list(adapter.state)
        for key, value in adapter.state.items():
            assert torch.equal(again.state[key], value * factor if "lora_B" in key else value)
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["r"] == 4 and config["lora_alpha"] == 8
    assert len(config["target_modules"]) == 12 and len(config["exclude_modules"]) == 4  # suffixes, not 20 full names


def test_writing_twice_gives_the_same_bytes(trained, tmp_path) -> None:  # type: ignore[no-untyped-def]
    adapter = lora.adapter_of(trained.transformer)
    for folder in ("a", "b"):
        adapter_files.write_peft(adapter, tmp_path / folder, transformer=trained.transformer)
        adapter_files.write_diffusers(adapter, tmp_path / folder, transformer=trained.transformer)
    for name in (
        "adapter_model.safetensors", "adapter_config.json", "pytorch_lora_weights.safetensors",
        "pytorch_lora_weights.bf16.safetensors",
    ):  # fmt: skip
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_diffusers_own_writer_is_read(trained, tmp_path) -> None:  # type: ignore[no-untyped-def]
    from diffusers.training_utils import _collate_lora_metadata
    from peft.utils import get_peft_model_state_dict

    QwenImageLayeredPipeline.save_lora_weights(
        tmp_path,
        transformer_lora_layers=get_peft_model_state_dict(trained.transformer),
        **_collate_lora_metadata({"transformer": trained.transformer}),
    )
    again, adapter = adapters.read_adapter(tmp_path), lora.adapter_of(trained.transformer)
    assert (again.rank, again.alpha) == (4, 8)
    assert all(torch.equal(again.state[key], value) for key, value in adapter.state.items())


def test_an_adapter_that_peft_saved_with_dead_layers_is_loaded_without_them(base_recipe, condition, tmp_path) -> None:  # type: ignore[no-untyped-def]
    """As the authors' released adapter was made: suffixes, nothing excluded."""
    from peft import LoraConfig, PeftModel, get_peft_model

    theirs = LayeredPolicy.load(base_recipe)
    wrapped = get_peft_model(
        theirs.transformer, LoraConfig(r=4, lora_alpha=4, target_modules=list(LoraRecipe().targets))
    )
    generator = torch.Generator().manual_seed(0)
    for parameter in (p for name, p in wrapped.named_parameters() if "lora_B" in name):
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.05
    wrapped.save_pretrained(tmp_path)
    assert isinstance(wrapped, PeftModel)
    expected = output(theirs, condition)

    ours = LayeredPolicy.load(base_recipe)
    lora.put_adapter(ours.transformer, adapters.read_adapter(tmp_path))
    assert torch.equal(output(ours, condition), expected)
    assert not any(".1.txt_mlp." in name for name in ours.trainable_parameters())

    started = LayeredPolicy.load(base_recipe)
    starting = lora.starting_adapter(started.transformer, LoraRecipe(rank=4, alpha=16), tmp_path)
    lora.put_adapter(started.transformer, starting)  # another alpha, the same function
    assert torch.allclose(output(started, condition), expected, atol=1e-5)
    assert lora.adapter_of(started.transformer).alpha == 16


def test_a_file_without_a_config_has_alpha_equal_to_its_rank(trained, tmp_path) -> None:  # type: ignore[no-untyped-def]
    adapter = lora.adapter_of(trained.transformer)
    save_file({f"transformer.{key}": value for key, value in adapter.state.items()}, tmp_path / "x.safetensors")
    assert adapters.read_adapter(tmp_path / "x.safetensors").alpha == adapter.rank


def test_the_formats_of_other_trainers_are_converted(trained, tmp_path) -> None:  # type: ignore[no-untyped-def]
    """`diffusion_model.` keys with lora_down, lora_up and alpha (musubi-tuner, ai-toolkit)."""
    adapter = lora.adapter_of(trained.transformer)
    foreign = {}
    for module in adapter.modules:
        foreign[f"diffusion_model.{module}.lora_down.weight"] = adapter.state[f"{module}.lora_A.weight"]
        foreign[f"diffusion_model.{module}.lora_up.weight"] = adapter.state[f"{module}.lora_B.weight"]
        foreign[f"diffusion_model.{module}.alpha"] = torch.tensor(adapter.alpha)
    save_file(foreign, tmp_path / "foreign.safetensors")
    again = adapters.read_adapter(tmp_path / "foreign.safetensors")
    theirs, ours = update_of(again), update_of(adapter)
    assert theirs.keys() == ours.keys()
    assert all(torch.allclose(theirs[module], ours[module], rtol=1e-6) for module in ours)


def test_ranks_and_scales_that_differ_by_module_are_made_uniform(policy, trained, condition, tmp_path) -> None:  # type: ignore[no-untyped-def]
    state = lora.adapter_of(trained.transformer).state
    narrow = {k: (v[:2] if "lora_A" in k else v[:, :2]).contiguous() for k, v in state.items() if ".to_q." in k}
    mixed = {key: narrow.get(key, value) for key, value in state.items()}
    save_file(
        {f"base_model.model.{key}": value for key, value in mixed.items()}, tmp_path / "adapter_model.safetensors"
    )
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "rank_pattern": {"to_q": 2}, "alpha_pattern": {"to_q": 1}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    adapter = adapters.read_adapter(tmp_path)
    assert (adapter.rank, adapter.alpha) == (4, 4)
    for module, update in update_of(adapter).items():
        a, b = mixed[f"{module}.lora_A.weight"].double(), mixed[f"{module}.lora_B.weight"].double()
        assert torch.allclose(update, (0.5 if module.endswith("to_q") else 2) * b @ a)
    lora.put_adapter(policy.transformer, adapters.read_adapter(tmp_path))
    assert torch.isfinite(output(policy, condition)).all()


# ---- bad input


def damaged(trained: LayeredPolicy, folder: Path, change: Any) -> Path:
    adapter_files.write_peft(lora.adapter_of(trained.transformer), folder, transformer=trained.transformer)
    file = folder / "adapter_model.safetensors"
    state = load_file(file)
    change(state)
    save_file(state, file)
    return folder


def test_an_adapter_of_another_base_is_refused_by_its_first_key(trained, policy, tmp_path) -> None:  # type: ignore[no-untyped-def]
    first = "transformer_blocks.0.attn.add_k_proj.lora_A.weight"

    def wider(state: dict[str, torch.Tensor]) -> None:
        state[f"base_model.model.{first}"] = torch.zeros(4, 3072)

    with pytest.raises(
        LayerloopError, match=rf"{first} has shape 4x3072, the base needs 4x64: .* another base; give one of this"
    ):
        lora.put_adapter(policy.transformer, adapters.read_adapter(damaged(trained, tmp_path, wider)))
    assert not policy.trainable_parameters()


def test_an_adapter_for_layers_that_the_base_lacks_is_refused(trained, policy, tmp_path) -> None:  # type: ignore[no-untyped-def]
    def deeper(state: dict[str, torch.Tensor]) -> None:
        for side, shape in (("A", (4, 64)), ("B", (64, 4))):
            state[f"base_model.model.transformer_blocks.59.attn.to_q.lora_{side}.weight"] = torch.zeros(shape)

    with pytest.raises(
        LayerloopError,
        match=r"transformer_blocks\.59\.attn\.to_q, which the base does not have: .*; give one of this base, or set",
    ):
        lora.put_adapter(policy.transformer, adapters.read_adapter(damaged(trained, tmp_path, deeper)))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_is_refused_on_reading_and_on_writing(trained, tmp_path, value) -> None:  # type: ignore[no-untyped-def]
    key = "transformer_blocks.0.attn.to_q.lora_B.weight"

    def broken(state: dict[str, torch.Tensor]) -> None:
        state[f"base_model.model.{key}"][0, 0] = value

    with pytest.raises(LayerloopError, match=f"{key} has NaN or infinite values"):
        adapters.read_adapter(damaged(trained, tmp_path / "read", broken))
    adapter = lora.adapter_of(trained.transformer)
    adapter.state[key][0, 0] = value
    for write in (adapter_files.write_peft, adapter_files.write_diffusers):
        with pytest.raises(LayerloopError, match=f"{key} has NaN or infinite values: nothing was written"):
            write(adapter, tmp_path / "written", transformer=trained.transformer)
    assert not (tmp_path / "written").exists()


def test_files_that_are_not_an_adapter_are_named(trained, tmp_path) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(LayerloopError, match="is not an adapter: it has neither"):
        adapters.read_adapter(tmp_path)
    folder = damaged(trained, tmp_path / "cut", lambda state: None)
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(LayerloopError, match=r"adapter_model\.safetensors cannot be read"):
        adapters.read_adapter(folder)
    folder = damaged(trained, tmp_path / "half", lambda state: state.pop(next(k for k in state if "lora_B" in k)))
    with pytest.raises(LayerloopError, match=r"lora_B\.weight is missing: the adapter is incomplete"):
        adapters.read_adapter(folder)
    (folder / "adapter_config.json").unlink()
    with pytest.raises(LayerloopError, match=r"adapter_config\.json is missing"):
        adapters.read_adapter(folder)
    for name, value in (("peft_type", "LOHA"), ("use_dora", True), ("modules_to_save", ["proj_out"])):
        folder = damaged(trained, tmp_path / name, lambda state: None)
        config = json.loads((folder / "adapter_config.json").read_text()) | {name: value}
        (folder / "adapter_config.json").write_text(json.dumps(config))
        with pytest.raises(LayerloopError, match=f"{name} .*only"):
            adapters.read_adapter(folder)


def test_starting_from_an_adapter_of_another_shape_than_the_recipe_says_what_to_set(trained, policy, tmp_path) -> None:  # type: ignore[no-untyped-def]
    adapter_files.write_peft(lora.adapter_of(trained.transformer), tmp_path, transformer=trained.transformer)
    with pytest.raises(LayerloopError, match=r"has rank 4 but recipe\.lora\.rank is 16: set recipe\.lora\.rank to 4"):
        lora.starting_adapter(policy.transformer, LoraRecipe(), tmp_path)
    with pytest.raises(LayerloopError, match=r"has weights for .*add_k_proj, which recipe\.lora\.targets leaves out"):
        lora.starting_adapter(policy.transformer, LoraRecipe(rank=4, targets=("to_q",)), tmp_path)
    with pytest.raises(LayerloopError, match=r"has no weights for .*img_mod\.1, which recipe\.lora\.targets asks for"):
        lora.starting_adapter(
            policy.transformer, LoraRecipe(rank=4, targets=(*LoraRecipe().targets, "img_mod.1")), tmp_path
        )


# ---- state


def test_state_is_copied_out_and_put_back(trained, condition) -> None:  # type: ignore[no-untyped-def]
    state, expected = lora.adapter_state(trained.transformer), output(trained, condition)
    lora.set_adapter_state(trained.transformer, {key: value * 0 for key, value in state.items()})
    assert not torch.equal(output(trained, condition), expected) and any(value.any() for value in state.values())
    lora.set_adapter_state(trained.transformer, state)
    assert torch.equal(output(trained, condition), expected)
    key = next(iter(state))
    with pytest.raises(LayerloopError, match=f"{key} is missing"):
        lora.set_adapter_state(trained.transformer, {k: v for k, v in state.items() if k != key})
    with pytest.raises(LayerloopError, match=r"has shape .* the model's is"):
        lora.set_adapter_state(trained.transformer, state | {key: state[key].T.contiguous()})


# ---- merging


@pytest.fixture
def two_adapters(base_recipe, shake, tmp_path):  # type: ignore[no-untyped-def]
    """Of different ranks, alphas and targets."""
    folders = []
    for index, recipe in enumerate(
        (LoraRecipe(rank=4, alpha=8), LoraRecipe(rank=2, alpha=1, targets=("to_q", "img_mod.1")))
    ):
        policy = LayeredPolicy.load(base_recipe)
        lora.put_adapter(policy.transformer, lora.new_adapter(policy.transformer, recipe, seed=index))
        shake(policy.transformer, seed=index)
        folders.append(tmp_path / f"part{index}")
        adapter_files.write_peft(lora.adapter_of(policy.transformer), folders[-1], transformer=policy.transformer)
    return folders


def test_a_merge_is_exactly_the_weighted_sum_of_the_updates(two_adapters, policy, condition) -> None:  # type: ignore[no-untyped-def]
    weights = (0.7, -0.3)
    merged = adapters.merge_adapters(list(zip(two_adapters, weights, strict=True)))
    assert (merged.rank, merged.alpha) == (6, 6)
    parts = [update_of(adapters.read_adapter(folder)) for folder in two_adapters]
    updates = update_of(merged)
    assert updates.keys() == parts[0].keys() | parts[1].keys()
    for module, update in updates.items():
        expected = sum(w * part[module] for w, part in zip(weights, parts, strict=True) if module in part)
        assert torch.allclose(update, expected, atol=1e-7)  # of float32 factors
    lora.put_adapter(policy.transformer, merged)
    assert torch.isfinite(output(policy, condition)).all()


def test_merging_one_adapter_with_weight_one_changes_no_output(two_adapters, base_recipe, condition) -> None:  # type: ignore[no-untyped-def]
    alone, merged = LayeredPolicy.load(base_recipe), LayeredPolicy.load(base_recipe)
    lora.put_adapter(alone.transformer, adapters.read_adapter(two_adapters[0]))
    lora.put_adapter(merged.transformer, adapters.merge_adapters([(two_adapters[0], 1.0)]))
    assert torch.allclose(output(alone, condition), output(merged, condition), atol=1e-6)


def test_a_merge_of_a_given_rank_is_the_best_of_that_rank(two_adapters) -> None:  # type: ignore[no-untyped-def]
    parts = [(folder, 1.0) for folder in two_adapters]
    exact, truncated = update_of(adapters.merge_adapters(parts)), update_of(adapters.merge_adapters(parts, rank=3))
    for module, update in exact.items():
        singular = torch.linalg.svdvals(update)
        assert float((update - truncated[module]).norm()) == pytest.approx(
            float(singular[3:].norm()), rel=1e-4, abs=1e-6
        )
    same = update_of(adapters.merge_adapters(parts, rank=6))
    assert all(torch.allclose(same[module], exact[module], atol=1e-6) for module in exact)


def test_merging_adapters_of_different_bases_is_refused(two_adapters, tmp_path) -> None:  # type: ignore[no-untyped-def]
    key = "transformer_blocks.0.attn.to_q"
    state = {f"transformer.{key}.lora_A.weight": torch.ones(2, 8), f"transformer.{key}.lora_B.weight": torch.ones(8, 2)}
    save_file(state, tmp_path / "other.safetensors")
    with pytest.raises(
        LayerloopError, match=r"to_q is 8x8, another adapter's is 64x64: .*; merge adapters of one base"
    ):
        adapters.merge_adapters([(two_adapters[0], 1.0), (tmp_path / "other.safetensors", 1.0)])
    with pytest.raises(LayerloopError, match="no adapters to merge"):
        adapters.merge_adapters([])


def test_a_written_merge_keeps_its_metadata(two_adapters, policy, tmp_path) -> None:  # type: ignore[no-untyped-def]
    merged = adapters.merge_adapters([(folder, 0.5) for folder in two_adapters])
    adapter_files.write_diffusers(merged, tmp_path, transformer=policy.transformer)
    with safe_open(str(tmp_path / "pytorch_lora_weights.safetensors"), framework="pt") as file:
        config = json.loads(file.metadata()["lora_adapter_metadata"])
    assert config["transformer.r"] == 6 and config["transformer.peft_type"] == "LORA"


def test_the_merge_command_writes_both_layouts(two_adapters, policy, base_recipe, condition, tmp_path, capsys) -> None:  # type: ignore[no-untyped-def]
    out = tmp_path / "merged"
    assert merge.main([str(out), f"{two_adapters[0]}=0.5", str(two_adapters[1])]) == 0
    assert "rank 6" in capsys.readouterr().out
    other = LayeredPolicy.load(base_recipe)
    lora.put_adapter(policy.transformer, adapters.read_adapter(out / "peft"))
    lora.put_adapter(other.transformer, adapters.read_adapter(out))
    assert torch.equal(output(policy, condition), output(other, condition))
    assert lora.adapter_of(policy.transformer).rank == 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{a}=much"], "is not ADAPTER=WEIGHT"),
        (["{tmp}/absent"], "is not an adapter"),
        (["{a}", "--rank", "0"], "--rank is 0"),
    ],
)
def test_the_merge_command_refuses_in_one_line(two_adapters, tmp_path, capsys, arguments, message) -> None:  # type: ignore[no-untyped-def]
    filled = [text.format(a=two_adapters[0], tmp=tmp_path) for text in arguments]
    assert merge.main([str(tmp_path / "out"), *filled]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and message in lines[0] and not (tmp_path / "out").exists()
    assert merge.main([str(two_adapters[0]), str(two_adapters[1])]) == 2
    assert "is not an empty folder" in capsys.readouterr().err


# ---- precision


def test_on_a_bfloat16_base_the_low_rank_product_is_added_before_rounding(base_recipe, shake) -> None:  # type: ignore[no-untyped-def]
    """Against float64 arithmetic on one layer: no worse than one rounding of the sum and one of the factors."""
    policy = LayeredPolicy.load(base_recipe.model_copy(update={"dtype": "bfloat16"}))
    lora.put_adapter(policy.transformer, lora.new_adapter(policy.transformer, LoraRecipe(rank=4, alpha=8), seed=0))
    shake(policy.transformer, scale=1.0)
    layer = policy.transformer.transformer_blocks[0].attn.to_q
    x = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.no_grad():
        a, b = layer.lora_A[adapters.NAME].weight, layer.lora_B[adapters.NAME].weight
        base = layer.base_layer(x).double()
        exact = base + 2 * x.double() @ a.double().T @ b.double().T
        found = layer(x)
    assert found.dtype == torch.bfloat16
    assert float((found.double() - exact).abs().max()) < 0.02 * float((exact - base).abs().max())
    assert float((exact - base).abs().mean()) > 0.5
