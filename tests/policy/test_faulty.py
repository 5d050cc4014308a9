"""The base with faults that ships: made once, whole, equal everywhere, small, and else the tiny policy."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from layerloop.components.decompose.model import choose
from layerloop.components.policy import faulty
from layerloop.components.policy.adapters import PEFT_WEIGHTS, read_adapter
from layerloop.components.policy.faulty import FAULTS, WEIGHTS, faulty_folder, merged
from layerloop.components.policy.lora import put_adapter
from layerloop.components.policy.model import LayeredPolicy
from layerloop.components.policy.tiny import tiny_folder
from layerloop.components.schema.decomposition import DecomposeOptions
from layerloop.components.schema.errors import LayerloopError
from layerloop.components.schema.recipe import ModelRecipe


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LAYERLOOP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_it_is_made_once_and_is_the_same_in_another_place(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = faulty_folder()
    written = (first / WEIGHTS).stat().st_mtime_ns
    assert faulty_folder() == first and (first / WEIGHTS).stat().st_mtime_ns == written
    assert not [path for path in first.parent.iterdir() if path != first], "nothing is left beside it"
    monkeypatch.setenv("LAYERLOOP_CACHE", str(tmp_path / "other"))
    assert (faulty_folder() / WEIGHTS).read_bytes() == (first / WEIGHTS).read_bytes()


def test_all_but_the_transformers_weights_are_the_tiny_policys(cache: Path) -> None:
    ours, tiny = faulty_folder(), tiny_folder()
    files = {path.relative_to(tiny) for path in tiny.rglob("*") if path.is_file()}
    kept = {file for file in files if file.parts[0] != FAULTS}
    assert {path.relative_to(ours) for path in ours.rglob("*") if path.is_file()} == kept
    assert {file for file in kept if (ours / file).read_bytes() != (tiny / file).read_bytes()} == {Path(WEIGHTS)}


def test_it_computes_what_the_tiny_policy_does_with_the_adapter_on_it(cache: Path) -> None:
    with_faults = LayeredPolicy.load(ModelRecipe(base="tiny-faulty", dtype="float32")).transformer
    tiny = LayeredPolicy.load(ModelRecipe(base="tiny", dtype="float32")).transformer
    plain = {name: weight.clone() for name, weight in tiny.state_dict().items()}
    adapter = read_adapter(tiny_folder() / FAULTS)
    put_adapter(tiny, adapter)
    for module in adapter.modules:
        layer, x = tiny.get_submodule(module), torch.randn(4, plain[f"{module}.weight"].shape[1])
        expected, found = layer(x), with_faults.get_submodule(module)(x)
        assert torch.allclose(found, expected, atol=2e-2)
        assert (found - expected).norm() < 0.05 * (found - layer.base_layer(x)).norm(), module


def test_sums_are_exact_whatever_their_order() -> None:
    weights, adapter = load_file(tiny_folder() / WEIGHTS), read_adapter(tiny_folder() / FAULTS)
    assert adapter.alpha == adapter.rank == 16
    for key, value in adapter.state.items():
        assert value.abs().max() < 1 and torch.equal(value, value.half().float()), key
    turned = {key: v.flip(0 if "lora_A" in key else 1) for key, v in adapter.state.items()}
    other = merged(weights, type(adapter)(turned, adapter.rank, adapter.alpha))
    assert all(torch.equal(value, other[key]) for key, value in merged(weights, adapter).items())


def test_it_is_small_enough_for_a_repository() -> None:
    assert (tiny_folder() / FAULTS / PEFT_WEIGHTS).stat().st_size < 1_500_000


def test_where_another_process_was_faster_its_folder_is_taken(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = merged

    def slower(*arguments: object) -> dict[str, torch.Tensor]:
        monkeypatch.setattr(faulty, "merged", ours)
        theirs.append(faulty_folder())
        return ours(*arguments)  # type: ignore[arg-type]

    theirs: list[Path] = []
    monkeypatch.setattr(faulty, "merged", slower)
    assert faulty_folder() == theirs[0]


def test_a_cache_that_cannot_be_written_to_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LAYERLOOP_CACHE", str(tmp_path / "file"))
    with pytest.raises(LayerloopError, match="^recipe.model.base is 'tiny-faulty', .* set LAYERLOOP_CACHE to a folder"):
        faulty_folder()


def test_pictures_are_decomposed_with_it_by_name() -> None:
    choice = choose(DecomposeOptions(base="tiny-faulty"))
    assert choice.base == "tiny-faulty" and choice.recipe.data.resolution == 64
