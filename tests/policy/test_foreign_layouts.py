"""Adapter files of other trainers: the same function from every layout, or one line that names the first key."""

from __future__ import annotations

import json
import pickle
import re
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from layerloop.components.policy import adapter_files, merge
from layerloop.components.policy.adapters import read_adapter
from layerloop.components.policy.layouts import BLOCK, OUTER
from layerloop.components.policy.model import LayeredPolicy
from layerloop.components.schema.errors import LayerloopError

MODULES = [f"transformer_blocks.{block}.{name}" for block in (0, 11) for name in BLOCK] + list(OUTER)
RANK, ALPHA = 4, 16.0

LAYOUTS = {  # the key of a module, and what follows it for A, B and alpha
    "diffusers": ("transformer.{}", ("lora_A.weight", "lora_B.weight", "alpha")),
    "ai-toolkit": ("diffusion_model.{}", ("lora_A.weight", "lora_B.weight", "alpha")),
    "ComfyUI": ("diffusion_model.{}", ("lora_down.weight", "lora_up.weight", "alpha")),
    "ComfyUI, whole": ("model.diffusion_model.{}", ("lora.down.weight", "lora.up.weight", "alpha")),
    "DiffSynth": ("pipe.dit.{}", ("lora_A.default.weight", "lora_B.default.weight", "alpha")),
    "no prefix": ("{}", ("lora_A.default.weight", "lora_B.default.weight", "alpha")),
    "OneTrainer": ("transformer.{}", ("lora_down.weight", "lora_up.weight", "alpha")),
    "OneTrainer, flat": ("lora_transformer_{}", ("lora_down.weight", "lora_up.weight", "alpha")),
    "kohya": ("lora_unet_{}", ("lora_down.weight", "lora_up.weight", "alpha")),
}


def keys_of(layout: str, module: str) -> list[str]:
    stem, ends = LAYOUTS[layout]
    name = module.replace(".", "_") if stem.endswith("_{}") else module
    return [f"{stem.format(name)}.{end}" for end in ends]


def weights(modules: list[str], rank: int = RANK) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return {m: (torch.randn(rank, 8, generator=generator), torch.randn(6, rank, generator=generator)) for m in modules}


def written(layout: str, file: Path, *, alpha: float | None = ALPHA, extra: str | None = None) -> Path:
    tensors = {}
    for module, (a, b) in weights(MODULES).items():
        keys = keys_of(layout, module)
        tensors |= {keys[0]: a, keys[1]: b}
        if alpha is not None:
            tensors[keys[2]] = torch.tensor(alpha)
    if extra is not None:
        stem = keys_of(layout, MODULES[0])[2].removesuffix("alpha")
        tensors[f"{stem}{extra}"] = torch.ones(6)
    save_file(tensors, file)
    return file


