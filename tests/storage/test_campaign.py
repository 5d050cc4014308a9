from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest

from layerloop.components.schema.errors import LayerloopError
from layerloop.components.schema.manifest import Manifest
from layerloop.components.schema.recipe import Recipe, RolloutRecipe, parse_recipe
from layerloop.components.schema.record import seal
from layerloop.components.schema.runtime import Runtime
from layerloop.components.storage.campaign import MANIFEST, Campaign, _folder_name, check_free, check_publication_name
from layerloop.components.storage.manifests import add_file, commit
from layerloop.components.storage.stores import open_store

from ..campaigns import CampaignBuilder, drawn_group


def recipe(**changes: object) -> Recipe:
    return Recipe(name="test", rollout=RolloutRecipe(groups=6)).model_copy(update=changes)


def commit_groups(campaign: Campaign, iteration: int, groups: Iterable[int]) -> None:
    CampaignBuilder(campaign).put([drawn_group(group, iteration=iteration) for group in groups])


def commit_policy(campaign: Campaign, iteration: int) -> Manifest:
    manifest = Manifest(kind="policy", iteration=iteration)
    return commit(campaign.store, f"{campaign.policy_dir(iteration)}/manifest.json", manifest)


def test_the_first_recipe_is_frozen(store_uri: str) -> None:
    campaign = Campaign.create_or_open(store_uri, recipe())
    assert campaign.store.read("recipe.json") == seal(recipe().to_json())
    assert Campaign.create_or_open(store_uri, recipe()).recipe == recipe()
    assert Campaign.open(store_uri).recipe == recipe()
    assert campaign.uri == store_uri


def test_a_changed_recipe_shows(store_uri: str) -> None:
    campaign = Campaign.create_or_open(store_uri, recipe(seed=3))
    data = campaign.store.read("recipe.json")
    assert parse_recipe(data) == recipe(seed=3), "another campaign may begin with it"
    campaign.store.write("recipe.json", data.replace(b'"seed": 3', b'"seed": 2'))
    with pytest.raises(LayerloopError, match=r"recipe\.json has content of sha256 .* and says .*: it was changed"):
        Campaign.open(store_uri)


def test_an_output_of_another_recipe_is_refused(store_uri: str) -> None:
    """Someone replaced the recipe by another that is whole."""
    campaign = Campaign.create_or_open(store_uri, recipe(seed=3))
    campaign.commit(campaign.policy_dir(1), Manifest(kind="policy", iteration=1))
    assert campaign.policy(1).metadata == {"recipe_sha256": campaign.recipe_sha256}
    campaign.store.write("recipe.json", seal(recipe(seed=2).to_json()))
    with pytest.raises(LayerloopError, match=r"policy/manifest\.json was made with a recipe\.json of sha256 .*, it is"):
        Campaign.open(store_uri).policy(1)


@pytest.mark.parametrize(("kind", "iteration"), [("scores", 1), ("policy", 2)])
def test_an_output_in_the_place_of_another_is_refused(tmp_path: Path, kind: str, iteration: int) -> None:
    campaign = Campaign.create_or_open(str(tmp_path), recipe())
    commit(
        campaign.store,
        f"{campaign.policy_dir(1)}/{MANIFEST}",
        Manifest.model_validate({"kind": kind, "iteration": iteration}),
    )
    with pytest.raises(LayerloopError, match=f"is of {kind} {iteration}, not of policy 1: restore the right one"):
        campaign.policy(1)


def test_a_step_that_begins_finds_what_is_committed_and_says_so_once_it_has_verified_it(store_uri: str) -> None:
    campaign, said = Campaign.create_or_open(store_uri, recipe()), list[str]()
    store, folder = campaign.store, campaign.scores_dir(1)
    assert campaign.already_committed(folder, log=said.append) is None and said == []
    file = add_file(store, f"{folder}/scores.parquet", b"1")
    manifest = campaign.commit(folder, Manifest(kind="scores", iteration=1, files=(file,)))
    assert campaign.already_committed(folder, log=said.append) == manifest
    assert said == [f"{store.uri}/{folder} is complete already"]
    store.delete(file.name)
    with pytest.raises(LayerloopError, match=r"scores-\w+\.parquet is missing but a scores manifest names it"):
        campaign.already_committed(folder, log=said.append)
    assert len(said) == 1


