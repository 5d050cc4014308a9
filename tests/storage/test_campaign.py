from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import JsonValue

from layerloop.components.schema.errors import LayerloopError
from layerloop.components.schema.manifest import Manifest
from layerloop.components.schema.recipe import Recipe, RolloutRecipe
from layerloop.components.storage.campaign import Campaign, exact_cover
from layerloop.components.storage.manifests import commit


def recipe(**changes: object) -> Recipe:
    return Recipe(name="test", rollout=RolloutRecipe(groups=6)).model_copy(update=changes)


def commit_worker(campaign: Campaign, iteration: int, worker: int, workers: int) -> Manifest:
    groups: list[JsonValue] = [g for g in range(campaign.recipe.rollout.groups) if g % workers == worker]
    manifest = Manifest(
        kind="rollouts", iteration=iteration, metadata={"groups": groups, "worker": f"{worker}/{workers}"}
    )
    name = f"{campaign.rollouts_dir(iteration)}/w{worker:02d}of{workers:02d}.json"
    return commit(campaign.store, name, manifest)


def commit_policy(campaign: Campaign, iteration: int) -> Manifest:
    manifest = Manifest(kind="policy", iteration=iteration)
    return commit(campaign.store, f"{campaign.policy_dir(iteration)}/manifest.json", manifest)


def layouts(manifests: list[Manifest]) -> list[object]:
    return [manifest.metadata["worker"] for manifest in manifests]


def test_the_first_recipe_is_frozen(store_uri: str) -> None:
    campaign = Campaign.create_or_open(store_uri, recipe())
    assert campaign.store.read("recipe.json") == recipe().to_json()
    assert Campaign.create_or_open(store_uri, recipe()).recipe == recipe()
    assert Campaign.open(store_uri).recipe == recipe()
    assert campaign.uri == store_uri


def test_another_recipe_is_refused_with_the_fields_that_differ(store_uri: str) -> None:
    Campaign.create_or_open(store_uri, recipe())
    other = recipe(seed=7, rollout=RolloutRecipe(groups=6, group_size=4))
    with pytest.raises(LayerloopError) as caught:
        Campaign.create_or_open(store_uri, other)
    assert str(caught.value) == (
        f"campaign {store_uri} was made with another recipe (rollout.group_size: 8 -> 4; seed: 0 -> 7): "
        "go on with its own, or give another campaign URI"
    )
    assert Campaign.open(store_uri).recipe == recipe()


def test_a_folder_without_a_recipe_is_not_a_campaign(store_uri: str) -> None:
    with pytest.raises(LayerloopError, match=f"campaign {store_uri} has no recipe.json: begin it with shard_dataset"):
        Campaign.open(store_uri)


def test_a_damaged_recipe_is_one_line(store_uri: str) -> None:
    campaign = Campaign.create_or_open(store_uri, recipe())
    campaign.store.write("recipe.json", recipe().to_json()[:50])
    with pytest.raises(LayerloopError, match=r"recipe\.json is not JSON"):
        Campaign.open(store_uri)


def test_the_head_is_the_highest_committed_policy(store_uri: str) -> None:
    campaign = Campaign.create_or_open(store_uri, recipe())
    assert campaign.head() == 0
    assert campaign.policy(0) == Manifest(kind="policy", iteration=0)
    for iteration in (1, 2, 10):
        commit_policy(campaign, iteration)
    commit_worker(campaign, 11, 0, 1)
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


def test_rollouts_of_all_workers_cover_every_group(store_uri: str) -> None:
    campaign = Campaign.create_or_open(store_uri, recipe())
    made = [commit_worker(campaign, 1, worker, 3) for worker in range(3)]
    commit_worker(campaign, 2, 0, 1)
    assert campaign.rollouts(1) == made


def test_missing_groups_are_named(store_uri: str) -> None:
    campaign = Campaign.create_or_open(store_uri, recipe())
    with pytest.raises(
        LayerloopError, match=r"iteration 1 of .* lacks groups 0-5 of 6: run generate_rollouts for every"
    ):
        campaign.rollouts(1)
    commit_worker(campaign, 1, 1, 3)
    with pytest.raises(LayerloopError, match="lacks groups 0, 2-3, 5 of 6"):
        campaign.rollouts(1)


def test_a_complete_layout_is_chosen_among_several(tmp_path: Path) -> None:
    campaign = Campaign.create_or_open(str(tmp_path), recipe())
    for worker in range(3):
        commit_worker(campaign, 1, worker, 3)
    commit_worker(campaign, 1, 0, 2)
    assert layouts(campaign.rollouts(1)) == ["0/3", "1/3", "2/3"]
    commit_worker(campaign, 1, 1, 2)
    assert layouts(campaign.rollouts(1)) == ["0/2", "1/2"]
    assert len(campaign.worker_manifests(1)) == 5


def test_layouts_are_mixed_where_none_is_complete_and_no_group_is_read_twice(tmp_path: Path) -> None:
    campaign = Campaign.create_or_open(str(tmp_path), recipe())
    commit_worker(campaign, 1, 0, 2)  # 0 2 4
    commit_worker(campaign, 1, 1, 6)
    commit_worker(campaign, 1, 3, 6)
    commit_worker(campaign, 1, 2, 6)
    with pytest.raises(LayerloopError, match="lacks groups 5 of 6"):
        campaign.rollouts(1)
    commit_worker(campaign, 1, 5, 6)
    assert layouts(campaign.rollouts(1)) == ["0/2", "1/6", "3/6", "5/6"]


def test_layouts_that_only_cover_by_overlapping_are_refused(tmp_path: Path) -> None:
    campaign = Campaign.create_or_open(str(tmp_path), recipe())
    commit_worker(campaign, 1, 0, 2)  # 0 2 4
    commit_worker(campaign, 1, 1, 3)  # 1 4
    commit_worker(campaign, 1, 0, 3)  # 0 3
    commit_worker(campaign, 1, 2, 3)  # 2 5
    commit_worker(campaign, 1, 1, 2)
    campaign.store.delete(f"{campaign.rollouts_dir(1)}/w01of02.json")
    campaign.store.delete(f"{campaign.rollouts_dir(1)}/w00of03.json")
    commit_worker(campaign, 1, 3, 6)
    with pytest.raises(LayerloopError, match="has overlapping worker layouts"):
        campaign.rollouts(1)


def test_exact_cover_of_many_workers_is_quick_also_when_there_is_none() -> None:
    covers = [frozenset(range(w, 960, n)) for n in (32, 48) for w in range(n)]
    wanted = frozenset(range(960))
    assert exact_cover(covers, wanted) == list(range(32))
    mixed = exact_cover(covers[1:], wanted)  # group 0 is only in a cover of the other layout now
    assert mixed is not None and 31 in mixed
    assert sum(len(covers[1:][index]) for index in mixed) == 960
    assert frozenset().union(*(covers[1:][index] for index in mixed)) == wanted
    assert exact_cover([*covers[1:32], *covers[33:]], wanted) is None
    assert exact_cover([], frozenset()) == []


def test_a_rollouts_manifest_without_groups_is_refused(tmp_path: Path) -> None:
    campaign = Campaign.create_or_open(str(tmp_path), recipe())
    commit(campaign.store, f"{campaign.rollouts_dir(1)}/w00of01.json", Manifest(kind="rollouts", iteration=1))
    with pytest.raises(LayerloopError, match=r"has no metadata\.groups"):
        campaign.rollouts(1)


def test_evaluations_adapters_and_sizes_are_told(store_uri: str) -> None:
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
