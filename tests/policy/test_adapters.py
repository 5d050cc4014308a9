"""Reading adapters: peft's own scale of every module, dtypes, and configs and folders that say something impossible."""

from __future__ import annotations

import json
import os
import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from layerloop.components.policy import adapter_files, adapters
from layerloop.components.policy.adapters import read_adapter, weights_sha256
from layerloop.components.policy.alphas import Scales
from layerloop.components.policy.layouts import BLOCK
from layerloop.components.policy.model import LayeredPolicy
from layerloop.components.schema.errors import LayerloopError

MODULE = "transformer_blocks.0.attn.to_q"


def set_config(folder: Path, **fields: Any) -> None:
    """Change fields of the peft config in `folder`; `...` removes one."""
    file = folder / "adapter_config.json"
    config = json.loads(file.read_text()) | fields
    file.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))


@pytest.fixture
def adapter_folder(tmp_path: Path) -> Path:
    """A peft folder of one module, rank 4 and alpha 4."""
    generator = torch.Generator().manual_seed(0)
    state = {
        f"{MODULE}.lora_{side}.weight": torch.randn(shape, generator=generator)
        for side, shape in (("A", (4, 64)), ("B", (64, 4)))
    }
    adapter_files.write_peft(adapters.Adapter(state, 4, 4), tmp_path / "adapter")
    return tmp_path / "adapter"


# ---- scales


@pytest.mark.filterwarnings("ignore:The following alpha_pattern keys did not match")
@pytest.mark.parametrize(
    "fields",
    [
        {"alpha_pattern": {"to_q": 8}},
        {"alpha_pattern": {"attn.to.q": 8, "net.0.proj": 1, "n.to_q": 3}},
        {"alpha_pattern": {"transformer_blocks.1.attn.to_q": 8}},
        {"alpha_pattern": {r"attn\.to_q": 8}},
        {"alpha_pattern": {r"^transformer_blocks\.1\..*": 8, r"to_[qk]": 2}},
        {"alpha_pattern": {"to_q": 2, "attn.to_q": 8}},
        {"alpha_pattern": {"to": 8, "q": 8, "attn": 8}},
        {"alpha_pattern": {r"\d+\.attn\.to_q": 8}, "rank_pattern": {r".*\.to_(q|k)": 2, "net.2": 3}},
        {"alpha_pattern": {r"to_q|to_k": 8}, "use_rslora": True},
        {"lora_alpha": ...},
    ],
    ids=str,
)
def test_every_module_has_the_scale_that_peft_gives_it(base_recipe, tmp_path, fields) -> None:  # type: ignore[no-untyped-def]
    written = {key: value for key, value in fields.items() if value is not ...}
    config = LoraConfig(
        **{"r": 4, "lora_alpha": 4, "target_modules": ["to_q", "to_k", "net.0.proj", "net.2"]} | written
    )
    wrapped = get_peft_model(LayeredPolicy.load(base_recipe).transformer, config)
    generator = torch.Generator().manual_seed(0)
    for parameter in (p for name, p in wrapped.named_parameters() if "lora_B" in name):
        parameter.data = torch.randn(parameter.shape, generator=generator)
    wrapped.save_pretrained(tmp_path)
    set_config(tmp_path, **fields)

    transformer = LayeredPolicy.load(base_recipe).transformer
    PeftModel.from_pretrained(transformer, tmp_path)
    adapter = read_adapter(tmp_path)
    assert len(adapter.modules) == 2 * 6  # both streams have the feed-forward's
    scales = set()
    for module in adapter.modules:
        layer = transformer.get_submodule(module)
        scales.add(layer.scaling["default"])
        theirs = layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        a, b = (adapter.state[f"{module}.lora_{side}.weight"] for side in "AB")
        assert torch.allclose(adapter.alpha / adapter.rank * b @ a, theirs, rtol=1e-5, atol=1e-6), module
    assert scales != {1.0} or fields == {"alpha_pattern": {"to": 8, "q": 8, "attn": 8}}  # it matches nothing


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"lora_alpha": "sixteen"}, "has lora_alpha 'sixteen', which is not a finite number: set it to the alpha"),
        ({"lora_alpha": [16]}, "has lora_alpha [16], which is not a finite number"),
        ({"lora_alpha": None}, "has lora_alpha None, which is not a finite number"),
        ({"lora_alpha": True}, "has lora_alpha True, which is not a finite number"),
        ({"lora_alpha": float("nan")}, "has lora_alpha nan, which is not a finite number"),
        ({"lora_alpha": 0}, "has lora_alpha 0, with which the adapter does nothing: set it to the alpha"),
        ({"lora_alpha": 10**400}, "which is not a finite number"),
        ({"alpha_pattern": [8]}, "has alpha_pattern [8], which is not a mapping: write it as"),
        ({"alpha_pattern": {"to_q": "8"}}, "has alpha_pattern['to_q'] '8', which is not a finite number"),
        (
            {"alpha_pattern": {"to_(q": 8}},
            "has alpha_pattern 'to_(q', which is not a regular expression that can be used",
        ),
    ],
    ids=lambda value: str(value)[:40],
)
def test_an_impossible_alpha_is_one_line_naming_file_field_and_value(
    adapter_folder: Path, fields: dict[str, Any], message: str
) -> None:
    set_config(adapter_folder, **fields)
    with pytest.raises(LayerloopError) as caught:
        read_adapter(adapter_folder)
    assert str(caught.value).startswith(f"{adapter_folder / 'adapter_config.json'} ")
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_an_impossible_alpha_in_a_files_metadata_names_the_file(adapter_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    tensors = {f"transformer.{key}": value for key, value in read_adapter(adapter_folder).state.items()}
    for fields, alpha in (({"transformer.r": 4, "transformer.lora_alpha": 8}, 8), ({"text_encoder.r": 4}, 4)):
        save_file(tensors, file, metadata={"lora_adapter_metadata": json.dumps(fields)})
        assert read_adapter(file).alpha == alpha
    save_file(tensors, file, metadata={"lora_adapter_metadata": json.dumps({"transformer.lora_alpha": "8"})})
    with pytest.raises(LayerloopError, match=r"x\.safetensors has lora_alpha '8', which is not a finite number"):
        read_adapter(file)


# ---- dtypes


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16, torch.float16], ids=str)
def test_narrow_floats_are_read_exactly(adapter_folder: Path, dtype: torch.dtype) -> None:
    file = adapter_folder / "adapter_model.safetensors"
    narrow = {key: value.to(dtype) for key, value in load_file(file).items()}
    save_file(narrow, file)
    state = read_adapter(adapter_folder).state
    assert len(state) == 2
    for key, value in state.items():
        assert value.dtype == torch.float32 and value.any()
        assert torch.equal(value, narrow[f"base_model.model.{key}"].float())


