"""The transformer's arithmetic against torch's own counts, on the meta device: no memory, no GPU."""

from __future__ import annotations

import pytest
import torch
from diffusers import QwenImageTransformer2DModel
from torch.utils.flop_counter import FlopCounterMode

from layerloop.components.policy.base_files import read_json
from layerloop.components.policy.lora import new_adapter, put_adapter, target_modules, train_adapter
from layerloop.components.policy.size import AdapterSize, Tokens, TransformerSize
from layerloop.components.policy.tiny import tiny_folder
from layerloop.components.schema.learning import LoraRecipe

SMALL = TransformerSize(blocks=3, heads=4, head_dim=32, text_width=64)
TOKENS = Tokens(layers=3, height=8, width=10, text=11)


def on_meta(size: TransformerSize) -> QwenImageTransformer2DModel:
    part = size.head_dim // 8
    with torch.device("meta"):
        return QwenImageTransformer2DModel(
            num_layers=size.blocks, num_attention_heads=size.heads, attention_head_dim=size.head_dim,
            joint_attention_dim=size.text_width, axes_dims_rope=(2 * part, 3 * part, 3 * part),
            in_channels=64, out_channels=16, use_additional_t_cond=True, use_layer3d_rope=True,
        ).eval().requires_grad_(False)  # fmt: skip


def output(transformer: QwenImageTransformer2DModel, tokens: Tokens) -> torch.Tensor:
    shapes = [[(1, tokens.height, tokens.width)] * (tokens.layers + 2)]
    width = transformer.config.joint_attention_dim
    with torch.device("meta"):
        return transformer(
            hidden_states=torch.zeros(1, tokens.image, 64), timestep=torch.zeros(1),
            encoder_hidden_states=torch.zeros(1, tokens.text, width), encoder_hidden_states_mask=None,
            img_shapes=shapes, additional_t_cond=torch.zeros(1, dtype=torch.long), return_dict=False,
        )[0]  # fmt: skip


def test_the_released_models_numbers() -> None:
    size = TransformerSize()
    assert size.parameters == 20_430_407_232
    adapter = AdapterSize.of(size, rank=16, targets=LoraRecipe().targets)
    assert (len(adapter.on), adapter.parameters) == (716, 105_480_192)
    assert size.base_bytes(dtype="bfloat16", float8=False) == 2 * size.parameters
    assert 20.4e9 < size.base_bytes(dtype="bfloat16", float8=True) < 20.6e9
    tera = [size.forward(Tokens(layers, 40, 40, 11)) / 1e12 for layers in (2, 3, 4, 5)]
    assert tera == pytest.approx([117.4, 156.2, 198.7, 245.0], abs=0.1)


def test_operations_of_the_released_size_are_those_that_torch_counts() -> None:
    size, tokens = TransformerSize(), Tokens(2, 40, 40, 11)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        output(on_meta(size), tokens)
    assert counter.get_total_flops() == size.forward(tokens)


@pytest.mark.parametrize("targets", [LoraRecipe().targets, ("to_q", "img_mlp.net.2"), ("59.attn.to_k", "proj_out")])
def test_operations_and_parameters_of_an_adapter_are_those_that_torch_counts(targets: tuple[str, ...]) -> None:
    targets = tuple(target.replace("59", "2") for target in targets)
    transformer, recipe = on_meta(SMALL), LoraRecipe(rank=8, targets=targets)
    put_adapter(transformer, new_adapter(transformer, recipe, seed=0))
    transformer.to("meta")
    train_adapter(transformer, True)
    adapter = AdapterSize.of(SMALL, rank=8, targets=targets)
    assert set(adapter.on) == set(target_modules(transformer, targets))
    assert adapter.parameters == sum(p.numel() for p in transformer.parameters() if p.requires_grad)
    with FlopCounterMode(display=False) as counter:
        found = output(transformer, TOKENS)
    assert counter.get_total_flops() == SMALL.forward(TOKENS, adapter)
    with FlopCounterMode(display=False) as counter:
        found.sum().backward()
    # On the meta device attention keeps its scores: two forwards, where a flash kernel takes two and a half.
    counted, ours = counter.get_total_flops(), SMALL.backward(TOKENS, adapter, attention=2.0)
    if targets == LoraRecipe().targets:
        assert counted == ours
    else:  # gradients that begin behind the first layers are counted from the first
        assert counted <= ours


def test_checkpointing_repeats_a_forward_pass() -> None:
    transformer, recipe = on_meta(SMALL), LoraRecipe()
    put_adapter(transformer, new_adapter(transformer, recipe, seed=0))
    transformer.to("meta")
    train_adapter(transformer, True)
    transformer.enable_gradient_checkpointing()
    adapter = AdapterSize.of(SMALL, rank=recipe.rank, targets=recipe.targets)
    with FlopCounterMode(display=False) as counter:
        output(transformer, TOKENS).sum().backward()
    ours = 2 * SMALL.forward(TOKENS, adapter) + SMALL.backward(TOKENS, adapter, attention=2.0)
    assert 0.98 * ours < counter.get_total_flops() <= ours  # torch stops before the last of what is not needed


def test_the_parameters_of_any_config_are_those_of_its_model() -> None:
    config = read_json(tiny_folder() / "transformer/config.json")
    with torch.device("meta"):
        transformer = QwenImageTransformer2DModel.from_config(config)
    size = TransformerSize.of_config(config)
    assert size.parameters == sum(parameter.numel() for parameter in transformer.parameters())
    assert TransformerSize.of_config({}) == TransformerSize()


def test_weights_in_float8_are_those_of_the_blocks() -> None:
    assert SMALL.block_weights == sum(
        module.weight.numel()
        for module in on_meta(SMALL).transformer_blocks.modules()
        if isinstance(module, torch.nn.Linear)
    )