def test_another_recipe_is_refused_with_the_fields_that_differ(store_uri: str) -> None:
    Campaign.create_or_open(store_uri, recipe())
    other = recipe(seed=7, rollout=RolloutRecipe(groups=6, group_size=4))
    with pytest.raises(LayerloopError) as caught:
        Campaign.create_or_open(store_uri, other)
    assert str(caught.value) == (
        f"campaign {store_uri} was made with another recipe (rollout.group_size: 8 -> 4; seed: 0 -> 7): "
        "continue with its own, or give another campaign URI"
    )
    assert Campaign.open(store_uri).recipe == recipe()


def test_a_folder_without_a_recipe_is_not_a_campaign(store_uri: str) -> None:
    with pytest.raises(LayerloopError, match=f"^{store_uri} is no campaign, for it has no recipe.json: begin one with"):
        Campaign.open(store_uri)


@pytest.mark.parametrize("name", ["photo.png", "photos/a.png", "two words/x"])
def test_a_campaign_does_not_begin_where_something_else_lies(store_uri: str, name: str) -> None:
    store = open_store(store_uri)
    store.write(name, b"1")
    for begin in (lambda: Campaign.create_or_open(store_uri, recipe()), lambda: check_free(store)):
        with pytest.raises(LayerloopError) as caught:
            begin()
        assert str(caught.value) == (
            f"{store_uri} holds {name.split('/')[0]!r}, which is not of a campaign: give an empty folder, or a new one "
            "below"
        )
    assert store.list() == [name]
    Campaign.create_or_open(f"{store_uri}/campaign", recipe())
    with pytest.raises(LayerloopError, match="holds .*, which is not of a campaign"):
        Campaign.create_or_open(store_uri, recipe())


