"""A run is continued, never mixed with another's results, and never left half-written."""

from __future__ import annotations

import fcntl
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from warm_python import warm

from layerloop.components.decompose import DecomposeOptions, decompose, model, run
from layerloop.components.decompose.counts import Trial, best, choose_count, without_blank
from layerloop.components.decompose.model import choose
from layerloop.components.decompose.output import OutputFolder
from layerloop.components.decompose.pictures import Picture
from layerloop.components.policy import memory
from layerloop.components.policy.adapter_files import write_layouts
from layerloop.components.policy.adapters import PEFT, weights_sha256
from layerloop.components.policy.lora import new_adapter
from layerloop.components.policy.model import LayeredPolicy
from layerloop.components.schema.errors import LayerloopError
from layerloop.components.schema.learning import LoraRecipe
from layerloop.components.schema.manifest import Manifest
from layerloop.components.schema.recipe import ModelRecipe
from layerloop.pipelines.cli import main

from ..campaigns import CampaignBuilder
from .conftest import QUICK

PNG = DecomposeOptions(**QUICK, formats=("png",))


def contents(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*.*")) if path.is_file()}


def statuses(summary: run.Summary) -> list[str]:
    return [outcome.status for outcome in summary.outcomes]


def test_what_is_made_is_kept_and_what_is_damaged_is_made_again(two: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert statuses(decompose([two], out, PNG)) == ["made", "made"]
    first = contents(out)
    again = decompose([two], out, PNG)
    assert statuses(again) == ["kept", "kept"]
    assert again.model_seconds == 0
    (out / "b" / "0-background.png").write_bytes(b"cut")
    assert statuses(decompose([two], out, PNG)) == ["kept", "made"]
    assert contents(out) == first


def test_a_killed_runs_remains_do_not_count(two: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / ".partial-123").mkdir(parents=True)
    (out / ".partial-123" / "0-background.png").write_bytes(b"half")
    (out / ".replaced-123").mkdir()
    (out / "a").mkdir()  # without a record it is not ours, and stays
    (out / "a" / "mine.txt").write_text("keep")
    decompose([two], out, PNG)
    assert not list(out.glob(".partial*")) + list(out.glob(".replaced*"))
    assert (out / "a" / "mine.txt").read_text() == "keep"
    (made,) = out.glob("a-*")
    assert (made / "layers.json").is_file()


def test_a_failure_while_writing_leaves_nothing(two: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("layerloop.components.decompose.files.composite", fail)
        summary = decompose([two], out, PNG)
    assert [outcome.reason for outcome in summary.failed] == [
        f"{out / name} cannot be written (No space left on device): allow it, or free some space" for name in "ab"
    ]
    assert sorted(path.name for path in out.iterdir()) == [".lock", "settings.json"]
    assert statuses(decompose([two], out, PNG)) == ["made", "made"]


def test_results_of_other_settings_are_refused_before_the_model_is_loaded(
    two: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    decompose([two / "a.png"], out, PNG)
    monkeypatch.setattr(run, "load", lambda *_: pytest.fail("loaded"))
    with pytest.raises(LayerloopError, match=r"has results of other settings \(steps: 1 -> 2; seed: 0 -> 5\): give an"):
        decompose([two], out, PNG.model_copy(update={"steps": 2, "seed": 5}))


def test_formats_may_be_added(two: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    decompose([two / "a.png"], out, PNG)
    summary = decompose([two / "a.png"], out, PNG.model_copy(update={"formats": ("png", "psd")}))
    assert statuses(summary) == ["made"]
    assert (out / "a" / "a.psd").is_file()
    assert statuses(decompose([two / "a.png"], out, PNG)) == ["kept"]


def test_two_runs_do_not_write_one_folder(two: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with (tmp_path / "out" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(LayerloopError, match="is being written by another run: wait for it"):
            decompose([two], tmp_path / "out", PNG)


@pytest.mark.parametrize(("out", "words"), [("s3://bucket/x", "is a URI"), ("{two}/a.png", "is a file, not a folder")])
def test_an_output_that_is_no_folder_is_refused(two: Path, out: str, words: str) -> None:
    with pytest.raises(LayerloopError, match=words):
        decompose([two], out.format(two=two), PNG)


def test_an_output_that_cannot_be_written_is_refused(two: Path) -> None:
    with pytest.raises(LayerloopError, match=r"/proc/layers cannot be written \(.*\): give a folder that can be"):
        decompose([two], "/proc/layers", PNG)


def test_a_pictures_layers_do_not_depend_on_its_neighbours(two: Path, tmp_path: Path) -> None:
    decompose([two], tmp_path / "both", PNG.model_copy(update={"batch_size": 2}))
    decompose([two / "b.png"], tmp_path / "alone", PNG.model_copy(update={"batch_size": 1}))
    both, alone = contents(tmp_path / "both"), contents(tmp_path / "alone")
    assert {name: data for name, data in both.items() if name.startswith("b/")} == {
        name: data for name, data in alone.items() if name.startswith("b/")
    }


def test_pictures_of_one_name_have_folders_of_their_own(two: Path, tmp_path: Path) -> None:
    (two / "more").mkdir()
    Image.open(two / "b.png").save(two / "more" / "a.png")
    summary = decompose([two / "a.png", two / "more"], tmp_path / "out", PNG)
    first, second = (outcome.folder for outcome in summary.outcomes)
    assert first is not None and second is not None
    assert first.name == "a" and second.name.startswith("a-")
    kept = decompose([two / "more", two / "a.png"], tmp_path / "out", PNG)
    assert [outcome.folder for outcome in kept.outcomes] == [second, first]
    assert statuses(kept) == ["kept", "kept"]


def test_results_are_no_pictures_of_the_next_run(two: Path) -> None:
    decompose([two], two, PNG)
    assert statuses(decompose([two], two, PNG)) == ["kept", "kept"]


@pytest.mark.parametrize(
    ("origin", "stem"),
    [
        ("x/a.b.png", "a.b"),
        ("x/..png", "picture"),
        ("ä 日本.jpg", "ä 日本"),
        ('a"<\udce9>.png', "a____"),
        ("x" * 300, "x" * 80),
    ],
)
def test_folders_have_names_that_every_system_takes(origin: str, stem: str) -> None:
    assert Picture(origin, "0" * 64, 1, 1).stem == stem


# ----------------------------------------------------------------------------------------------------------- the counts


def test_the_count_without_bad_layers_and_with_the_least_error_is_kept() -> None:
    trials = [Trial(2, 0, 0.05), Trial(3, 0, 0.03), Trial(4, 1, 0.01), Trial(5, 1, 0.01)]
    assert best(trials).layers == 3
    assert best(trials[2:]).layers == 4
    assert best([Trial(4, 2, 0.01), Trial(5, 1, 0.9)]).layers == 5


def test_counts_are_measured_on_the_models_own_layers() -> None:
    source = np.full((8, 8, 3), 90, np.uint8)
    source[4:] = 10
    good = np.full((2, 8, 8, 4), 90, np.uint8)
    good[1, ..., :3] = 10
    good[..., 3] = 255
    good[1, :4] = 0
    blank = np.concatenate([good, np.zeros((1, 8, 8, 4), np.uint8)])
    stack, kept, trials = choose_count({2: good, 3: blank}, source)
    assert (kept.layers, len(stack), [t.bad_layers for t in trials]) == (2, 2, [0, 1])


def test_blank_layers_are_left_out_and_one_is_always_kept() -> None:
    stack = np.zeros((3, 8, 8, 4), np.uint8)
    assert len(without_blank(stack)) == 1
    stack[1] = 200
    assert np.array_equal(without_blank(stack), stack[1:2])


def test_auto_tries_counts_and_says_so(two: Path, tmp_path: Path) -> None:
    options = PNG.model_copy(update={"layers": "auto", "drop_blank": True})
    decompose([two / "a.png"], tmp_path / "out", options)
    record = json.loads((tmp_path / "out" / "a" / "layers.json").read_text())
    assert [trial["layers"] for trial in record["tried"]] == [2, 3, 4, 5]
    assert record["kept"] in record["tried"]
    assert 1 <= len(record["layers"]) <= record["kept"]["layers"]
    assert record["recomposition"]["largest_difference_levels"] <= 1


# --------------------------------------------------------------------------------------------------------- the adapters


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of the tiny policy with an effect, as publications lay it out."""
    policy = LayeredPolicy.load(ModelRecipe(base="tiny", dtype="float32"))
    made = new_adapter(policy.transformer, LoraRecipe(rank=2, alpha=2.0), seed=1)
    made.state.update({key: value + 0.2 for key, value in made.state.items() if "lora_B" in key})
    folder = tmp_path_factory.mktemp("adapter")
    write_layouts(made, folder, transformer=policy.transformer, base="tiny")
    return folder


def test_an_adapter_changes_the_layers_and_is_named(two: Path, tmp_path: Path, adapter: Path) -> None:
    decompose([two / "a.png"], tmp_path / "base", PNG)
    for number, form in enumerate((adapter, adapter / PEFT)):
        out = tmp_path / str(number)
        decompose([two / "a.png"], out, PNG.model_copy(update={"adapter": str(form)}))
        settings = json.loads((out / "settings.json").read_text())
        assert (settings["base"], len(settings["adapter_sha256"])) == ("tiny", 64)
        assert contents(out / "a")["1-layer-1.png"] != contents(tmp_path / "base" / "a")["1-layer-1.png"]
    assert contents(tmp_path / "0" / "a")["1-layer-1.png"] == contents(tmp_path / "1" / "a")["1-layer-1.png"]


def test_an_adapter_of_another_base_is_refused(two: Path, tmp_path: Path, adapter: Path, tiny_base: Path) -> None:
    options = PNG.model_copy(update={"adapter": str(adapter), "base": str(tiny_base)})
    with pytest.raises(LayerloopError, match=f"adapter {adapter.name} is not for the base {tiny_base}"):
        decompose([two], tmp_path / "out", options)


def test_an_adapter_that_names_another_base_is_refused_or_said(
    two: Path, tmp_path: Path, adapter: Path, tiny_base: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """One that comes without its base's fingerprint, as peft writes it."""
    named = shutil.copytree(adapter / PEFT, tmp_path / "named")
    config = json.loads((named / "adapter_config.json").read_bytes())
    for base, said in (("tiny-faulty", None), ("owner/model", "adapter named names owner/model as its base, and tiny")):
        (named / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": base}))
        options = DecomposeOptions(**QUICK, adapter=str(named), base="tiny")
        if said is None:
            with pytest.raises(LayerloopError, match="adapter named is for the base tiny-faulty, not tiny: leave out"):
                decompose([two / "a.png"], tmp_path / "out", options)
        else:
            decompose([two / "a.png"], tmp_path / "out", options)
            log = capfd.readouterr().err
            assert said in log
            assert "Loading weights" not in log, "a bar of transformers"


def test_a_publication_says_its_base_and_one_for_another_is_refused(two: Path, tmp_path: Path, adapter: Path) -> None:
    published = Path(shutil.copytree(adapter, tmp_path / "published"))
    manifest = Manifest(kind="published", metadata={"base": "tiny", "base_fingerprint": "f" * 64})
    (published / "manifest.json").write_bytes(manifest.to_json())
    with pytest.raises(LayerloopError, match="adapter published was trained on the base ffffffffffff, tiny is "):
        decompose([two], tmp_path / "out", PNG.model_copy(update={"adapter": str(published)}))


def test_another_adapters_results_are_not_kept_as_ones_own(two: Path, tmp_path: Path, adapter: Path) -> None:
    decompose([two], tmp_path / "out", PNG)
    with pytest.raises(LayerloopError, match=r"results of other settings \(adapter_sha256: None -> "):
        decompose([two], tmp_path / "out", PNG.model_copy(update={"adapter": str(adapter)}))


@pytest.fixture
def lab(tmp_path: Path, tiny_base: Path) -> CampaignBuilder:
    recipe = {
        "name": "lab", "model": {"base": str(tiny_base), "dtype": "float32"}, "data": {"resolution": 32},
        "rollout": {"groups": 2, "group_size": 2}, "lora": {"rank": 2, "alpha": 2.0},
    }  # fmt: skip
    lab = CampaignBuilder.begin(str(tmp_path / "campaign"), recipe)
    lab.sources(holdout=[np.zeros((32, 32, 3), np.uint8)])
    return lab


def test_a_campaigns_adapter_comes_with_its_base_and_its_size(two: Path, tmp_path: Path, lab: CampaignBuilder) -> None:
    options = PNG.model_copy(update={"adapter": lab.uri})
    with pytest.raises(LayerloopError, match="has no adapter yet: train an iteration first"):
        decompose([two], tmp_path / "out", options)
    lab.adapter(1)
    decompose([two / "a.png"], tmp_path / "out", options)
    settings = json.loads((tmp_path / "out" / "settings.json").read_text())
    assert settings["resolution"] == 32
    assert settings["adapter_sha256"] in {file.sha256 for file in lab.campaign.policy(1).files}


def test_whoever_decomposes_with_a_toy_is_told_so_first_whatever_adapter_is_on_it(adapter: Path) -> None:
    told = choose(DecomposeOptions(base="tiny-faulty")).description
    assert told.startswith("the tiny policy that ships with layerloop, with faults to unlearn, a toy of 64 pixels")
    told = choose(DecomposeOptions(base="tiny", adapter=str(adapter))).description
    assert told.startswith(f"the adapter {adapter.name}, on the tiny policy that ships with layerloop, a toy of 64")
    assert choose(DecomposeOptions(base="Qwen/x")).description == "Qwen/x, as asked for"


@pytest.mark.parametrize(
    "text", ["[" * 100_000, json.dumps({"base_model_name_or_path": "x" * 5000}), '{"base_model_name_or_path": ""}']
)
def test_a_config_that_names_no_base_leaves_the_choice_open(text: str, adapter: Path, tmp_path: Path) -> None:
    odd = Path(shutil.copytree(adapter / PEFT, tmp_path / "odd"))
    (odd / "adapter_config.json").write_text(text)
    assert choose(DecomposeOptions(adapter=str(odd))).base == "tiny"


def test_adapters_are_found_by_every_way_to_write_a_path(
    adapter: Path, lab: CampaignBuilder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(adapter.parent))
    file = adapter / "pytorch_lora_weights.safetensors"
    for text in (f"~/{adapter.name}", f"file://{adapter}", str(file), f"file://{file}"):
        assert choose(DecomposeOptions(adapter=text)).adapter_sha256 == weights_sha256(adapter), text
    lab.adapter(1)
    monkeypatch.setenv("HOME", str(Path(lab.uri).parent))
    assert choose(DecomposeOptions(adapter=f"~/{Path(lab.uri).name}")).campaign is not None
    with pytest.raises(LayerloopError, match=r"adapter x+ cannot be read \(File name too long\): give one that can"):
        choose(DecomposeOptions(adapter="x" * 300))
    with pytest.raises(LayerloopError, match="--adapter is empty: give an adapter, or leave the option out"):
        choose(DecomposeOptions(adapter=" "))


@pytest.mark.parametrize("name", ["no such thing", "campaigns/mien"])
def test_a_name_that_is_nothing_is_refused(
    name: str, two: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "campaigns/mine").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)  # where campaigns/mien is a misspelt path and nothing of the hub
    with pytest.raises(LayerloopError, match=f"adapter {name} does not exist: give a folder, a campaign"):
        decompose([two], tmp_path / "out", PNG.model_copy(update={"adapter": name}))


# ----------------------------------------------------------------------------------------------------- the command line


def cli(*arguments: object) -> int:
    return main(["decompose", *map(str, arguments)])


def test_the_command_goes_on_after_a_bad_picture_and_its_status_says_so(
    two: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", warm())
    (two / "broken.png").write_bytes(b"no")
    quick = ("--layers", 2, "--steps", 1, "--sampler", "euler", "--guidance", 2, "--formats", "png")
    assert cli(two, "-o", tmp_path / "out", *quick) == 1
    said = capfd.readouterr()
    assert said.out.split() == [str(tmp_path / "out" / "a"), str(tmp_path / "out" / "b")]
    assert "model: the tiny policy that ships with layerloop, a toy" in said.err
    assert f"failed {two / 'broken.png'}: image starts with" in said.err
    assert "3 pictures: 2 made, 1 failed" in said.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--layers", "0"), "layers is 0: choose 1..20, or auto"),
        (("--layers", "21"), "layers is 21: choose 1..20, or auto"),
        (("--layers", "some"), "layers is some: choose 1..20, or auto"),
        (("--formats", "png,gif"), "format 'gif' is not known: choose some of png, psd, pptx, zip, html"),
        (("--steps", "0"), "--steps is 0"),
        (("--guidance", "nan"), "--guidance is nan"),
        (("--recipe", "nowhere"), "recipe nowhere cannot be read"),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_starts(
    arguments: tuple[str, ...], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli("a.png", "-o", tmp_path / "out", *arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert words in line
    assert not (tmp_path / "out").exists()


def test_an_unwritable_folder_ends_the_command_with_status_2(two: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli(two, "-o", "/proc/layers") == 2
    assert capfd.readouterr().err.startswith("error: /proc/layers cannot be written")


def test_the_output_folder_waits_for_the_whole_picture(tmp_path: Path) -> None:
    folder = OutputFolder(tmp_path / "out")
    with pytest.raises(RuntimeError), folder.picture("a") as store:
        store.write("0-background.png", b"first")
        raise RuntimeError("killed")
    assert list((tmp_path / "out").iterdir()) == []
    with folder.picture("a") as store:
        store.write("0-background.png", b"first")
        assert not (tmp_path / "out" / "a").exists()
    assert (tmp_path / "out" / "a" / "0-background.png").read_bytes() == b"first"


def test_a_gpu_that_cannot_hold_what_is_asked_for_is_refused_before_the_base_is_loaded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """More layers, a larger picture and a larger batch need more; the copy on the node comes after."""
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (1_000_000_000, 8_000_000_000))
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "NVIDIA T4")
    monkeypatch.setattr("layerloop.components.policy.at.node_copy", lambda folder, files: pytest.fail("was copied"))
    needs: list[float] = []
    really = memory.check_gpu

    def check_gpu(needed: float, **others: Any) -> None:
        needs.append(needed)
        really(needed, **others)

    monkeypatch.setattr("layerloop.components.policy.memory.check_gpu", check_gpu)
    for more in (
        {},
        {"layers": 20},
        {"layers": 20, "resolution": 1024},
        {"layers": 20, "resolution": 1024, "batch_size": 9},
    ):
        options = DecomposeOptions.of(base="tiny", **more)
        with pytest.raises(LayerloopError) as caught:
            model._load_base(model.choose(options), options, torch.device("cuda", 0))
        line = str(caught.value)
        assert line.startswith("cuda:0 (NVIDIA T4) has 1.0 of 8.0 GB free, evaluation needs about ")
        assert line.endswith("take a larger GPU, or lower --resolution, --layers or --batch-size")
    assert len(set(needs)) == 4 and needs == sorted(needs)


def test_the_base_is_loaded_from_a_copy_on_the_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copied: list[Path] = []

    def node_copy(folder: Path, files: list[Path]) -> Path:
        shutil.copytree(folder, tmp_path / "node")
        copied.append(folder)
        return tmp_path / "node"

    monkeypatch.setattr("layerloop.components.policy.at.node_copy", node_copy)
    options = DecomposeOptions(base="tiny")
    loaded = model.load(model.choose(options), options)
    assert len(copied) == 1 and loaded.policy.folder == tmp_path / "node"
