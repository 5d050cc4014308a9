"""Publishing: both layouts, loading them back, and the model card."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import QwenImageLayeredPipeline
from huggingface_hub import ModelCard
from peft import PeftModel
from safetensors.torch import load

from layerloop.components.evaluate_adapter.assess import Comparisons
from layerloop.components.evaluate_adapter.results import metrics_json
from layerloop.components.evaluate_adapter.statistics import Comparison
from layerloop.components.layers.columns import COLUMNS, quoted, title_of
from layerloop.components.policy.adapter_files import write_layouts
from layerloop.components.policy.adapters import read_adapter
from layerloop.components.policy.lora import put_adapter
from layerloop.components.policy.model import LayeredPolicy
from layerloop.components.publish_adapter.names import licence_of
from layerloop.components.publish_adapter.step import run
from layerloop.components.schema.errors import LayerloopError
from layerloop.components.schema.manifest import Manifest
from layerloop.components.storage.campaign import MANIFEST, Campaign
from layerloop.components.storage.manifests import add_file, commit

from ..campaigns import CampaignBuilder, plain_name, policy_folder
from .conftest import MakeCampaign, velocity

FILES = {
    "README.md", "manifest.json", "peft/adapter_config.json", "peft/adapter_model.safetensors",
    "pytorch_lora_weights.bf16.safetensors", "pytorch_lora_weights.safetensors",
}  # fmt: skip


def published(campaign: Campaign, name: str) -> Path:
    return Path(campaign.uri) / campaign.published_dir(name)


def test_both_layouts_load_and_give_the_campaigns_output(make_campaign: MakeCampaign) -> None:
    campaign = make_campaign()
    result = run(campaign=campaign.uri, publish_as="first")

    folder = published(campaign, "first")
    assert {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} == FILES
    for file in result.manifests["adapter"].files:
        name = plain_name(file.name).removeprefix("publications/first/")
        assert (folder / name).read_bytes() == campaign.store.read(file.name), "what people load is what is committed"
    wanted = LayeredPolicy.load(campaign.recipe.model)
    before = velocity(wanted)
    put_adapter(wanted.transformer, read_adapter(policy_folder(campaign, 1)))
    by_peft = LayeredPolicy.load(campaign.recipe.model)
    by_peft.transformer = PeftModel.from_pretrained(by_peft.transformer, folder / "peft")
    by_diffusers = LayeredPolicy.load(campaign.recipe.model)
    pipeline = QwenImageLayeredPipeline(
        scheduler=by_diffusers.scheduler, vae=by_diffusers.vae, transformer=by_diffusers.transformer,
        text_encoder=None, tokenizer=None, processor=None,
    )  # fmt: skip
    pipeline.load_lora_weights(folder)
    assert torch.equal(velocity(by_peft), velocity(wanted))
    assert torch.equal(velocity(by_diffusers), velocity(wanted))
    assert not torch.equal(velocity(wanted), before)
    assert result.metrics["difference_peft"] == result.metrics["difference_diffusers"] == 0.0
    assert result.metrics["adapter_effect"] == pytest.approx(0.02, abs=0.1)
    assert result.files["card"] == (folder / "README.md").read_bytes()
    config = json.loads((folder / "peft/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] is None, "a folder of this machine is nobody else's"


@pytest.mark.parametrize("scale", [1e-4, 0.05], ids=["a young adapter", "an old one"])
def test_a_bfloat16_base_is_published_from_whatever_the_adapters_effect(
    make_campaign: MakeCampaign, scale: float
) -> None:
    campaign = make_campaign(iterations=0)
    model = campaign.recipe.model.model_copy(update={"dtype": "bfloat16"})
    campaign = make_campaign_with(campaign, model, scale)
    metrics = run(campaign=campaign.uri, publish_as="half").metrics
    card = campaign.store.read("published/half/README.md").decode()
    assert f"Velocities in bfloat16 differ from the training run's by {metrics['difference_peft']:.2g} (peft)" in card
    if scale == 1e-4:
        assert metrics["adapter_effect"] < 0.002, "of the size of rounding: no tolerance of a velocity would do"
    else:
        assert 0 < metrics["difference_peft"] < 2 * metrics["rounding_noise"] < 0.01
        assert 0 < metrics["difference_diffusers"] < 2 * metrics["rounding_noise"]


def make_campaign_with(campaign: Campaign, model: object, scale: float) -> Campaign:
    """The same campaign started with another model section."""
    shutil.rmtree(Path(campaign.uri))
    lab = CampaignBuilder(Campaign.create_or_open(campaign.uri, campaign.recipe.model_copy(update={"model": model})))
    lab.sources()
    lab.adapter(1, scale=scale)
    return lab.campaign


def test_the_average_is_published_where_one_is_kept(make_campaign: MakeCampaign) -> None:
    campaign = make_campaign(ema=True)
    result = run(campaign=campaign.uri, publish_as="averaged")
    weights = load((published(campaign, "averaged") / "peft/adapter_model.safetensors").read_bytes())
    average = load((policy_folder(campaign, 1) / "ema.safetensors").read_bytes())
    assert weights.keys() == average.keys()
    assert all(torch.equal(weights[key], average[key]) for key in weights)
    assert "exponential average of the weights" in result.files["card"].decode()


@pytest.mark.slow
def test_a_base_that_ranks_share_is_published_from_with_the_bytes_of_one_process(make_campaign: MakeCampaign) -> None:
    """Two processes, which the step's plain command starts by itself where the base is sharded."""
    campaign = make_campaign()
    expected = run(campaign=campaign.uri, publish_as="alone")
    command = [
        sys.executable,
        "-m",
        "layerloop.components.publish_adapter",
        "--campaign",
        campaign.uri,
        "--publish-as",
        "ranks",
    ]
    command += ["--runtime", '{"model": {"fsdp": true}}']
    environment = os.environ | {"OMP_NUM_THREADS": "1", "LAYERLOOP_PROCESSES": "2"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "in 2 processes" in done.stderr and "loaded completely" not in done.stderr
    found, folders = campaign.find("published/ranks"), (published(campaign, "alone"), published(campaign, "ranks"))
    assert found is not None and found.metadata["difference_peft"] == found.metadata["difference_diffusers"] == 0.0
    assert found.metadata["adapter_effect"] == expected.metrics["adapter_effect"] > 1e-3
    for name in FILES - {"README.md", "manifest.json"}:
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes(), name


@pytest.mark.slow
def test_a_base_that_one_gpu_holds_is_published_from_in_one_process(make_campaign: MakeCampaign) -> None:
    campaign = make_campaign()
    command = [sys.executable, "-m", "layerloop.components.publish_adapter", "--campaign", campaign.uri]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "LAYERLOOP_PROCESSES": "2"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "processes" not in done.stderr and campaign.published() == [campaign.publication_name(1)]


# ---- names


def test_publishing_again_under_the_same_name_changes_nothing(make_campaign: MakeCampaign) -> None:
    campaign = make_campaign()
    first = run(campaign=campaign.uri, publish_as="v1.0")
    before = {name: campaign.store.read(name) for name in campaign.store.list("published/")}
    again = run(campaign=campaign.uri, publish_as="v1.0", iteration=1)
    assert again.manifests == first.manifests
    assert again.files == first.files
    assert before == {name: campaign.store.read(name) for name in campaign.store.list("published/")}


def test_an_old_publication_is_found_again_as_it_is(make_campaign: MakeCampaign) -> None:
    """One of before the weights lay at the root: a folder per layout, fewer numbers."""
    campaign = make_campaign()
    write_layouts(read_adapter(policy_folder(campaign, 1)), folder := published(campaign, "old"))
    (folder / "diffusers").mkdir()
    (folder / "pytorch_lora_weights.safetensors").rename(folder / "diffusers/pytorch_lora_weights.safetensors")
    (folder / "pytorch_lora_weights.bf16.safetensors").unlink()
    names = ("peft/adapter_model.safetensors", "peft/adapter_config.json", "diffusers/pytorch_lora_weights.safetensors")
    files = tuple(add_file(campaign.store, f"published/old/{name}", (folder / name).read_bytes()) for name in names)
    files += (add_file(campaign.store, "published/old/README.md", b"# old"),)
    numbers = {"adapter_effect": 0.1, "difference_peft": 0.0, "difference_diffusers": 0.0, "name": "old"}
    source = campaign.policy(1).file("adapter_model.safetensors").sha256
    manifest = Manifest(kind="published", iteration=1, files=files, metadata=numbers | {"source_sha256": source})
    commit(campaign.store, f"published/old/{MANIFEST}", manifest)
    result = run(campaign=campaign.uri, publish_as="old")
    assert result.manifests["adapter"] == manifest and result.files["card"] == b"# old"
    assert result.metrics["adapter_effect"] == 0.1
    assert read_adapter(folder).alpha == 8.0


def test_a_name_that_holds_another_adapter_is_not_overwritten(make_campaign: MakeCampaign) -> None:
    campaign = make_campaign(iterations=2)
    run(campaign=campaign.uri, publish_as="best", iteration=1)
    with pytest.raises(LayerloopError, match="already holds the adapter of iteration 1, not of 2: choose another pub"):
        run(campaign=campaign.uri, publish_as="best")
    assert run(campaign=campaign.uri, publish_as="better").manifests["adapter"].iteration == 2


def test_without_a_name_it_is_the_campaigns_and_the_iteration(make_campaign: MakeCampaign) -> None:
    campaign = make_campaign(iterations=2)
    run(campaign=campaign.uri)
    assert campaign.published() == [f"{Path(campaign.uri).parent.name.strip('-._')}-000002"]


def test_what_an_earlier_version_called_by_the_recipe_is_found_again(make_campaign: MakeCampaign) -> None:
    campaign = make_campaign()
    run(campaign=campaign.uri, publish_as="shop-000001")
    run(campaign=campaign.uri)
    assert campaign.published() == ["shop-000001"]


@pytest.mark.parametrize("name", [".", "..", "../up", "a/b", "-x", "with space", "ä", "x" * 97, "a\n"])
def test_a_name_that_is_no_folder_name_is_refused(make_campaign: MakeCampaign, name: str) -> None:
    campaign = make_campaign(iterations=0)
    with pytest.raises(LayerloopError, match="publish_as is .*: give 1 to 96 letters"):
        run(campaign=campaign.uri, publish_as=name)


def test_a_campaign_without_an_adapter_has_nothing_to_publish(make_campaign: MakeCampaign) -> None:
    campaign = make_campaign(iterations=0)
    with pytest.raises(LayerloopError, match="has no adapter to publish"):
        run(campaign=campaign.uri, publish_as="early")


def test_an_adapter_of_another_base_is_refused(make_campaign: MakeCampaign) -> None:
    campaign = make_campaign()
    name = f"{campaign.policy_dir(1)}/{MANIFEST}"
    manifest = campaign.policy(1)
    changed = manifest.model_copy(update={"metadata": manifest.metadata | {"base_fingerprint": "e" * 64}})
    campaign.store.write(name, changed.to_json())
    with pytest.raises(LayerloopError, match="the adapter of iteration 1 was trained on eeeeeeeeeeee"):
        run(campaign=campaign.uri, publish_as="other")
    assert campaign.published() == []


# ---- the card


def card_of(campaign: Campaign, name: str = "named") -> str:
    return run(campaign=campaign.uri, publish_as=name).files["card"].decode()


def front_matter(card: str) -> dict[str, object]:
    matter = yaml.safe_load(card.split("---")[1])
    assert isinstance(matter, dict)
    return matter


def test_the_cards_front_matter_is_what_the_hub_reads(make_campaign: MakeCampaign) -> None:
    card = card_of(campaign := make_campaign())
    matter = front_matter(card)
    assert matter["license"] == "unknown", "a folder says nothing of its licence"
    assert matter["library_name"] == "diffusers"
    assert {"lora", "peft", "flow-grpo", "arxiv:2605.30257"} <= set(matter["tags"])  # type: ignore[call-overload]
    assert "base_model" not in matter, "a local folder is not a name on the hub"
    assert campaign.recipe.model.base not in card and campaign.uri not in card
    parsed = ModelCard(card)  # as huggingface_hub reads it
    assert parsed.data.to_dict() == matter and parsed.text.lstrip().startswith("# named")
    assert not [key for key, value in matter.items() if value is None]


def test_the_card_names_a_base_of_the_hub() -> None:
    from layerloop.components.publish_adapter.card import Publication, model_card
    from layerloop.components.schema.recipe import Recipe

    manifest = Manifest(kind="policy", iteration=3, metadata={"reward_mean": 0.5})
    card = model_card(
        Publication(
            name="layers",
            recipe=Recipe(name="r"),
            iteration=3,
            policy=manifest,
            first=manifest,
            averaged=False,
            parameters=106_200_000,
            sha256="0" * 64,
            scores=[],
            evaluation=None,
            verification="Verified.",
        )
    )
    matter = front_matter(card)
    assert matter["base_model"] == "Qwen/Qwen-Image-Layered"
    assert matter["base_model_relation"] == "adapter"
    assert matter["license"] == "apache-2.0"
    assert 'base = "Qwen/Qwen-Image-Layered"' in card
    assert "106,200,000 parameters" in card
    assert "was not evaluated" in card


def test_the_card_says_plainly_when_the_judge_was_rules(make_campaign: MakeCampaign) -> None:
    assert "is not a vision-language model" in card_of(make_campaign())


def test_the_card_names_the_judge(make_campaign: MakeCampaign) -> None:
    card = card_of(make_campaign(judge="qwen-vl-max"))
    assert "Rewards were given by `qwen-vl-max` with the rubric `default` 3." in card
    assert "is not a vision-language model" not in card


@pytest.mark.parametrize(
    ("base", "start", "fields"),
    [
        ("Qwen/Qwen-Image-Layered", None, {"license": "apache-2.0"}),
        ("tiny", None, {"license": "apache-2.0"}),
        ("/data/base", None, {"license": "unknown"}),
        ("s3://bucket/base", None, {"license": "unknown"}),
        ("me/mine", None, {"license": "other", "license_name": "as-its-base",
                           "license_link": "https://huggingface.co/me/mine"}),
        ("tiny", "s3://bucket/start", {"license": "other", "license_name": "as-the-adapter-that-it-started-from"}),
        ("/data/base", "hf://me/start/checkpoint", {
            "license": "other", "license_name": "as-the-adapter-that-it-started-from",
            "license_link": "https://huggingface.co/me/start"}),
    ],
)  # fmt: skip
def test_the_licence_is_that_of_what_it_was_made_from(base: str, start: str | None, fields: dict[str, str]) -> None:
    licence = licence_of(base, start)
    assert licence.fields == fields
    assert re.fullmatch(r"[a-z0-9.-]+", fields.get("license_name", "a")), "what the hub takes"
    assert "bucket" not in licence.sentence and "/data" not in licence.sentence


def test_an_adapter_that_started_from_another_brings_that_licence(make_campaign: MakeCampaign) -> None:
    card = card_of(make_campaign(lora={"rank": 4, "alpha": 8.0, "start_from": "hf://StabilityLabs/Stable-Layers/600"}))
    assert front_matter(card)["license"] == "other"
    assert "It started from `StabilityLabs/Stable-Layers`; that licence applies as well" in card


def test_the_card_quotes_the_evaluation_with_its_intervals(make_campaign: MakeCampaign) -> None:
    campaign = make_campaign()
    metrics = {
        "designs.bad_layers": {"title": "bad layers", "base": 1.65, "tuned": 0.4, "difference": -1.25, "low": -1.5,
                               "high": -1.0, "n": 32, "better": "lower", "clear": True},
        "designs.slot_l1.L10": {"title": "slot L1", "base": 0.2, "tuned": 0.1, "difference": -0.1, "low": -0.2,
                                "high": -0.05, "n": 4, "better": "lower", "clear": False},
        "designs.slot_l1.L3.slot1": {"title": "slot L1", "base": 0.0879, "tuned": 0.0767, "difference": -0.0112,
                                     "low": -0.02, "high": 0.003, "n": 12, "better": "lower", "clear": False},
        "designs.slot_l1.L3": {"title": "slot L1", "base": 0.3, "tuned": 0.1, "difference": -0.2, "low": -0.3,
                               "high": -0.1, "n": 12, "better": "lower", "clear": True},
        "designs.slot_l1.L3.slot0": {"title": "slot L1, 3 layers, slot 0", "base": 0.2, "tuned": 0.1,
                                     "difference": -0.1, "low": -0.2, "high": 0.1, "n": 12,
                                     "better": "lower", "clear": False},
        "pictures.holes": {"title": "holes", "base": 2e-5, "tuned": 0.0, "difference": -2e-5, "low": -3e-5,
                           "high": -1e-5, "n": 8, "better": "lower", "clear": False, "decimals": 3},
        "pictures.evenness": {"title": "evenness", "base": 0.5, "tuned": None, "difference": None, "low": None,
                              "high": None, "n": 8, "better": "higher", "clear": False},
        "definitions": {"bad_layers": "..."},
        "fewest": 8,
        "method": "bootstrap",
        "provenance": {"adapter_sha256": campaign.policy(1).metadata["adapter_sha256"]},
    }  # fmt: skip
    folder = campaign.evaluation_dir("iteration-000001")
    file = add_file(campaign.store, f"{folder}/metrics.json", json.dumps(metrics).encode())
    commit(campaign.store, f"{folder}/{MANIFEST}", Manifest(kind="evaluation", iteration=1, files=(file,)))
    card = card_of(campaign)
    rows = [line for line in card.splitlines() if line.startswith(("| bad", "| slot", "| even", "| hol", "| meas"))]
    assert rows == [
        "| measure | n | base | this adapter | difference | 95 % interval |",
        "| bad layers ↓ | 32 | 1.65 | 0.4 | **-1.25** | -1.5 to -1 |",
        "| slot L1, 3 layers ↓ | 12 | 0.3 | 0.1 | **-0.2** | -0.3 to -0.1 |",
        "| slot L1, 3 layers, slot 0 ↓ | 12 | 0.2 | 0.1 | -0.1 | -0.2 to 0.1 |",
        "| slot L1, 3 layers, layer 1 ↓ | 12 | 0.0879 | 0.0767 | -0.0112 | -0.02 to 0.003 |",
        "| slot L1, 10 layers ↓ | 4 | 0.2 | 0.1 | -0.1 | -0.2 to -0.05 |",
        "| measure | n | base | this adapter | difference | 95 % interval |",
        "| evenness ↑ | 8 | 0.5 | – | – | – |",
        "| holes ↓ | 8 | 0.000 | 0.000 | 0.000 | 0.000 to 0.000 |",
    ]
    assert "bold where it is clear: its interval excludes 0, n is 8 or more, and its p-value" in card
    assert "of other weights" not in card


def test_the_card_quotes_the_columns_that_say_so_in_their_order(make_campaign: MakeCampaign) -> None:
    """From a metrics.json with every column, as evaluate_adapter writes it."""
    campaign = make_campaign()
    compared = Comparison(0.5, 0.4, -0.1, -0.2, -0.05, 20)
    slots = {3: {"slot_l1": compared}, 2: {"slot_l1": compared}}
    comparisons = Comparisons({"designs": dict.fromkeys(COLUMNS, compared)}, slots)
    folder = campaign.evaluation_dir("iteration-000001")
    metrics = metrics_json(comparisons, {}, {})
    file = add_file(campaign.store, f"{folder}/metrics.json", metrics)
    commit(campaign.store, f"{folder}/{MANIFEST}", Manifest(kind="evaluation", iteration=1, files=(file,)))
    rows = re.findall(r"^\| ([^|]*?)(?: [↓↑])? \| 20 \| 0.50 \|", card_of(campaign), re.MULTILINE)
    by_count = {"slot_l1": [f"{title_of('slot_l1')}, {layers} layers" for layers in (2, 3)]}
    assert rows == [title for name in quoted("card") for title in (title_of(name), *by_count.get(name, []))]
    assert len(rows) < len(COLUMNS)


@pytest.mark.parametrize("measured", ["ema.safetensors", "adapter_model.safetensors"])
def test_the_card_says_when_what_was_measured_is_not_what_is_published(
    make_campaign: MakeCampaign, measured: str
) -> None:
    campaign = make_campaign(ema=True)
    metrics = {"provenance": {"adapter_sha256": campaign.policy(1).file(measured).sha256}}
    folder = campaign.evaluation_dir("iteration-000001")
    file = add_file(campaign.store, f"{folder}/metrics.json", json.dumps(metrics).encode())
    commit(campaign.store, f"{folder}/{MANIFEST}", Manifest(kind="evaluation", iteration=1, files=(file,)))
    assert ("of other weights" in card_of(campaign)) == (measured != "ema.safetensors")