@pytest.mark.parametrize("alpha", [ALPHA, None], ids=["alpha", "no alpha"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_function_that_it_was_trained_as(
    layout: str, alpha: float | None, tmp_path: Path
) -> None:
    adapter = read_adapter(written(layout, tmp_path / "x.safetensors", alpha=alpha))
    assert adapter.modules == sorted(MODULES)
    scale = 1.0 if alpha is None else alpha / RANK
    for module, (a, b) in weights(MODULES).items():
        ours = adapter.state[f"{module}.lora_B.weight"] @ adapter.state[f"{module}.lora_A.weight"]
        torch.testing.assert_close(ours * adapter.alpha / adapter.rank, scale * b @ a)


@pytest.mark.parametrize("layout", [*LAYOUTS, "peft"])
@pytest.mark.parametrize(
    ("extra", "kind"),
    [
        ("dora_scale", "DoRA"),
        ("lora_magnitude_vector.weight", "DoRA"),
        ("lokr_w1", "LoKr"),
        ("lokr_w2_a", "LoKr"),
        ("hada_w1_a", "LoHa"),
        ("oft_blocks", "OFT"),
        ("diff_b", "full weight differences"),
    ],
)
def test_what_is_no_plain_lora_is_refused_by_name_in_every_layout(
    layout: str, extra: str, kind: str, tmp_path: Path
) -> None:
    if layout == "peft":
        adapter_files.write_peft(read_adapter(written("diffusers", tmp_path / "x.safetensors")), tmp_path / "peft")
        file = tmp_path / "peft" / "adapter_model.safetensors"
        save_file(load_file(file) | {f"base_model.model.{MODULES[0]}.{extra}": torch.ones(6)}, file)
    else:
        file = written(layout, tmp_path / "x.safetensors", extra=extra)
    with pytest.raises(LayerloopError, match=rf"{extra} makes it {kind}: only plain LoRA") as caught:
        read_adapter(file)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "key",
    [
        "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight",
        "diffusion_model.blocks.0.self_attn.q.lora_A.weight",
        "pipe.dit.blocks.0.cross_attn.o.lora_A.default.weight",
        "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight",
        "text_encoder.model.layers.0.self_attn.q_proj.lora_A.weight",
        "something.else",
    ],
)
def test_what_is_of_another_model_is_refused_by_its_first_key(key: str, tmp_path: Path) -> None:
    save_file({key: torch.ones(4, 8)}, tmp_path / "x.safetensors")
    with pytest.raises(LayerloopError, match=re.escape(key)) as caught:
        read_adapter(tmp_path / "x.safetensors")
    assert "\n" not in str(caught.value)


def test_one_weight_under_two_keys_and_an_alpha_of_nothing_are_refused(tmp_path: Path) -> None:
    file = written("diffusers", tmp_path / "x.safetensors")
    tensors, key = load_file(file), f"{MODULES[0]}.lora_A.weight"
    save_file(tensors | {f"diffusion_model.{key}": tensors[f"transformer.{key}"].clone()}, file)
    with pytest.raises(LayerloopError, match="are one weight: keep one"):
        read_adapter(file)
    save_file(tensors | {"transformer.nowhere.alpha": torch.tensor(1.0)}, file)
    with pytest.raises(LayerloopError, match=r"nowhere\.alpha belongs to no LoRA weight"):
        read_adapter(file)
    save_file(tensors | {f"transformer.{MODULES[0]}.alpha": torch.ones(2)}, file)
    with pytest.raises(LayerloopError, match="has 2 numbers"):
        read_adapter(file)


@pytest.mark.parametrize("alpha", [torch.tensor(0.0), torch.tensor(True), torch.tensor(1 + 2j)], ids=str)
def test_an_alpha_that_is_no_scale_is_refused(alpha: torch.Tensor, tmp_path: Path) -> None:
    file = written("kohya", tmp_path / "x.safetensors")
    save_file(load_file(file) | {keys_of("kohya", MODULES[0])[2]: alpha}, file)
    with pytest.raises(
        LayerloopError, match=r"attn_to_q\.alpha is .*, which is no scale: set it to the alpha"
    ) as caught:
        read_adapter(file)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("shapes", [((0, 8), (6, 0)), ((2, 0), (0, 2))])
def test_a_rank_of_0_and_a_layer_without_width_are_refused(
    shapes: tuple[tuple[int, int], tuple[int, int]], tmp_path: Path
) -> None:
    a, b = map(torch.ones, shapes)
    save_file({f"{MODULES[0]}.lora_A.weight": a, f"{MODULES[0]}.lora_B.weight": b}, tmp_path / "x.safetensors")
    with pytest.raises(
        LayerloopError, match=rf"lora_A {shapes[0][0]}x{shapes[0][1]} and lora_B .*, without a number: the"
    ):
        read_adapter(tmp_path / "x.safetensors")


@pytest.mark.parametrize("layout", ["peft", "diffusers"])
@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("use_dora", True, "has use_dora True: only plain LoRA"),
        ("target_parameters", ["experts"], "has target_parameters ['experts']: only plain LoRA"),
        ("layer_replication", [[0, 2]], "has layer_replication [[0, 2]]: only plain LoRA"),
        ("init_lora_weights", "pissa_niter_16", "has init_lora_weights 'pissa_niter_16', which changed the base's own"),
        ("init_lora_weights", "OLoRA", "has init_lora_weights 'OLoRA', which changed the base's own weights"),
        ("init_lora_weights", "gaussian", ""),
    ],
)
def test_a_config_of_more_than_two_matrices_is_refused_in_either_layout(
    layout: str, field: str, value: object, said: str, tmp_path: Path
) -> None:
    adapter = read_adapter(written("diffusers", tmp_path / "x.safetensors"))
    if layout == "peft":
        adapter_files.write_peft(adapter, tmp_path / "peft")
        file, config = tmp_path / "peft" / "adapter_model.safetensors", tmp_path / "peft" / "adapter_config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {field: value}))
    else:
        file = tmp_path / "y.safetensors"
        state = {f"transformer.{key}": tensor for key, tensor in adapter.state.items()}
        save_file(state, file, metadata={"lora_adapter_metadata": json.dumps({f"transformer.{field}": value})})
    if not said:
        assert read_adapter(file).modules == sorted(MODULES)
        return
    with pytest.raises(LayerloopError, match=re.escape(said)):
        read_adapter(file)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
            "but a pointer of Git LFS: fetch the file",
        ),
        (b"<!doctype html><title>Sign in</title>", "but a page of a web site: download the file again"),
        (pickle.dumps({"a": 1}, protocol=4), "but a pickle of torch.save, which may run code: save it as safetensors"),
        (b"PK\x03\x04" + bytes(40), "but a pickle of torch.save"),
        (b"GGUF\x03\0\0\0" + bytes(40), "but GGUF, quantised: take the safetensors file that it was made from"),
        (b'{"error":"Repository not found"}', "but JSON, an answer of a server perhaps: download the file again"),
        (b"\n\n<p>Entry", "but a page of a web site"),
        (b"7z\xbc\xaf\x27\x1c" + bytes(40), "but an archive: unpack it"),
        (b"GARBAGE!" * 9, r"\(its header has \d+ bytes"),
    ],
)
def test_what_is_no_safetensors_is_called_what_it_is(data: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(data)
    with pytest.raises(LayerloopError, match=f"x.safetensors is not safetensors {said}"):
        read_adapter(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    ("field", "value", "read"),
    [
        ("modelspec.architecture", "flux-1-dev/lora", False),
        ("ss_base_model_version", "sdxl_base_v1-0", False),
        ("modelspec.architecture", "Qwen-Image/lora", True),
        ("ss_base_model_version", "qwen_image_layered", True),
    ],
)
def test_a_file_that_names_another_base_is_refused(field: str, value: str, read: bool, tmp_path: Path) -> None:
    """Whose layers may have the same names and shapes: FLUX's two-stream blocks do."""
    file = written("kohya", tmp_path / "x.safetensors")
    save_file(load_file(file), file, metadata={field: value})
    if read:
        assert read_adapter(file).modules == sorted(MODULES)
        return
    with pytest.raises(LayerloopError, match=f"has {field} '{value}': it is for another base; give one of Qwen-Image"):
        read_adapter(file)


def test_a_folder_with_a_pickle_says_so(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(1)}, tmp_path / "adapter_model.bin")
    with pytest.raises(
        LayerloopError, match=r"adapter_model\.bin is a pickle of torch\.save, .*: save it as safetensors$"
    ):
        read_adapter(tmp_path)


