"""`layerloop campaign list | compare | delete`, `layerloop continue`, and targets of local runs."""

from __future__ import annotations

import contextlib
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from layerloop.components.schema.errors import LayerloopError
from layerloop.components.schema.manifest import Manifest
from layerloop.components.schema.recipe import Recipe
from layerloop.components.storage.campaign import Campaign
from layerloop.components.storage.lease import hold
from layerloop.components.storage.manifests import add_file
from layerloop.components.storage.stores import open_store
from layerloop.pipelines.campaigns import compare_text, delete_campaign, list_text
from layerloop.pipelines.cli import main
from layerloop.pipelines.job import Job, iterations_of, job_of_campaign, to_its_end

from ..campaigns import CampaignBuilder

UNTIL = [(2, 0), (3, 0), (3, 2), (2, 5)]  # target, head


def make(folder: Path, *, rate: float = 1e-4, iterations: int = 0) -> CampaignBuilder:
    recipe = Recipe.model_validate({"name": "test", "update": {"learning_rate": rate}, "rollout": {"groups": 2}})
    builder = CampaignBuilder(Campaign.create_or_open(str(folder), recipe))
    builder.sources()
    for iteration in range(1, iterations + 1):
        folder = builder.campaign.policy_dir(iteration)
        file = add_file(builder.store, f"{folder}/weights", b"weights of a policy")
        builder.campaign.commit(folder, Manifest(kind="policy", iteration=iteration, files=(file,)))
    return builder


def test_campaigns_of_a_folder_are_listed(tmp_path: Path) -> None:
    make(tmp_path / "one", iterations=2)
    make(tmp_path / "two")
    (tmp_path / "photos").mkdir()
    rows = [line.split() for line in list_text(str(tmp_path)).splitlines()]
    assert [row[0] for row in rows] == ["campaign", "one", "two"]
    assert [row[3] for row in rows] == ["iteration", "2", "0"]


@pytest.mark.parametrize(
    ("metrics", "row"),
    [
        ({"designs.bad_layers": (0.5, 0.25), "pictures.bad_layers": (2.0, 1.0)}, "0.500 -> 0.250 a design"),
        ({"designs.bad_layers": (None, None), "pictures.bad_layers": (2.0, 1.0)}, "2.000 -> 1.000 a picture"),
        ({"pictures.bad_layers": (2.0, 1.0)}, "2.000 -> 1.000 a picture"),
        ({"designs.bad_layers": (None, None)}, "2"),
    ],
)
def test_the_list_has_the_bad_layers_of_what_was_measured(
    tmp_path: Path, metrics: dict[str, tuple[float | None, float | None]], row: str
) -> None:
    builder = make(tmp_path / "one", iterations=2)
    document = {
        name: {"base": base, "tuned": tuned, "difference": None if tuned is None or base is None else tuned - base}
        for name, (base, tuned) in metrics.items()
    }
    folder = builder.campaign.evaluation_dir("iteration-000002")
    file = add_file(builder.store, f"{folder}/metrics.json", json.dumps(document).encode())
    builder.campaign.commit(folder, Manifest(kind="evaluation", iteration=2, files=(file,)))
    line = list_text(str(tmp_path)).splitlines()[1]
    assert re.sub(r" +[\d.]+ k?B$", "", line).endswith(f" {row}"), line


def test_a_damaged_campaign_does_not_hide_the_others(tmp_path: Path) -> None:
    make(tmp_path / "one")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/recipe.json").write_text("[]")
    assert "one" in list_text(str(tmp_path)) and "broken" in list_text(str(tmp_path))


def test_a_folder_without_campaigns_is_said(tmp_path: Path) -> None:
    with pytest.raises(LayerloopError, match="has no campaign directly in it: give the folder that holds campaigns"):
        list_text(str(tmp_path))


def test_two_campaigns_are_compared_by_recipe_and_head(tmp_path: Path) -> None:
    one, two = make(tmp_path / "one", iterations=1), make(tmp_path / "two", rate=3e-4)
    text = compare_text(one.uri, two.uri)
    assert "update.learning_rate: 0.0001 -> 0.0003" in text
    assert "iteration: A 1, B 0" in text
    assert "recipe: the same" in compare_text(one.uri, one.uri)


def test_deleting_takes_a_yes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    builder = make(tmp_path / "one", iterations=1)
    before = builder.store.sizes()
    assert main(["campaign", "delete", builder.uri]) == 2
    assert "would be deleted for good" in capsys.readouterr().err
    assert builder.store.sizes() == before
    assert main(["campaign", "delete", builder.uri, "--yes"]) == 0
    assert not (tmp_path / "one").exists()


def test_files_that_are_not_the_campaigns_are_kept(tmp_path: Path) -> None:
    builder = make(tmp_path)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/chapter.txt").write_text("years of work")
    (tmp_path / "notes.txt").write_text("mine")
    said: list[str] = []
    delete_campaign(builder.uri, yes=True, log=said.append)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.txt", "thesis"]
    assert "kept 2 files that are not the campaign's" in said[0]


