"""The policy at an iteration: the same for every step, whether it is loaded or moved to, and refused where it is not
what the campaign says."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load, load_file, save
from warm_python import warm

from layerloop.components.evaluate_adapter import step as evaluate_adapter
from layerloop.components.generate_rollouts import step as generate_rollouts
from layerloop.components.policy import adapters, lora
from layerloop.components.policy.at import LoadedPolicy, policy_at
from layerloop.components.policy.model import Condition, LayeredPolicy
from layerloop.components.publish_adapter import step as publish_adapter
from layerloop.components.schema.errors import LayerloopError
from layerloop.components.schema.recipe import Recipe
from layerloop.components.shard_dataset import step as shard_dataset
from layerloop.components.storage.campaign import MANIFEST, Campaign
from layerloop.components.storage.manifests import add_file
from layerloop.components.update_lora import step as update_lora

from ..campaigns import CampaignBuilder, plain_name, prompt_embeds

MakeCampaign = Callable[..., Campaign]
STEPS = (generate_rollouts, update_lora, evaluate_adapter, publish_adapter)


@pytest.fixture
def make_campaign(random_folder: Path, tmp_path: Path) -> MakeCampaign:
    """`make_campaign(name, lora={...}, ...)`: a campaign with sources, before its first iteration."""

    def make(name: str = "campaign", **sections: dict[str, object]) -> Campaign:
        recipe = {
            "name": "test",
            "model": {"base": str(random_folder), "dtype": "float32"}
            | sections.pop("model", {}),
            "rollout": {
                "groups": 2, "group_size": 3, "steps": 4, "min_layers": 1, "max_layers": 2, "window": {"size": 2},
            },
            "lora": {"rank": 2, "alpha": 4},  # a scale other than 1, so that losing it would show
            "update": {"learning_rate": 1e-2},
            "evaluation": {"steps": 2, "layers": [2], "designs": 0, "pictures": 2},
            **sections,
        }  # fmt: skip
        lab = CampaignBuilder.begin(tmp_path / name, recipe)
        rng = np.random.default_rng(0)
        images = [rng.integers(0, 256, (32, 48, 3), np.uint8) for _ in range(4)]
        lab.sources(train=images[:2], holdout=images[2:])
        return lab.campaign

    return make


def commit_policy(campaign: Campaign, iteration: int, folder: Path, *, rank: int = 2, ema: bool = False) -> Path:
    """An adapter as `update_lora` commits one; returns the folder with its files."""
    folder = folder / f"{iteration}"
    CampaignBuilder(campaign).adapter(iteration, scale=0.1, rank=rank, average=0.5 if ema else None, folder=folder)
    return folder


def velocity(loaded: LoadedPolicy) -> torch.Tensor:
    policy = loaded.policy
    seen = torch.randn(1, 6, 64, generator=torch.Generator().manual_seed(1))
    condition = Condition(seen, loaded.prompt[None].to(policy.dtype), 32, 48)
    with torch.no_grad():
        return policy.velocity(policy.noise(3, 2, 32, 48), 0.8, condition)


def same(one: LoadedPolicy, other: LoadedPolicy) -> bool:
    """Whether two policies are the same in every number: what they say, what they weigh, what they compute."""
    left, right = (
        {name.replace(".base_layer", ""): p for name, p in loaded.policy.transformer.named_parameters()}
        for loaded in (one, other)
    )
    trainable = [list(loaded.policy.trainable_parameters()) for loaded in (one, other)]
    return (
        (one.adapter_sha256, one.base_fingerprint) == (other.adapter_sha256, other.base_fingerprint)
        and torch.equal(one.prompt, other.prompt)
        and trainable[0] == trainable[1]
        and left.keys() == right.keys()
        and all(torch.equal(left[name], right[name]) for name in left)
        and torch.equal(velocity(one), velocity(other))
    )


# ---- what it is


def test_iteration_0_is_the_base_and_for_learning_has_a_new_adapter_that_changes_nothing(
    make_campaign: MakeCampaign,
) -> None:
    campaign = make_campaign()
    frozen = policy_at(campaign, 0, device="cpu")
    assert frozen.adapter_sha256 is None and not lora.has_adapter(frozen.policy.transformer)
    assert frozen.base_fingerprint == LayeredPolicy.load(campaign.recipe.model).fingerprint
    assert torch.equal(frozen.prompt, prompt_embeds())
    learning = policy_at(campaign, 0, device="cpu", trainable=True)
    assert learning.adapter_sha256 is None and learning.policy.trainable_parameters()
    assert torch.equal(velocity(learning), velocity(frozen))


def test_an_iteration_is_its_committed_adapter_frozen_or_learning(make_campaign: MakeCampaign, tmp_path: Path) -> None:
    campaign = make_campaign()
    folder = commit_policy(campaign, 1, tmp_path)
    expected = LayeredPolicy.load(campaign.recipe.model)
    lora.put_adapter(expected.transformer, adapters.read_adapter(folder))
    for trainable in (False, True):
        loaded = policy_at(campaign, 1, device="cpu", trainable=trainable)
        assert bool(loaded.policy.trainable_parameters()) == trainable
        with loaded.policy.without_adapter():
            pass
        assert bool(loaded.policy.trainable_parameters()) == trainable, "switched off and on it is what it was"
        assert loaded.adapter_sha256 == campaign.policy(1).file("adapter_model.safetensors").sha256
        assert torch.equal(velocity(loaded), velocity(LoadedPolicy(expected, loaded.prompt, None, "")))


def test_delivered_weights_are_the_average_where_one_is_kept(make_campaign: MakeCampaign, tmp_path: Path) -> None:
    campaign = make_campaign()
    folder = commit_policy(campaign, 1, tmp_path, ema=True)
    loaded = policy_at(campaign, 1, device="cpu", delivered=True)
    assert loaded.adapter_sha256 == hashlib.sha256((folder / "ema.safetensors").read_bytes()).hexdigest()
    average, state = load_file(folder / "ema.safetensors"), lora.adapter_state(loaded.policy.transformer)
    assert all(torch.equal(average[f"base_model.model.{key}"], value) for key, value in state.items())
    sampling = policy_at(campaign, 1, device="cpu")
    assert sampling.adapter_sha256 == campaign.policy(1).file("adapter_model.safetensors").sha256


def test_a_campaign_that_starts_from_an_adapter_has_it_at_iteration_0(
    make_campaign: MakeCampaign, tmp_path: Path
) -> None:
    folder = commit_policy(make_campaign("other"), 1, tmp_path)
    campaign = make_campaign(lora={"rank": 2, "alpha": 16, "start_from": str(folder)})  # another alpha than the file's
    expected = LayeredPolicy.load(campaign.recipe.model)
    lora.put_adapter(expected.transformer, adapters.read_adapter(folder))
    for trainable in (False, True):
        loaded = policy_at(campaign, 0, device="cpu", trainable=trainable)
        assert loaded.adapter_sha256 == hashlib.sha256((folder / "adapter_model.safetensors").read_bytes()).hexdigest()
        assert lora.adapter_of(loaded.policy.transformer).alpha == 16
        assert torch.equal(velocity(loaded), velocity(LoadedPolicy(expected, loaded.prompt, None, "")))


# ---- moved from one iteration to another


MOVES = [  # (iteration, trainable, delivered): onto the base, to equal shapes, to another rank, off it again
    (0, False, False), (1, False, False), (2, True, False), (2, False, True), (3, True, False), (0, True, False),
    (1, True, False), (0, False, False), (3, False, False),
]  # fmt: skip


def test_a_policy_that_was_moved_is_the_one_that_is_loaded(make_campaign: MakeCampaign, tmp_path: Path) -> None:
    """Wherever it comes from, and whatever was done to its adapter there."""
    campaign = make_campaign()
    for iteration, rank in ((1, 2), (2, 2), (3, 5)):
        commit_policy(campaign, iteration, tmp_path, rank=rank, ema=True)
    moved: LoadedPolicy | None = None
    base: LayeredPolicy | None = None
    for iteration, trainable, delivered in MOVES:
        asked = {"device": "cpu", "trainable": trainable, "delivered": delivered}
        moved = policy_at(campaign, iteration, loaded=moved, **asked)  # type: ignore[arg-type]
        base = base or moved.policy
        assert moved.policy is base, "the base is not loaded again"
        assert same(moved, policy_at(campaign, iteration, **asked)), (iteration, trainable, delivered)  # type: ignore[arg-type]
        assert all(p.grad is None for p in base.transformer.parameters())
        for parameter in lora.lora_parameters(base.transformer):  # as a learner would, and worse
            parameter.grad = torch.ones_like(parameter)
            parameter.data.mul_(float("nan"))


def test_moving_between_adapters_of_one_shape_keeps_the_parameters(make_campaign: MakeCampaign, tmp_path: Path) -> None:
    """So that what was compiled or sharded around them stays valid."""
    campaign = make_campaign()
    for iteration in (1, 2):
        commit_policy(campaign, iteration, tmp_path)
    loaded = policy_at(campaign, 1, device="cpu")
    before = lora.lora_parameters(loaded.policy.transformer)
    there = policy_at(campaign, 2, device="cpu", trainable=True, loaded=loaded)
    assert [id(p) for p in lora.lora_parameters(there.policy.transformer)] == [id(p) for p in before]


def test_a_campaign_is_the_same_byte_for_byte_with_the_base_loaded_once(make_campaign: MakeCampaign) -> None:
    """Two iterations, the evaluation and the publication: every step by itself, and all with one policy."""

    def iterate(campaign: Campaign, loaded: LoadedPolicy | None) -> dict[str, bytes]:
        for iteration in (1, 2):
            generate_rollouts.run(loaded, campaign=campaign.uri)
            CampaignBuilder(campaign).scores(iteration)
            update_lora.run(loaded, campaign=campaign.uri)
            evaluate_adapter.run(loaded, campaign=campaign.uri)
            publish_adapter.run(loaded, campaign=campaign.uri, publish_as=f"of-{iteration}")
        return kept(campaign)

    alone, resident = make_campaign("alone"), make_campaign("resident")
    expected = iterate(alone, None)
    found = iterate(resident, policy_at(resident, 0, device="cpu"))
    assert expected.keys() == found.keys()
    assert len([name for name in expected if name.startswith(("iterations/", "evaluations/", "published/"))]) > 20
    assert [name for name in expected if expected[name] != found[name]] == []
    first, second = (
        load(expected[f"iterations/{iteration:06d}/policy/adapter_model.safetensors"]) for iteration in (1, 2)
    )
    assert any(not torch.equal(first[key], second[key]) for key in first), "something was learnt"


def kept(campaign: Campaign) -> dict[str, bytes]:
    """Everything in a campaign that does not say when and where it was made."""
    names = [name for name in campaign.store.list() if name.endswith((".tar", ".safetensors", "config.json"))]
    return {plain_name(name): campaign.store.read(name) for name in names}


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_ranks_that_share_the_base_move_as_one_process_does(make_campaign: MakeCampaign, tmp_path: Path) -> None:
    """Two gloo processes with a sharded base compute at every iteration what one process computes, and steps that are
    run with it, in the group of the program around them, leave the same bytes."""
    campaign, alone = make_campaign("together"), make_campaign("alone")
    for iteration, rank in ((1, 2), (2, 2), (3, 5)):
        for one in (campaign, alone):
            commit_policy(one, iteration, tmp_path / "files" / Path(one.uri).name, rank=rank, ema=True)
    command = [warm(), "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [str(Path(__file__).with_name("sharded_moves.py")), campaign.uri, str(tmp_path), json.dumps(MOVES)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    for rank in (0, 1):
        outputs = load_file(tmp_path / f"rank{rank}.safetensors")
        for index, (iteration, trainable, delivered) in enumerate(MOVES):
            fresh = policy_at(campaign, iteration, device="cpu", trainable=trainable, delivered=delivered)
            assert torch.equal(outputs[f"{index}"], velocity(fresh)), (rank, iteration, trainable, delivered)
            assert int(outputs[f"{index}.trainable"]) == len(fresh.policy.trainable_parameters())
    evaluate_adapter.run(campaign=alone.uri, iteration=1)
    publish_adapter.run(campaign=alone.uri, iteration=2, publish_as="second")
    generate_rollouts.run(campaign=alone.uri, iteration=4)
    expected, found = kept(alone), kept(campaign)
    assert expected.keys() == found.keys() and len(expected) > 10
    assert [name for name in expected if expected[name] != found[name]] == []


# ---- refused


def test_weights_that_are_not_those_that_were_committed_are_refused(
    make_campaign: MakeCampaign, tmp_path: Path
) -> None:
    campaign = make_campaign()
    commit_policy(campaign, 1, tmp_path)
    name = campaign.policy(1).file("adapter_model.safetensors").name
    data = bytearray(campaign.store.read(name))
    data[-1] ^= 1
    campaign.store.write(name, bytes(data))
    with pytest.raises(LayerloopError, match=r"adapter_model\.safetensors has \d+ bytes of sha256 \w+, its"):
        policy_at(campaign, 1, device="cpu")


@pytest.mark.parametrize("recorded", ["e" * 64, None])
def test_an_adapter_of_another_base_is_refused(
    make_campaign: MakeCampaign, tmp_path: Path, recorded: str | None
) -> None:
    campaign = make_campaign()
    commit_policy(campaign, 1, tmp_path)
    manifest = campaign.policy(1).model_copy(update={"metadata": {"base_fingerprint": recorded} if recorded else {}})
    campaign.store.write(f"{campaign.policy_dir(1)}/{MANIFEST}", manifest.to_json())
    of = recorded[:12] if recorded else "an unknown one"
    for loaded in (None, policy_at(campaign, 0, device="cpu")):
        with pytest.raises(LayerloopError, match=f"the adapter of iteration 1 was trained on {of}: use the model that"):
            policy_at(campaign, 1, device="cpu", loaded=loaded)


def test_a_prompt_of_another_models_width_is_refused(make_campaign: MakeCampaign) -> None:
    campaign = make_campaign()
    prompt = add_file(campaign.store, "sources/prompt.safetensors", save({"prompt_embeds": torch.zeros(7, 24)}))
    sources = campaign.sources().model_copy(update={"files": (prompt,)})
    campaign.store.write(f"sources/{MANIFEST}", sources.to_json())
    with pytest.raises(LayerloopError, match=r"is \(7, 24\), the model takes tokens of width \d+: .* another model"):
        policy_at(campaign, 0, device="cpu")


def test_weights_that_are_not_numbers_are_refused_by_their_place_in_the_campaign(
    make_campaign: MakeCampaign, tmp_path: Path
) -> None:
    campaign = make_campaign()
    folder = commit_policy(campaign, 1, tmp_path)
    state = load_file(folder / "adapter_model.safetensors")
    data = save({key: value * float("nan") for key, value in state.items()})
    file = add_file(campaign.store, f"{campaign.policy_dir(1)}/adapter_model.safetensors", data)
    manifest = campaign.policy(1)
    files = tuple(file if one.base_name == file.base_name else one for one in manifest.files)
    changed = manifest.model_copy(update={"files": files})
    campaign.store.write(f"{campaign.policy_dir(1)}/{MANIFEST}", changed.to_json())
    with pytest.raises(LayerloopError) as raised:
        policy_at(campaign, 1, device="cpu")
    where = f"{campaign.uri}/{file.name}"
    assert str(raised.value).startswith(f"{where} cannot be used as an adapter (adapter_model.safetensors: ")
    assert "NaN or infinite" in str(raised.value) and "/tmp/tmp" not in str(raised.value).replace(where, "")


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.__name__.split(".")[-2])
def test_a_loaded_policy_is_an_argument_of_the_step_and_no_flag_of_its_command(
    step: object, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        step.main(argv=["--help"])  # type: ignore[attr-defined]
    assert "--campaign" in (printed := capsys.readouterr().out) and "loaded" not in printed
    with pytest.raises(SystemExit):
        step.main(argv=["--campaign", "c", "--loaded", "x"])  # type: ignore[attr-defined]
    assert "no option --loaded" in capsys.readouterr().err


def test_the_base_is_loaded_from_a_copy_on_the_node(
    make_campaign: MakeCampaign, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    campaign = make_campaign()
    here = policy_at(campaign, 0, device="cpu")
    monkeypatch.setenv("LAYERLOOP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("layerloop.components.storage.folders._same_disk", lambda one, other: False)
    there = policy_at(campaign, 0, device="cpu")
    assert there.policy.folder is not None and tmp_path / "cache" in there.policy.folder.parents
    assert same(here, there)
    (tmp_path / "full").write_bytes(b"")
    monkeypatch.setenv("LAYERLOOP_CACHE", str(tmp_path / "full"))
    with pytest.raises(LayerloopError, match=r"^recipe\.model\.base is .*: LAYERLOOP_CACHE is .*full, where "):
        policy_at(campaign, 0, device="cpu")


def test_later_steps_load_the_commit_that_the_first_resolved(
    make_campaign: MakeCampaign, random_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the hub's cache lie two commits; `main` has moved on since the campaign's sources were made."""
    repository, first, later = tmp_path / "hub/models--someone--some-model", "1" * 40, "2" * 40
    for commit in (first, later):
        shutil.copytree(random_folder, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(first)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    images = tmp_path / "images"
    images.mkdir()
    for number in range(4):
        pixels = np.random.default_rng(number).integers(0, 256, (32, 48, 3), np.uint8)
        Image.fromarray(pixels).save(images / f"{number}.png")
    recipe = Recipe.model_validate(
        {
            "name": "test", "model": {"base": "someone/some-model", "dtype": "float32"},
            "data": {"resolution": 48, "holdout": 1},
        }
    )  # fmt: skip
    shard_dataset.run(campaign=str(tmp_path / "begun"), recipe=recipe.to_json().decode(), images=str(images))
    campaign = Campaign.open(str(tmp_path / "begun"))
    assert campaign.recipe.model.revision is None
    assert campaign.sources().metadata["base_commit"] == first
    (repository / "refs/main").write_text(later)
    loaded = policy_at(campaign, 0, device="cpu")
    assert loaded.policy.folder is not None and loaded.policy.folder.name == first
    (tmp_path / "begun/sources/manifest.json").unlink()  # an attempt that ended before its manifest
    shard_dataset.run(campaign=str(tmp_path / "begun"), images=str(images))
    assert campaign.sources().metadata["base_commit"] == first  # of the commit that embedded the prompt
    assert "base_commit" not in make_campaign().sources().metadata


def test_a_gpu_with_too_little_memory_is_refused_before_anything_is_loaded(
    make_campaign: MakeCampaign, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (1_000_000_000, 48_000_000_000))
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "NVIDIA L40S")
    monkeypatch.setattr("layerloop.components.policy.at.node_copy", lambda folder, files: pytest.fail("was copied"))
    with pytest.raises(LayerloopError) as caught:
        policy_at(make_campaign(), 0, device=torch.device("cuda", 1), trainable=True)
    assert str(caught.value).startswith("cuda:1 (NVIDIA L40S) has 1.0 of 48.0 GB free, update needs about 1.")
