"""Verification names what is wrong, whatever it is; repair removes and makes again what it may, and nothing else."""

from __future__ import annotations

import json
import re
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from layerloop.components.schema.errors import LayerloopError, UnavailableError
from layerloop.components.schema.manifest import Manifest
from layerloop.components.storage.campaign import MANIFEST, Campaign
from layerloop.components.storage.findings import Findings
from layerloop.components.storage.lease import Timing, hold
from layerloop.components.storage.local import LocalStore
from layerloop.components.storage.manifests import add_file, add_folder, place_files, read_file
from layerloop.components.storage.rollouts import read_groups, rollouts_sha256
from layerloop.components.storage.store import StoreError
from layerloop.components.storage.verification import repair_campaign, verify_campaign
from layerloop.pipelines.cli import main

from ..campaigns import CampaignBuilder, drawn_group

RECIPE = {
    "name": "test", "rollout": {"groups": 2, "group_size": 2}, "judge": {"min_valid": 2},
}  # fmt: skip


def adapters(lab: CampaignBuilder, iteration: int, previous: str | None) -> str:
    """A policy as `update_lora` commits one, of bytes that stand for weights."""
    folder, campaign = lab.campaign.policy_dir(iteration), lab.campaign
    weights = f"weights {iteration}".encode()
    files = add_folder(lab.store, folder, {"adapter_model.safetensors": weights, "learner.json": b"{}"})
    sha256 = files[0].sha256
    metadata = {
        "adapter_sha256": sha256, "previous_adapter_sha256": previous, "base_fingerprint": "0" * 64,
        "scores_sha256": [shard.sha256 for shard in campaign.scores(iteration).shards],
    }  # fmt: skip
    campaign.commit(
        folder,
        Manifest.model_validate({"kind": "policy", "iteration": iteration, "files": files, "metadata": metadata}),
    )
    return sha256


def fill(uri: str) -> CampaignBuilder:
    """Two iterations, a third that is sampled, an evaluation and a publication."""
    lab = CampaignBuilder.begin(uri, RECIPE)
    sha256: str | None = None
    for iteration in (1, 2, 3):
        lab.put([drawn_group(group, iteration=iteration, adapter_sha256=sha256) for group in range(2)])
        if iteration < 3:
            lab.scores(iteration, images=[f"{group:016x}" for group in range(2)], layers=[1, 2])
            sha256 = adapters(lab, iteration, sha256)
    lab.store.write(f"{lab.campaign.scores_dir(3)}/replies/{'a' * 64}.json", b"paid for")
    folder = lab.campaign.evaluation_dir("iteration-000002")
    files = add_folder(lab.store, folder, {"metrics.json": b"{}", "sheets/a.png": b"png"})
    lab.campaign.commit(folder, Manifest(kind="evaluation", iteration=2, files=files))
    folder = lab.campaign.published_dir("best")
    content = {"README.md": b"card", "peft/adapter_model.safetensors": b"weights 2"}
    files = add_folder(lab.store, lab.campaign.publication_dir("best"), content)
    published = lab.campaign.commit(folder, Manifest(kind="published", iteration=2, files=files))
    place_files(lab.store, published, folder)
    return lab


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "campaign"
    fill(str(folder))
    return folder


@pytest.fixture
def campaign(whole: Path, tmp_path: Path) -> Campaign:
    """A copy that a test may damage."""
    return Campaign.open(str(shutil.copytree(whole, tmp_path / "campaign")))


def verified(campaign: Campaign) -> Findings:
    return verify_campaign(campaign, log=lambda line: None)


def test_a_campaign_that_is_whole_is_found_whole(store_uri: str) -> None:
    campaign = fill(store_uri).campaign
    found = verified(campaign)
    assert (found.faults, found.orphans, found.leftovers, found.copies) == ({}, {}, [], [])
    assert found.sound and len(found.manifests) == 6 + 2 + 2 + 2 and found.objects == 6 + 4 + 4 + 4
    assert list(found.lines())[-1].endswith("read: all is what was committed")