def test_nan_in_float8_is_refused(adapter_folder: Path) -> None:
    file = adapter_folder / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors[f"base_model.model.{MODULE}.lora_A.weight"][0, 0] = float("nan")
    save_file({key: value.to(torch.float8_e4m3fn) for key, value in tensors.items()}, file)
    with pytest.raises(LayerloopError, match=r"lora_A\.weight has NaN or infinite values"):
        read_adapter(adapter_folder)


@pytest.mark.parametrize(
    "tensor",
    [torch.ones(4, 64, dtype=torch.int8), torch.ones(4, 64).byte().view(torch.float4_e2m1fn_x2)],
    ids=["int8", "float4"],
)
def test_quantised_weights_are_refused_by_key_and_dtype(adapter_folder: Path, tensor: torch.Tensor) -> None:
    file = adapter_folder / "adapter_model.safetensors"
    save_file(load_file(file) | {f"base_model.model.{MODULE}.lora_A.weight": tensor}, file)
    dtype = str(tensor.dtype).removeprefix("torch.")
    with pytest.raises(LayerloopError, match=rf"lora_A\.weight has dtype {dtype}, .*: save the adapter in float32"):
        read_adapter(adapter_folder)


# ---- places


def test_a_publication_is_read_as_it_stands_also_an_old_one(adapter_folder: Path, tmp_path: Path) -> None:
    adapter = read_adapter(adapter_folder)
    adapter_files.write_layouts(adapter, tmp_path / "new")
    adapter_files.write_diffusers(adapter, tmp_path / "old" / "diffusers")
    for folder in (tmp_path / "new", tmp_path / "old"):
        again = read_adapter(folder)
        assert all(torch.equal(again.state[key], value) for key, value in adapter.state.items())
        assert weights_sha256(folder) == weights_sha256(next(folder.rglob("pytorch_lora_weights.safetensors")))
    adapter_files.write_peft(adapter, tmp_path / "old" / "peft")
    assert weights_sha256(tmp_path / "old") == weights_sha256(tmp_path / "old" / "peft")