def test_what_is_no_campaign_is_not_deleted(tmp_path: Path) -> None:
    (tmp_path / "sources").mkdir()
    (tmp_path / "sources/photo.jpg").write_text("x")
    with pytest.raises(LayerloopError, match="is no campaign: nothing was deleted"):
        delete_campaign(str(tmp_path), yes=True, log=print)
    assert (tmp_path / "sources/photo.jpg").exists()


def test_a_campaign_that_a_run_works_on_is_not_deleted(tmp_path: Path) -> None:
    builder = make(tmp_path / "one")
    with hold(builder.store, "evaluation", log=lambda _: None), pytest.raises(LayerloopError, match="stop that run"):
        delete_campaign(builder.uri, yes=True, log=print)
    assert builder.store.exists("recipe.json")
    delete_campaign(builder.uri, yes=True, log=print)  # the lease was given back


def test_a_deletion_that_was_cut_short_is_no_whole_campaign_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    builder = make(tmp_path / "one", iterations=1)
    real, deleted = type(builder.store).delete, []

    def delete(store: object, name: str) -> None:
        if len(deleted) == 3:
            raise KeyboardInterrupt
        deleted.append(name)
        real(store, name)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(type(builder.store), "delete", delete)
        with pytest.raises(KeyboardInterrupt):
            delete_campaign(builder.uri, yes=True, log=print)
    assert builder.campaign.head() == 0 and builder.campaign.find("sources") is None
    delete_campaign(builder.uri, yes=True, log=print)
    assert not (tmp_path / "one").exists()


def test_a_campaign_in_a_bucket_is_deleted_and_its_neighbour_kept(s3_bucket: str) -> None:
    for name in ("one", "one-more"):
        Campaign.create_or_open(f"{s3_bucket}/{name}", Recipe(name="test"))
    delete_campaign(f"{s3_bucket}/one", yes=True, log=print)
    assert set(open_store(s3_bucket).sizes()) == {"one-more/recipe.json"}


@pytest.mark.parametrize("until, head", UNTIL)
def test_a_target_leaves_what_the_campaign_lacks(tmp_path: Path, until: int, head: int) -> None:
    if head:
        make(tmp_path / "c", iterations=head)
    assert iterations_of(Job(campaign=str(tmp_path / "c"), images="", recipe="", until=until)) == max(1, until - head)


def test_without_a_target_a_run_has_its_own_number(tmp_path: Path) -> None:
    assert iterations_of(Job(campaign=str(tmp_path), images="", recipe="", iterations=20)) == 20


def test_after_a_run_that_did_not_end_the_same_command_goes_on_to_its_target(tmp_path: Path) -> None:
    job, runs = Job(campaign=str(tmp_path / "c"), images="", recipe="", iterations=3), tmp_path / "runs"
    make(tmp_path / "c", iterations=1)

    def fails(job: Job) -> int:
        with contextlib.suppress(KeyboardInterrupt), to_its_end(job, runs) as meant:
            raise KeyboardInterrupt
        return meant.until

    assert fails(job) == 0, "it has its own number"
    make(tmp_path / "c", iterations=2)
    assert fails(job) == fails(job) == 4, "1 + 3, however often"
    assert fails(replace(job, until=9)) == 9 and fails(replace(job, campaign=str(tmp_path / "other"))) == 0
    with to_its_end(job, runs) as meant:
        assert (meant.until, iterations_of(meant)) == (4, 2)
    with to_its_end(job, runs) as meant:
        assert meant.until == 0, "the one before has ended"
    assert fails(replace(job, iterations=2)) == 0 and fails(replace(job, iterations=5)) == 0, "another command"
    make(tmp_path / "c", iterations=8)
    assert fails(replace(job, iterations=5)) == 0, "another run has gone further"
    for path in runs.iterdir():
        path.write_text("{")
    assert fails(job) == 0


def test_a_campaign_is_continued_with_its_own_recipe_and_images(tmp_path: Path) -> None:
    builder = make(tmp_path / "one", rate=3e-4)
    job = job_of_campaign(builder.uri)
    assert job.images == "" and Recipe.from_json(job.recipe, where="job") == builder.campaign.recipe


def test_only_a_campaign_with_sources_can_be_continued(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["continue", str(tmp_path / "none"), "--judge-url", "http://127.0.0.1:9/v1"]) == 2
    assert "is no campaign" in capsys.readouterr().err
    Campaign.create_or_open(str(tmp_path / "new"), Recipe(name="test"))
    assert main(["continue", str(tmp_path / "new"), "--judge-url", "http://127.0.0.1:9/v1"]) == 2
    assert "has no sources yet" in capsys.readouterr().err