def flip(name: Callable[[Campaign], str]) -> Callable[[Campaign], str]:
    """One bit in the middle of an object."""

    def damage(campaign: Campaign) -> str:
        data = bytearray(campaign.store.read(name(campaign)))
        data[len(data) // 2] ^= 1
        campaign.store.write(name(campaign), bytes(data))
        return name(campaign)

    return damage


def recommitted(folder: str, **changes: object) -> Callable[[Campaign], str]:
    """A manifest that contradicts the others, with a right hash of its own."""

    def damage(campaign: Campaign) -> str:
        name = f"{folder}/{MANIFEST}"
        manifest = Manifest.from_json(campaign.store.read(name), where=name)
        metadata = {**manifest.metadata, **changes}
        campaign.store.write(name, manifest.model_copy(update={"metadata": metadata}).to_json())
        return name

    return damage


def deleted(campaign: Campaign) -> str:
    name = campaign.rollouts(1)[1].shards[0].name
    campaign.store.delete(name)
    return name


def other_scores(reward: float = 0.5, **changes: object) -> Callable[[Campaign], str]:
    """Scores of iteration 1 that were committed in the place of the right ones."""

    def damage(campaign: Campaign) -> str:
        folder = campaign.scores_dir(1)
        campaign.store.delete(f"{folder}/{MANIFEST}")
        lab = CampaignBuilder(campaign)
        given = {"images": [f"{group:016x}" for group in range(2)], "layers": [1, 2], **changes}
        lab.scores(1, lambda *_: reward, **given)  # type: ignore[arg-type]
        return f"{folder}/{MANIFEST}"

    return damage


POLICY, SCORES = "iterations/000002/policy", "iterations/000002/scores"


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (flip(lambda c: c.policy(1).files[0].name), "has 9 bytes of sha256"),
        (flip(lambda c: c.rollouts(2)[0].shards[0].name), "its manifest says"),
        (flip(lambda c: c.scores(1).file("scores.parquet").name), "its manifest says"),
        (flip(lambda c: f"{POLICY}/{MANIFEST}"), ""),
        (deleted, "does not exist"),
        (
            recommitted(POLICY, previous_adapter_sha256="1" * 64),
            "continues adapter 111111111111, that of iteration 1",
        ),
        (recommitted(POLICY, adapter_sha256="1" * 64), "says adapter 111111111111 and names one of"),
        (recommitted(POLICY, scores_sha256=["1" * 64]), "was learnt from other scores"),
        (
            recommitted(POLICY, base_fingerprint="1" * 64),
            "is of base 111111111111, the iteration before of 0000",
        ),
        (recommitted(SCORES, rollouts_sha256="1" * 64), "is of rollouts 111111111111, those there are"),
        (recommitted(SCORES, recipe_sha256="1" * 64), "was made with a recipe.json of sha256 111111111111"),
        (other_scores(-5.0), "has reward -5, outside of 0..1, and 3 more"),
        (other_scores(layers=[3, 2]), "is of image 0000000000000000 with 3 layers, its rollout is not"),
        (other_scores(groups=3), "scores i000001-g000002-c00, which was not sampled"),
        (other_scores(groups=1), "i000001-g000001-c00 was sampled and has no score"),
    ],
)
def test_what_is_wrong_is_named(campaign: Campaign, damage: Callable[[Campaign], str], words: str) -> None:
    name = damage(campaign)
    found = verified(campaign)
    assert not found.sound and words in found.faults[name], found.faults
    assert any(line.startswith(f"{name}: ") for line in found.lines())
    assert all("\n" not in line for line in found.lines())


def test_a_policy_that_is_missing_below_the_head_is_named(campaign: Campaign) -> None:
    campaign.store.delete(f"{campaign.policy_dir(1)}/{MANIFEST}")
    assert verified(campaign).faults[campaign.policy_dir(1)] == "is not committed, but that of iteration 2 is"


def test_rollouts_of_another_adapter_are_named(campaign: Campaign) -> None:
    name = f"{campaign.rollouts_dir(3)}/g000000.json"
    manifest = Manifest.from_json(campaign.store.read(name), where=name)
    campaign.store.write(
        name, manifest.model_copy(update={"metadata": {**manifest.metadata, "adapter_sha256": "1" * 64}}).to_json()
    )
    assert "was sampled with adapter 111111111111, that of iteration 2 is" in verified(campaign).faults[name]


