"""Whether a run has anything to do: the campaign's target, and runs that made no progress."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from layerloop.components.schema.errors import LayerloopError
from layerloop.components.schema.manifest import Manifest
from layerloop.components.schema.recipe import Recipe
from layerloop.components.shard_dataset.run_target import RunTarget, refuse_fleeting
from layerloop.components.shard_dataset.step import choose_recipe, read_recipe, run
from layerloop.components.storage.campaign import MANIFEST, Campaign
from layerloop.components.storage.manifests import commit
from layerloop.components.storage.stores import open_store

RECIPE = "name: mine\nrollout: {groups: 2}\n"


@pytest.fixture
def place(store_uri: str) -> Campaign:
    """A campaign with its sources and no iteration."""
    campaign = Campaign.create_or_open(store_uri, read_recipe(RECIPE)[0])
    sources = Manifest(
        kind="sources", counts={"train": 5}, metadata={"images": "/p", "images_sha256": "", "designs": ""}
    )
    commit(campaign.store, f"{campaign.sources_dir}/{MANIFEST}", sources)
    return campaign


def trained(place: Campaign, iteration: int) -> None:
    commit(place.store, f"{place.policy_dir(iteration)}/{MANIFEST}", Manifest(kind="policy", iteration=iteration))


def evaluated(place: Campaign, iteration: int) -> None:
    folder = place.evaluation_dir(f"iteration-{iteration:06d}")
    commit(place.store, f"{folder}/{MANIFEST}", Manifest(kind="evaluation", iteration=iteration))


def published(place: Campaign, iteration: int) -> None:
    manifest = Manifest(kind="published", iteration=iteration)
    commit(place.store, f"{place.published_dir(f'v{iteration}')}/{MANIFEST}", manifest)


def start(place: Campaign, run_id: str = "run", **options: Any) -> Any:
    """The first step of a run of two iterations; what is left and the policy it hands on."""
    options = {"judge_url": "http://judge:8000/v1", "iterations": 2} | options
    result = run(campaign=place.uri, default_recipe=RECIPE, run_id=run_id, **options)
    return result.parameters["left"], result.manifests["policy"].iteration


@pytest.mark.parametrize(
    ("evaluate", "head", "until", "left"),
    [
        ("end", 0, 0, "everything"),  # no target: the run is its own end
        ("end", 1, 5, "iterations"),
        ("end", 3, 5, "everything"),
        ("end", 4, 5, "everything"),
        ("every-run", 1, 5, "everything"),
        ("never", 1, 5, "everything"),
    ],
)
def test_a_run_evaluates_where_it_reaches_its_target(
    place: Campaign, evaluate: str, head: int, until: int, left: str
) -> None:
    for iteration in range(1, head + 1):
        trained(place, iteration)
    assert start(place, evaluate=evaluate, until=until) == (left, head)


@pytest.mark.parametrize("head", [3, 4])
def test_a_campaign_at_its_target_or_past_it_leaves_nothing_to_do(
    place: Campaign, head: int, capsys: pytest.CaptureFixture[str]
) -> None:
    for iteration in range(1, head + 1):
        trained(place, iteration)
    evaluated(place, 3)
    published(place, 3)
    assert start(place, until=3, images="/other/pictures") == ("nothing", head)
    assert f"has reached its target: iteration {head} of 3. Nothing is left to do" in capsys.readouterr().err


def test_at_the_target_a_run_that_died_before_the_end_is_taken_up(place: Campaign) -> None:
    trained(place, 1)
    assert start(place, until=1) == ("everything", 1)
    evaluated(place, 1)
    assert start(place, until=1) == ("everything", 1)
    published(place, 1)
    assert start(place, until=1) == ("nothing", 1)


def test_without_evaluation_only_the_publication_is_waited_for(place: Campaign) -> None:
    trained(place, 1)
    assert start(place, until=1, evaluate="never") == ("everything", 1)
    published(place, 1)
    assert start(place, until=1, evaluate="never") == ("nothing", 1)


def test_after_so_many_runs_without_progress_no_further_one_begins(place: Campaign) -> None:
    for number in (1, 2):
        start(place, f"run-{number}", max_failures=2)
    with pytest.raises(LayerloopError, match=r"2 runs in a row \(run-1, run-2\) made no progress on") as caught:
        start(place, "run-3", max_failures=2)
    assert "\n" not in str(caught.value)
    assert "start a run with max_failures 0" in str(caught.value)
    assert place.store.list("runs/") == ["runs/run-1.json", "runs/run-2.json"]  # a run that did not begin is none


def test_a_retried_first_step_counts_once(place: Campaign) -> None:
    for _ in range(5):
        start(place, "run-1", max_failures=2)
    start(place, "run-2", max_failures=2)


@pytest.mark.parametrize("progress", ["policy", "rollouts", "scores", "evaluation", "publication"])
def test_any_committed_output_is_progress(place: Campaign, progress: str) -> None:
    trained(place, 1)
    steps: dict[str, Callable[[], Any]] = {
        "policy": lambda: trained(place, 2),
        "rollouts": lambda: commit(
            place.store, f"{place.rollouts_dir(2)}/g000000.json", Manifest(kind="rollouts", iteration=2)
        ),
        "scores": lambda: commit(
            place.store, f"{place.scores_dir(2)}/{MANIFEST}", Manifest(kind="scores", iteration=2)
        ),
        "evaluation": lambda: evaluated(place, 1),
        "publication": lambda: published(place, 1),
    }
    for number in (1, 2):
        start(place, f"run-{number}", max_failures=2)
    steps[progress]()
    start(place, "run-3", max_failures=2)
    start(place, "run-4", max_failures=2)
    with pytest.raises(LayerloopError, match=r"\(run-3, run-4\)"):
        start(place, "run-5", max_failures=2)


def test_the_count_begins_anew_after_a_run_without_a_limit_that_got_on(place: Campaign) -> None:
    for number in (1, 2):
        start(place, f"run-{number}", max_failures=2)
    start(place, "by-hand")
    trained(place, 1)
    start(place, "run-4", max_failures=2)


def test_a_campaign_that_was_put_back_is_not_held_to_what_was_before(place: Campaign) -> None:
    start(place, "run-1", max_failures=1)
    trained(place, 1)
    start(place, "run-2", max_failures=1)
    place.store.delete(f"{place.policy_dir(1)}/{MANIFEST}")  # by a person, to go on from the iteration before
    start(place, "run-3", max_failures=1)


def test_a_first_run_that_fails_before_there_is_a_campaign_counts(store_uri: str) -> None:
    for number in (1, 2):
        with pytest.raises(LayerloopError, match="images is empty"):
            run(campaign=store_uri, recipe="tiny", run_id=f"run-{number}", max_failures=2, judge_url="http://judge/v1")
    with pytest.raises(LayerloopError, match=r"2 runs in a row \(run-1, run-2\).*not begun"):
        run(campaign=store_uri, recipe="tiny", run_id="run-3", max_failures=2, judge_url="http://judge/v1")


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"overrides": {"seed": 99}}, "seed"),
        ({"overrides": {"sead": 1}}, "did you mean 'seed'"),
        ({"recipe": "none"}, "none, which is none of"),
        ({"runtime": "{judge: {concurency: 1}}"}, "did you mean 'concurrency'"),
        ({"images": "/elsewhere"}, "images is /elsewhere but"),
        ({"judge_url": "judge:8000/v1"}, "judge_url is 'judge:8000/v1': give a base URL"),
    ],
)
def test_a_run_that_is_refused_for_whatever_it_is_given_counts(
    place: Campaign, options: dict[str, Any], line: str
) -> None:
    trained(place, 1)
    for number in (1, 2):
        with pytest.raises(LayerloopError, match=line):
            start(place, f"run-{number}", max_failures=2, **options)
    with pytest.raises(LayerloopError, match=r"2 runs in a row \(run-1, run-2\)"):
        start(place, "run-3", max_failures=2, **options)


@pytest.mark.parametrize(
    ("name", "options", "line"),
    [
        ("my best", {}, "publish_as is 'my best': give 1 to 96 letters"),
        ("v2", {}, "already holds the adapter of iteration 2, and this run ends with iteration 4: choose another"),
        ("v2", {"until": 3}, "already holds the adapter of iteration 2, and this run ends with iteration 3"),
    ],
)
def test_a_name_that_cannot_be_published_under_is_refused_before_the_work(
    place: Campaign, name: str, options: dict[str, Any], line: str
) -> None:
    trained(place, 2)
    published(place, 2)
    with pytest.raises(LayerloopError, match=line):
        start(place, publish_as=name, **options)


def test_a_name_that_the_run_would_publish_under_again_or_not_at_all_is_taken(place: Campaign) -> None:
    trained(place, 2)
    published(place, 2)
    assert start(place, publish_as="best") == ("everything", 2)
    assert start(place, publish_as="v2", until=9) == ("iterations", 2)  # a later run of the chain will refuse it
    assert start(place, publish_as="v2", until=2) == ("everything", 2)  # its evaluation is missing


def test_without_a_limit_nothing_is_written(place: Campaign) -> None:
    start(place, until=9)
    assert place.store.list("runs/") == []


@pytest.mark.parametrize("run_id", ["", "{{$.pipeline_job_uuid}}", "../../x"])
def test_a_run_without_an_id_of_kfp_gets_one_of_its_own(run_id: str) -> None:
    options = {"iterations": 1, "evaluate": "end", "until": 0, "max_failures": 0}
    ids = {RunTarget.of(run_id=run_id, **options).run_id for _ in range(2)}  # type: ignore[arg-type]
    assert len(ids) == 2
    assert all(made.startswith("local-") for made in ids)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"until": -1}, "until is -1: give 0 for none, or a positive number"),
        ({"max_failures": -2}, "max_failures is -2: "),
        ({"evaluate": "sometimes"}, "evaluate is 'sometimes': choose one of end, every-run, never, only"),
    ],
)
def test_impossible_options_are_one_line(place: Campaign, options: dict[str, Any], line: str) -> None:
    with pytest.raises(LayerloopError) as caught:
        start(place, **options)
    assert str(caught.value).startswith(line)


# -------------------------------------------------------------------------------------------------- only an evaluation


def test_a_run_that_only_evaluates_takes_the_head_or_an_iteration(place: Campaign) -> None:
    trained(place, 1)
    trained(place, 2)
    for iteration, expected in ((0, 2), (1, 1)):
        result = run(campaign=place.uri, evaluate="only", iteration=iteration)
        assert result.manifests["policy"].iteration == expected
        assert result.parameters == {"left": "everything"}
        assert result.manifests["sources"].counts == {"train": 5}
    with pytest.raises(LayerloopError, match="iteration is 3 but the head of .* is 2: choose 0 for the head"):
        run(campaign=place.uri, evaluate="only", iteration=3)


def test_without_a_policy_there_is_nothing_to_evaluate_and_that_is_no_failure(
    place: Campaign, capsys: pytest.CaptureFixture[str]
) -> None:
    result = run(campaign=place.uri, evaluate="only")
    assert result.parameters == {"left": "nothing"}
    assert "has no policy yet" in capsys.readouterr().err
    place.store.delete(f"{place.sources_dir}/{MANIFEST}")
    assert run(campaign=place.uri, evaluate="only").parameters == {"left": "nothing"}


# ---------------------------------------------------------------------------------------------------------- the recipe


def test_a_run_that_says_nothing_takes_what_was_compiled_in_and_then_the_campaigns(place: Campaign) -> None:
    def chosen(recipe: str = "", default: str = "", **overrides: Any) -> Recipe:
        return choose_recipe(recipe, overrides, default=default, store=place.store)[0]

    assert chosen(default="name: compiled").name == "compiled"
    assert chosen() == place.recipe
    assert chosen("  tiny\n", default="name: compiled").name == "tiny"
    assert (
        chosen(default=RECIPE, rollout={"groups": 3.0}, update={"learning_rate": 1e-3})
        == read_recipe("name: mine\nrollout: {groups: 3}\nupdate: {learning_rate: 0.001}")[0]
    )


def test_another_recipe_than_the_campaigns_is_refused_with_what_differs(place: Campaign) -> None:
    with pytest.raises(LayerloopError, match=r"another recipe \(rollout.groups: 2 -> 5\)"):
        start(place, overrides={"rollout": {"groups": 5.0}})
    start(place, overrides={"rollout": {"groups": 2.0}})


def test_a_new_campaign_without_a_recipe_is_told_the_names(store_uri: str) -> None:
    with pytest.raises(LayerloopError, match="recipe is empty and .* has none yet: name one of paper, tiny"):
        run(campaign=store_uri, images="/p")


@pytest.mark.parametrize(
    ("recipe", "line"),
    [
        ("# a recipe name: x seed: 1 model: base: tiny", "recipe is '# a recipe name: x seed: 1 model: base: '..., "),
        ("papre", "recipe is papre, which is none of paper, tiny, and "),
    ],
)
def test_what_a_form_makes_of_a_recipe_is_refused_with_the_way_to_say_it(recipe: str, line: str) -> None:
    with pytest.raises(LayerloopError) as caught:
        read_recipe(recipe)
    assert str(caught.value).startswith(line)
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------------------------- a pod's folder


def test_in_a_pod_a_folder_of_the_container_is_no_campaign(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    refuse_fleeting("/nowhere/campaign")
    monkeypatch.setenv("KFP_POD_NAME", "pod")
    for uri in ("/nowhere/campaign", " file:///nowhere/campaign"):
        with pytest.raises(LayerloopError, match=r"a folder of this pod, gone with it: give s3://bucket/prefix"):
            refuse_fleeting(uri)
    refuse_fleeting("s3://bucket/prefix")
    refuse_fleeting("/dev/shm/campaign")  # another file system, as a mounted volume is


def test_the_store_tells_runs_apart_by_their_id(place: Campaign) -> None:
    start(place, "a", max_failures=3)
    start(place, "b", max_failures=3)
    assert open_store(place.uri).list("runs/") == ["runs/a.json", "runs/b.json"]