def test_a_campaign_begins_beside_what_is_nothing_and_goes_on_beside_anything(tmp_path: Path) -> None:
    for name in ("lost+found/x", ".DS_Store", "runs/20260101-0000.json", "lease/train/000001.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    Campaign.create_or_open(str(tmp_path), recipe())
    (tmp_path / "notes.txt").write_text("mine")
    assert Campaign.create_or_open(str(tmp_path), recipe()).head() == 0


def test_a_damaged_recipe_is_one_line(store_uri: str) -> None:
    campaign = Campaign.create_or_open(store_uri, recipe())
    campaign.store.write("recipe.json", recipe().to_json()[:50])
    with pytest.raises(LayerloopError, match=r"recipe\.json is not JSON"):
        Campaign.open(store_uri)


def test_a_step_works_on_the_iteration_it_is_given_or_on_the_one_after_the_head(store_uri: str) -> None:
    campaign = Campaign.create_or_open(store_uri, recipe())
    assert campaign.open_iteration(None) == 1
    commit_policy(campaign, 1)
    assert (campaign.open_iteration(None), campaign.open_iteration(1)) == (2, 1)
    with pytest.raises(LayerloopError, match=r"^iteration is 0: iterations count from 1$"):
        campaign.open_iteration(0)


def test_the_head_is_the_highest_committed_policy(store_uri: str) -> None:
    campaign = Campaign.create_or_open(store_uri, recipe())
    assert campaign.head() == 0
    assert campaign.policy(0) == Manifest(kind="policy", iteration=0)
    for iteration in (1, 2, 10):
        commit_policy(campaign, iteration)
    commit_groups(campaign, 11, range(6))
    campaign.store.write("iterations/000011/policy/adapter_model.safetensors", b"half an output")
    assert campaign.head() == 10
    assert campaign.iterations() == [1, 2, 10, 11]
    assert campaign.policy(10) == Manifest(kind="policy", iteration=10)
    with pytest.raises(LayerloopError, match="iterations/000011/policy is not committed: run update_lora first"):
        campaign.policy(11)


def test_sources_and_scores_that_are_not_committed_name_the_step_to_run(store_uri: str) -> None:
    campaign = Campaign.create_or_open(store_uri, recipe())
    with pytest.raises(LayerloopError, match="/sources is not committed: run shard_dataset first"):
        campaign.sources()
    with pytest.raises(LayerloopError, match="/iterations/000003/scores is not committed: run score_rollouts first"):
        campaign.scores(3)
    assert campaign.find(campaign.scores_dir(3)) is None


def test_an_iteration_is_complete_when_every_group_is_committed(store_uri: str) -> None:
    campaign = Campaign.create_or_open(store_uri, recipe())
    assert campaign.committed_groups(1) == {} and campaign.sampled_groups(1) == []
    with pytest.raises(
        LayerloopError, match=r"iteration 1 of .* lacks groups 0-5 of 6: run generate_rollouts for every"
    ):
        campaign.rollouts(1)
    commit_groups(campaign, 1, [1, 4])
    with pytest.raises(LayerloopError, match="lacks groups 0, 2-3, 5 of 6"):
        campaign.rollouts(1)
    assert campaign.sampled_groups(1) == [1, 4] == list(campaign.committed_groups(1))
    assert list(campaign.committed_groups(1, [0, 4])) == [4]
    commit_groups(campaign, 1, [5, 3, 0, 2])
    commit_groups(campaign, 2, [0])
    rollouts = campaign.rollouts(1)
    assert list(rollouts) == list(range(6))
    assert [manifest.metadata["groups"] for manifest in rollouts.values()] == [[group] for group in range(6)]


def test_groups_beyond_the_recipe_are_not_part_of_an_iteration(tmp_path: Path) -> None:
    campaign = Campaign.create_or_open(str(tmp_path), recipe())
    commit_groups(campaign, 1, range(8))
    assert list(campaign.rollouts(1)) == list(range(6))


def test_evaluations_adapters_and_sizes_are_listed(store_uri: str) -> None:
    campaign = Campaign.create_or_open(store_uri, recipe())
    for folder, name in (("evaluations", "iteration-000001"), ("published", "my-adapter")):
        manifest = Manifest(kind="evaluation" if folder == "evaluations" else "published", iteration=1)
        commit(campaign.store, f"{folder}/{name}/manifest.json", manifest)
    campaign.store.write("evaluations/iteration-000002/report.html", b"not committed")
    assert campaign.evaluations() == ["iteration-000001"]
    assert campaign.published() == ["my-adapter"]
    assert campaign.bytes_under("evaluations/iteration-000002") == 13
    assert campaign.bytes_under() == sum(campaign.store.sizes().values()) > 13
    assert campaign.evaluation_dir("a") == "evaluations/a"
    assert campaign.published_dir("a") == "published/a"


@pytest.mark.parametrize(
    "folder, name",
    [
        ("photos/mine", "mine"), ("demo/campaign", "demo"), ("my photos, 2026", "my-photos-2026"),
        ("..x..", "x"), ("x" * 120, "x" * 80), ("d/Campaigns/campaign", "d"),
    ],
)  # fmt: skip
def test_a_publication_is_called_by_the_campaigns_folder(tmp_path: Path, folder: str, name: str) -> None:
    campaign = Campaign.create_or_open(str(tmp_path / folder), Recipe(name="paper"))
    assert campaign.publication_name(12) == f"{name}-000012"
    check_publication_name(campaign.publication_name(12))


def test_a_bucket_without_a_prefix_gives_its_name() -> None:
    assert Campaign(open_store("s3://layers"), Recipe(name="paper"), Runtime()).uri == "s3://layers"
    assert _folder_name("s3://layers") == "layers" and _folder_name("s3://b/u/campaign") == "u"
    assert _folder_name("/campaign") == ""