def test_repair_removes_what_no_manifest_names_and_keeps_what_was_paid_for(campaign: Campaign) -> None:
    campaign.store.write("notes.txt", b"of a person's own, beside the campaign")
    before = campaign.store.list()
    add_file(campaign.store, f"{campaign.scores_dir(1)}/scores.parquet", b"of an attempt that lost")
    campaign.store.write(f"{campaign.policy_dir(3)}/{'0' * 16}/optimizer.safetensors", b"of a killed attempt")
    left = Path(campaign.uri) / "sources" / ".tmp-train-000000.tar-0123456789ab"
    left.parent.mkdir()
    left.write_bytes(b"half")
    found = verified(campaign)
    assert found.sound and len(found.orphans) == 2 and len(found.leftovers) == 1
    said = list[str]()
    repair_campaign(campaign, log=said.append)
    assert [name for name in campaign.store.list() if not name.startswith("lease/")] == before
    assert not left.exists() and len(said) == 2
    assert verified(campaign).orphans == {}


def test_repair_copies_a_publications_files_again(campaign: Campaign) -> None:
    (Path(campaign.uri) / "published/best/README.md").write_bytes(b"curd")
    found = verified(campaign)
    assert found.copies == ["published/best"] and not found.sound
    repair_campaign(campaign, log=lambda line: None)
    assert (Path(campaign.uri) / "published/best/README.md").read_bytes() == b"card"
    assert verified(campaign).sound


def test_repair_has_the_next_run_make_again_what_it_can_and_leaves_history_alone(campaign: Campaign) -> None:
    in_progress = flip(lambda c: c.committed_groups(3)[1].shards[0].name)(campaign)
    evaluated = flip(lambda c: c.find("evaluations/iteration-000002").files[0].name)(campaign)  # type: ignore[union-attr]
    history = flip(lambda c: c.policy(1).files[0].name)(campaign)
    repair_campaign(campaign, log=lambda line: None)
    assert campaign.sampled_groups(3) == [0], "group 1 is sampled again"
    assert campaign.find("evaluations/iteration-000002") is None
    assert set(verified(campaign).faults) == {history} and campaign.store.exists(history)
    assert in_progress not in verified(campaign).faults and evaluated not in verified(campaign).faults


def test_repair_keeps_what_a_damaged_manifest_may_name(campaign: Campaign) -> None:
    """One bit of a manifest, which a person may restore: the adapter and its optimizer are not to go for it."""
    history = [flip(lambda c: f"{c.policy_dir(1)}/{MANIFEST}"), flip(lambda c: f"{c.published_dir('best')}/{MANIFEST}")]
    again = [
        flip(lambda c: f"{c.rollouts_dir(3)}/g000001.json"),
        flip(lambda c: f"evaluations/iteration-000002/{MANIFEST}"),
    ]
    for damage in history:
        damage(campaign)
    made_again = {damage(campaign) for damage in again}
    before = {name for name in campaign.store.list() if not name.startswith("lease/")}
    assert any("--repair leaves them" in line for line in verified(campaign).lines())
    repair_campaign(campaign, log=lambda line: None)
    assert before - {*campaign.store.list()} == made_again