def test_a_path_that_is_no_adapter_says_what_to_give(adapter_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(LayerloopError, match=r"absent is not an adapter: there is no such file or folder; correct the"):
        read_adapter(tmp_path / "absent")
    published = tmp_path / "published"
    published.mkdir()
    with pytest.raises(
        LayerloopError, match=r"is not an adapter: it has neither .* nor .*; give the folder that has one"
    ):
        read_adapter(published)
    adapter = read_adapter(adapter_folder)
    adapter_files.write_diffusers(adapter, published / "mine")
    assert read_adapter(published).modules == adapter.modules  # the one that there is
    adapter_files.write_peft(adapter, published / "yours")
    with pytest.raises(LayerloopError, match=r"published has several adapters, mine and yours: give one of them"):
        read_adapter(published)
    with pytest.raises(LayerloopError, match=r"x{300} cannot be read \(File name too long\)"):
        read_adapter(tmp_path / ("x" * 300))
    (adapter_folder / "adapter_config.json").unlink()
    (adapter_folder / "adapter_config.json").mkdir()
    with pytest.raises(LayerloopError, match=r"adapter_config\.json cannot be read \(Is a directory\)"):
        read_adapter(adapter_folder)


# ---- writing


def test_an_adapter_that_is_written_over_is_never_a_mixture(adapter_folder: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    """The weights make a folder an adapter: the first of the old files to go, the last of the new to come."""
    adapter = read_adapter(adapter_folder)
    doubled = adapters.Adapter({key: 2 * value for key, value in adapter.state.items()}, 4, 16)
    seen = []
    rename = Path.replace

    def watched(file: Path, target: Path) -> Path:
        try:
            seen.append(read_adapter(adapter_folder).alpha)
        except LayerloopError as error:
            seen.append("none" if "is not an adapter" in str(error) else str(error))
        return rename(file, target)

    monkeypatch.setattr(Path, "replace", watched)
    adapter_files.write_peft(doubled, adapter_folder)
    assert seen == ["none", "none"]
    again = read_adapter(adapter_folder)
    assert again.alpha == 16 and all(torch.equal(again.state[key], value) for key, value in doubled.state.items())
    assert sorted(path.name for path in adapter_folder.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


@pytest.mark.timeout(30)
@pytest.mark.parametrize("pattern", ["(a+)+b", "(.*)*x", "(a|a)*b", "(a|aa)+$b", "(a?){40}a{40}b"])
def test_a_pattern_that_another_matcher_tries_for_years_is_decided_soon(adapter_folder: Path, pattern: str) -> None:
    rename(adapter_folder, "to_q", "a" * 45)
    set_config(adapter_folder, alpha_pattern={pattern: 8})
    try:
        assert read_adapter(adapter_folder).alpha == 4  # it does not match
    except LayerloopError as error:
        assert "which is not a regular expression that can be used (it takes too long)" in str(error)


@pytest.mark.parametrize("pattern", ["(" * 400, "x" * 5000, "(", "*", "a{2,1}", "a{1000}{1000}"])
def test_a_pattern_that_is_none_is_refused_in_a_few_words(adapter_folder: Path, pattern: str) -> None:
    set_config(adapter_folder, alpha_pattern={pattern: 8})
    with pytest.raises(LayerloopError, match="which is not a regular expression that can be used") as caught:
        read_adapter(adapter_folder)
    assert len(str(caught.value)) < 600 and "\n" not in str(caught.value)


def rename(folder: Path, old: str, new: str) -> None:
    """Another name for a module of the adapter in `folder`."""
    file = folder / "adapter_model.safetensors"
    save_file({name.replace(old, new): value for name, value in load_file(file).items()}, file)


# ---- what lies beside a file, and what it is


def test_a_files_own_scale_counts_whatever_config_lies_beside_it(adapter_folder: Path) -> None:
    """diffusers reads a file's metadata and no config; peft reads the config of its own file only."""
    tensors = {f"transformer.{key}": value for key, value in read_adapter(adapter_folder).state.items()}
    set_config(adapter_folder, lora_alpha=8)
    own = {"lora_adapter_metadata": json.dumps({"transformer.r": 4, "transformer.lora_alpha": 2})}
    save_file(tensors, adapter_folder / "pytorch_lora_weights.safetensors", metadata=own)
    assert read_adapter(adapter_folder / "pytorch_lora_weights.safetensors").alpha == 2
    assert read_adapter(adapter_folder / "adapter_model.safetensors").alpha == 8


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"r": 8}, "has r 8 where transformer_blocks.0.attn.to_q has rank 4: it is not of these weights"),
        ({"rank_pattern": {"attn.to_q": 2}}, "has rank_pattern['attn.to_q'] 2 where transformer_blocks.0.attn.to_q"),
        ({"rank_pattern": [4]}, "has rank_pattern [4], which is not a mapping"),
        ({"use_rslora": "false"}, "has use_rslora 'false': write true or false"),
        ({"r": 8, "rank_pattern": {"to_q": 4}}, ""),
        ({"r": ...}, ""),
    ],
    ids=str,
)
def test_a_config_of_other_weights_is_refused(adapter_folder: Path, fields: dict[str, Any], said: str) -> None:
    set_config(adapter_folder, **fields)
    if not said:
        assert read_adapter(adapter_folder).alpha == 4
        return
    with pytest.raises(LayerloopError, match=re.escape(said)):
        read_adapter(adapter_folder)