def test_a_merge_of_transformer_keys_with_alphas_is_read_by_peft(base_recipe, tmp_path, capsys) -> None:  # type: ignore[no-untyped-def]
    base = LayeredPolicy.load(base_recipe).transformer
    module = "transformer_blocks.0.attn.to_q"
    width = base.get_submodule(module).weight.shape[0]
    generator = torch.Generator().manual_seed(1)
    a, b = torch.randn(4, width, generator=generator), torch.randn(width, 4, generator=generator)
    stem = f"transformer.{module}"
    save_file(
        {f"{stem}.lora_A.weight": a, f"{stem}.lora_B.weight": b, f"{stem}.alpha": torch.tensor(8.0)},
        tmp_path / "x.safetensors",
    )
    assert merge.main([str(tmp_path / "out"), f"{tmp_path / 'x.safetensors'}=0.5"]) == 0
    keys = set(load_file(tmp_path / "out" / "pytorch_lora_weights.safetensors"))
    assert {f"{stem}.lora_A.weight", f"{stem}.lora_B.weight"} <= keys
    before = base.get_submodule(module).weight.detach().clone()
    merged = PeftModel.from_pretrained(base, str(tmp_path / "out" / "peft")).merge_and_unload()
    torch.testing.assert_close(merged.get_submodule(module).weight - before, 0.5 * 2.0 * b @ a, atol=1e-4, rtol=1e-4)