@pytest.mark.parametrize(
    ("unread", "kind"),
    [
        (r"iterations/000001/policy/manifest\.json", UnavailableError),
        (r".*/replies/.*", StoreError),
        (r".*/g000001-\w+\.tar", UnavailableError),
        (r".*/g000000\.json", StoreError),
    ],
)
def test_a_store_that_fails_damages_nothing(
    campaign: Campaign, unread: str, kind: type[LayerloopError], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Busy for some minutes, or a key that may not be used: what was not read is not what is wrong."""
    opened, before = LocalStore.open, campaign.store.list()

    def refusing(store: LocalStore, name: str) -> object:
        if re.fullmatch(unread, name):
            raise kind("the store is busy")
        return opened(store, name)

    monkeypatch.setattr(LocalStore, "open", refusing)
    for do in (verify_campaign, repair_campaign):
        with pytest.raises(kind, match="busy"):
            do(campaign, log=lambda line: None)
    assert [name for name in campaign.store.list() if not name.startswith("lease/")] == before


def test_repair_waits_for_a_run_that_writes(campaign: Campaign) -> None:
    name = "iterations/000003/rollouts/g000001-0123456789abcdef.tar"
    campaign.store.write(name, b"of a run that is about to commit it")
    with (
        hold(campaign.store, log=pytest.fail, run="another"),
        pytest.raises(LayerloopError, match="is held by run another"),
    ):
        repair_campaign(campaign, log=lambda line: None, timing=Timing(poll=0.1, patience=0.3))
    assert campaign.store.exists(name)


def test_the_command_says_what_is_wrong_and_ends_with_1(campaign: Campaign, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["campaign", "verify", campaign.uri]) == 0
    assert "all is what was committed" in capsys.readouterr().out
    name = flip(lambda c: c.policy(1).files[0].name)(campaign)
    assert main(["campaign", "verify", "--repair", campaign.uri]) == 1
    assert f"{name}: has 9 bytes of sha256" in capsys.readouterr().out
    assert main(["campaign", "lease", campaign.uri]) == 0
    assert f"training of {campaign.uri} is free" in capsys.readouterr().out
    assert main(["campaign", "lease", "--take-over", campaign.uri]) == 0


# ---- a campaign of the version before objects were named by their content, made by that version


@pytest.fixture
def old(tmp_path: Path) -> Campaign:
    """An iteration, its evaluation and publication, and half of the next one's rollouts."""
    with tarfile.open(Path(__file__).with_name("campaign_of_0_1.tar.xz")) as tar:
        tar.extractall(tmp_path, filter="data")
    return Campaign.open(str(tmp_path / "campaign"))


def test_a_campaign_of_an_earlier_version_is_read(old: Campaign) -> None:
    assert (old.head(), old.recipe.seed, old.evaluations(), old.published()) == (1, 3, ["iteration-000001"], ["first"])
    assert [group.record.group for group in read_groups(old.store, old.rollouts(1), layers=True, latents=True)] == [
        0,
        1,
    ]
    assert old.sampled_groups(2) == [0] and len(rollouts_sha256(old.rollouts(1))) == 64
    for name in ("adapter_model.safetensors", "optimizer.safetensors", "learner.json"):
        assert read_file(old.store, old.policy(1).file(name))
    assert json.loads(read_file(old.store, old.find("evaluations/iteration-000001").file("metrics.json")))  # type: ignore[union-attr]
    found = verified(old)
    assert (found.faults, found.copies, found.orphans) == ({}, [], {}) and len(found.manifests) == 8
    repair_campaign(old, log=lambda line: None)
    assert verified(old).sound and verified(old).objects == found.objects


def test_a_campaign_of_an_earlier_version_goes_on(
    old: Campaign, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the steps of this version: the other half of the rollouts, scores and the policy; what was there stays."""
    from layerloop.components.evaluate_adapter.step import run as evaluate
    from layerloop.components.generate_rollouts.step import run as generate
    from layerloop.components.publish_adapter.step import run as publish
    from layerloop.components.update_lora.step import run as update

    from ..campaigns import save_tiny_base

    monkeypatch.chdir(tmp_path)  # the recipe names its base by a relative path
    save_tiny_base(tmp_path / "base")
    before = {name: old.store.read(name) for name in old.store.list()}
    generate(campaign=old.uri)
    assert list(old.rollouts(2)) == [0, 1]
    records = [group.record for group in read_groups(old.store, old.rollouts(2))]
    images, layers = [record.image_key for record in records], [record.layers for record in records]
    CampaignBuilder(old).scores(2, images=images, layers=layers)
    update(campaign=old.uri)
    evaluate(campaign=old.uri)
    publish(campaign=old.uri, publish_as="second")
    assert publish(campaign=old.uri, publish_as="first", iteration=1).parameters["published"].endswith("/first")
    assert {name: old.store.read(name) for name in before} == before
    assert old.head() == 2 and old.published() == ["first", "second"]
    base = [s for s in old.find("evaluations/iteration-000002").shards if "/base/" in s.name]  # type: ignore[union-attr]
    assert [shard.name in before for shard in base] == [True], "the base is not sampled again"
    assert verified(old).faults == {} and verified(old).copies == []