def test_a_pattern_for_every_layer_takes_no_minutes() -> None:
    """As converters write them, more than the matcher keeps compiled."""
    modules = [f"transformer_blocks.{block}.{name}" for block in range(40) for name in BLOCK]
    alphas = {module: 4 + index for index, module in enumerate(modules)}
    scales = Scales({"alpha_pattern": alphas, "r": 2}, Path("x"), {})
    scales.scale("elsewhere", 2)  # which imports peft
    began = time.process_time()
    assert [scales.scale(module, 2) for module in modules] == [alpha / 2 for alpha in alphas.values()]
    assert time.process_time() - began < 5


def test_ranks_that_would_fill_the_memory_are_refused(tmp_path: Path) -> None:
    shapes = {"to_q": ((2**20, 1), (1, 2**20)), "to_k": ((1, 8192), (8192, 1))}
    save_file(
        {
            f"transformer.transformer_blocks.0.attn.{name}.lora_{side}.weight": torch.ones(shape, dtype=torch.bfloat16)
            for name, pair in shapes.items()
            for side, shape in zip("AB", pair, strict=True)
        },
        tmp_path / "x.safetensors",
    )
    with pytest.raises(LayerloopError, match=r"has ranks from 1 to 1048576, as one rank 68\.7 GB: reduce the largest"):
        read_adapter(tmp_path / "x.safetensors")


def test_a_part_of_an_adapter_is_not_taken_for_the_whole(adapter_folder: Path) -> None:
    file = adapter_folder / "adapter_model.safetensors"
    part = file.rename(adapter_folder / "adapter_model-00001-of-00002.safetensors")
    for place in (part, adapter_folder):
        with pytest.raises(LayerloopError, match="00002.safetensors is one of several parts of an adapter: save all"):
            read_adapter(place)
    part.rename(adapter_folder / "adapter_model-00001-of-00001.safetensors")
    assert read_adapter(adapter_folder).rank == 4


def test_the_only_file_of_a_folder_is_its_adapter_whatever_its_name(adapter_folder: Path, tmp_path: Path) -> None:
    adapter = read_adapter(adapter_folder)
    folder = tmp_path / "shared"
    adapter_files.write_diffusers(adapter, tmp_path)
    folder.mkdir()
    (tmp_path / "pytorch_lora_weights.safetensors").rename(folder / "Layers-v2 猫.safetensors")
    assert read_adapter(folder).modules == adapter.modules
    (tmp_path / "pytorch_lora_weights.bf16.safetensors").rename(folder / "b.safetensors")
    with pytest.raises(LayerloopError, match="has several files, Layers-v2 猫.safetensors and b.safetensors: give one"):
        read_adapter(folder)


def test_a_whole_model_is_refused_by_its_first_key_before_a_number_is_read(tmp_path: Path) -> None:
    """F6_E2M3 is a dtype that torch does not have: to read it fails."""
    header = json.dumps({"a.weight": {"dtype": "F6_E2M3", "shape": [4], "data_offsets": [0, 3]}}).encode()
    (tmp_path / "x.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(3))
    with pytest.raises(LayerloopError, match=r"a\.weight is not a LoRA weight: only plain LoRA"):
        read_adapter(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    ("key", "said"), [("a\n\x1b[31mb", r"a\n\x1b[31mb is not a LoRA weight"), ("x" * 9999, "a key of 9999 characters")]
)
def test_a_key_of_any_letters_is_one_short_line(adapter_folder: Path, key: str, said: str) -> None:
    save_file({key: torch.ones(1)}, adapter_folder / "adapter_model.safetensors")
    with pytest.raises(LayerloopError, match=re.escape(said)) as caught:
        read_adapter(adapter_folder)
    assert len(str(caught.value)) < 500 and "\n" not in str(caught.value)


def test_a_name_that_is_not_utf_8_is_told_so(adapter_folder: Path) -> None:
    file = adapter_folder / "adapter_model.safetensors"
    named = file.rename(adapter_folder / os.fsdecode(b"caf\xe9.safetensors"))
    with pytest.raises(LayerloopError, match=r"caf\\xe9\.safetensors has a name that is not UTF-8, .*: rename it"):
        read_adapter(named)
