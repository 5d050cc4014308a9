"""Whether a run has anything to do: the campaign's target, and runs without progress."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from layerloop.components.schema.errors import LayerloopError
from layerloop.components.schema.manifest import Manifest
from layerloop.components.schema.recipe import Recipe, parse_recipe
from layerloop.components.shard_dataset.recipe_choice import choose_recipe, read_recipe
from layerloop.components.shard_dataset.run_target import RunTarget, refuse_ephemeral_folder
from layerloop.components.shard_dataset.step import run
from layerloop.components.storage.campaign import MANIFEST, Campaign
from layerloop.components.storage.manifests import commit
from layerloop.components.storage.stores import open_store

from ..campaigns import CampaignBuilder, drawn_group

RECIPE = "name: mine\nrollout: {groups: 2}\n"


@pytest.fixture
def campaign(store_uri: str) -> Campaign:
    """A campaign with its sources and no iteration."""
    campaign = Campaign.create_or_open(store_uri, parse_recipe(RECIPE))
    sources = Manifest(
        kind="sources", counts={"train": 5}, metadata={"images": "/p", "images_sha256": "", "designs": ""}
    )
    commit(campaign.store, f"{campaign.sources_dir}/{MANIFEST}", sources)
    return campaign


def trained(campaign: Campaign, iteration: int) -> None:
    commit(campaign.store, f"{campaign.policy_dir(iteration)}/{MANIFEST}", Manifest(kind="policy", iteration=iteration))


def evaluated(campaign: Campaign, iteration: int) -> None:
    folder = campaign.evaluation_dir(f"iteration-{iteration:06d}")
    commit(campaign.store, f"{folder}/{MANIFEST}", Manifest(kind="evaluation", iteration=iteration))


def published(campaign: Campaign, iteration: int) -> None:
    manifest = Manifest(kind="published", iteration=iteration)
    commit(campaign.store, f"{campaign.published_dir(f'v{iteration}')}/{MANIFEST}", manifest)


def start(campaign: Campaign, run_id: str = "run", **options: Any) -> Any:
    """The first step of a run of two iterations; what is left and the policy it hands on."""
    options = {"judge_url": "http://judge:8000/v1", "iterations": 2} | options
    result = run(campaign=campaign.uri, default_recipe=RECIPE, run_id=run_id, **options)
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
    campaign: Campaign, evaluate: str, head: int, until: int, left: str
) -> None:
    for iteration in range(1, head + 1):
        trained(campaign, iteration)
    assert start(campaign, evaluate=evaluate, until=until) == (left, head)


@pytest.mark.parametrize("head", [3, 4])
def test_a_campaign_at_its_target_or_past_it_leaves_nothing_to_do(
    campaign: Campaign, head: int, capsys: pytest.CaptureFixture[str]
) -> None:
    for iteration in range(1, head + 1):
        trained(campaign, iteration)
    evaluated(campaign, 3)
    published(campaign, 3)
    assert start(campaign, until=3, images="/other/pictures") == ("nothing", head)
    assert f"has reached its target: iteration {head} of 3; nothing is left to do" in capsys.readouterr().err


def test_at_the_target_a_run_that_died_before_the_end_is_continued(campaign: Campaign) -> None:
    trained(campaign, 1)
    assert start(campaign, until=1) == ("everything", 1)
    evaluated(campaign, 1)
    assert start(campaign, until=1) == ("everything", 1)
    published(campaign, 1)
    assert start(campaign, until=1) == ("nothing", 1)


def test_without_evaluation_only_the_publication_is_waited_for(campaign: Campaign) -> None:
    trained(campaign, 1)
    assert start(campaign, until=1, evaluate="never") == ("everything", 1)
    published(campaign, 1)
    assert start(campaign, until=1, evaluate="never") == ("nothing", 1)


def test_after_so_many_runs_without_progress_no_further_one_starts(campaign: Campaign) -> None:
    for number in (1, 2):
        start(campaign, f"run-{number}", max_failures=2)
    with pytest.raises(LayerloopError, match=r"2 runs in a row \(run-1, run-2\) made no progress on") as caught:
        start(campaign, "run-3", max_failures=2)
    assert "\n" not in str(caught.value)
    assert "start a run with max_failures 0" in str(caught.value)
    assert campaign.store.list("runs/") == ["runs/run-1.json", "runs/run-2.json"]  # a run that did not start has none


def test_a_retried_first_step_counts_once(campaign: Campaign) -> None:
    for _ in range(5):
        start(campaign, "run-1", max_failures=2)
    for _ in range(3):  # one run before it, and itself
        start(campaign, "run-2", max_failures=2)


@pytest.mark.parametrize("progress", ["policy", "rollouts", "scores", "evaluation", "publication"])
def test_any_committed_output_is_progress(campaign: Campaign, progress: str) -> None:
    trained(campaign, 1)
    steps: dict[str, Callable[[], Any]] = {
        "policy": lambda: trained(campaign, 2),
        "rollouts": lambda: CampaignBuilder(campaign).put([drawn_group(0, iteration=2)]),
        "scores": lambda: commit(
            campaign.store, f"{campaign.scores_dir(2)}/{MANIFEST}", Manifest(kind="scores", iteration=2)
        ),
        "evaluation": lambda: evaluated(campaign, 1),
        "publication": lambda: published(campaign, 1),
    }
    for number in (1, 2):
        start(campaign, f"run-{number}", max_failures=2)
    steps[progress]()
    start(campaign, "run-3", max_failures=2)
    start(campaign, "run-4", max_failures=2)
    with pytest.raises(LayerloopError, match=r"\(run-3, run-4\)"):
        start(campaign, "run-5", max_failures=2)


def test_the_count_starts_again_after_a_run_without_a_limit_that_got_on(campaign: Campaign) -> None:
    for number in (1, 2):
        start(campaign, f"run-{number}", max_failures=2)
    start(campaign, "by-hand")
    trained(campaign, 1)
    start(campaign, "run-4", max_failures=2)


def test_a_campaign_that_was_put_back_is_not_held_to_what_was_before(campaign: Campaign) -> None:
    start(campaign, "run-1", max_failures=1)
    trained(campaign, 1)
    start(campaign, "run-2", max_failures=1)
    campaign.store.delete(f"{campaign.policy_dir(1)}/{MANIFEST}")  # by a person, to continue from the iteration before
    start(campaign, "run-3", max_failures=1)


def test_a_first_run_that_fails_before_there_is_a_campaign_counts(store_uri: str) -> None:
    for number in (1, 2):
        with pytest.raises(LayerloopError, match="images is empty"):
            run(campaign=store_uri, recipe="tiny", run_id=f"run-{number}", max_failures=2, judge_url="http://judge/v1")
    with pytest.raises(LayerloopError, match=r"2 runs in a row \(run-1, run-2\).*not started"):
        run(campaign=store_uri, recipe="tiny", run_id="run-3", max_failures=2, judge_url="http://judge/v1")


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"overrides": {"seed": 99}}, "seed"),
        ({"overrides": {"sead": 1}}, "did you mean 'seed'"),
        ({"recipe": "none"}, "none, which is not one of"),
        ({"runtime": "{judge: {concurency: 1}}"}, "did you mean 'concurrency'"),
        ({"images": "/elsewhere"}, "images is /elsewhere but"),
        ({"judge_url": "judge:8000/v1"}, "judge_url is 'judge:8000/v1': give a base URL"),
    ],
)
def test_a_run_that_is_refused_for_whatever_it_is_given_counts(
    campaign: Campaign, options: dict[str, Any], line: str
) -> None:
    trained(campaign, 1)
    for number in (1, 2):
        with pytest.raises(LayerloopError, match=line):
            start(campaign, f"run-{number}", max_failures=2, **options)
    with pytest.raises(LayerloopError, match=r"2 runs in a row \(run-1, run-2\)"):
        start(campaign, "run-3", max_failures=2, **options)


@pytest.mark.parametrize(
    ("name", "options", "line"),
    [
        ("my best", {}, "publish_as is 'my best': give 1 to 96 letters"),
        ("v2", {}, "already holds the adapter of iteration 2, and this run ends with iteration 4: choose another"),
        ("v2", {"until": 3}, "already holds the adapter of iteration 2, and this run ends with iteration 3"),
    ],
)
def test_a_name_that_cannot_be_published_under_is_refused_before_the_work(
    campaign: Campaign, name: str, options: dict[str, Any], line: str
) -> None:
    trained(campaign, 2)
    published(campaign, 2)
    with pytest.raises(LayerloopError, match=line):
        start(campaign, publish_as=name, **options)


def test_a_name_that_the_run_would_publish_under_again_or_not_at_all_is_taken(campaign: Campaign) -> None:
    trained(campaign, 2)
    published(campaign, 2)
    assert start(campaign, publish_as="best") == ("everything", 2)
    assert start(campaign, publish_as="v2", until=9) == ("iterations", 2)  # a later run of the chain will refuse it
    assert start(campaign, publish_as="v2", until=2) == ("everything", 2)  # its evaluation is missing


def test_without_a_limit_nothing_is_written(campaign: Campaign) -> None:
    start(campaign, until=9)
    assert campaign.store.list("runs/") == []


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
def test_impossible_options_are_one_line(campaign: Campaign, options: dict[str, Any], line: str) -> None:
    with pytest.raises(LayerloopError) as caught:
        start(campaign, **options)
    assert str(caught.value).startswith(line)


# -------------------------------------------------------------------------------------------------- only an evaluation


def test_a_run_that_only_evaluates_takes_the_head_or_an_iteration(campaign: Campaign) -> None:
    trained(campaign, 1)
    trained(campaign, 2)
    for iteration, expected in ((0, 2), (1, 1)):
        result = run(campaign=campaign.uri, evaluate="only", iteration=iteration)
        assert result.manifests["policy"].iteration == expected
        assert result.parameters == {"left": "everything"}
        assert result.manifests["sources"].counts == {"train": 5}
    with pytest.raises(LayerloopError, match="iteration is 3 but the head of .* is 2: choose 0 for the head"):
        run(campaign=campaign.uri, evaluate="only", iteration=3)


def test_without_a_policy_there_is_nothing_to_evaluate_and_that_is_no_failure(
    campaign: Campaign, capsys: pytest.CaptureFixture[str]
) -> None:
    result = run(campaign=campaign.uri, evaluate="only")
    assert result.parameters == {"left": "nothing"}
    assert "has no policy yet" in capsys.readouterr().err
    campaign.store.delete(f"{campaign.sources_dir}/{MANIFEST}")
    assert run(campaign=campaign.uri, evaluate="only").parameters == {"left": "nothing"}


# ---------------------------------------------------------------------------------------------------------- the recipe


def test_a_run_that_says_nothing_takes_what_was_compiled_in_and_then_the_campaigns(campaign: Campaign) -> None:
    def chosen(recipe: str = "", default: str = "", **overrides: Any) -> Recipe:
        return choose_recipe(recipe, overrides, default=default, store=campaign.store)[0]

    assert chosen(default="name: compiled").name == "compiled"
    assert chosen() == campaign.recipe
    assert chosen("  tiny\n", default="name: compiled").name == "tiny"
    assert chosen(default=RECIPE, rollout={"groups": 3.0}, update={"learning_rate": 1e-3}) == parse_recipe(
        "name: mine\nrollout: {groups: 3}\nupdate: {learning_rate: 0.001}"
    )


def test_another_recipe_than_the_campaigns_is_refused_with_what_differs(campaign: Campaign) -> None:
    with pytest.raises(LayerloopError, match=r"another recipe \(rollout.groups: 2 -> 5\)"):
        start(campaign, overrides={"rollout": {"groups": 5.0}})
    start(campaign, overrides={"rollout": {"groups": 2.0}})


def test_a_new_campaign_without_a_recipe_lists_the_names(store_uri: str) -> None:
    with pytest.raises(
        LayerloopError, match="recipe is empty and .* has none yet: name one of demo, paper, paper-exact"
    ):
        run(campaign=store_uri, images="/p")


@pytest.mark.parametrize(
    ("recipe", "line"),
    [
        ("# a recipe name: x seed: 1 model: base: tiny", "recipe is '# a recipe name: x seed: 1 model: base: '..., "),
        ("papre", "recipe is papre, which is not one of demo, paper, paper-exact, tiny, and "),
    ],
)
def test_what_a_form_makes_of_a_recipe_is_refused_with_the_way_to_say_it(recipe: str, line: str) -> None:
    with pytest.raises(LayerloopError) as caught:
        read_recipe(recipe)
    assert str(caught.value).startswith(line)
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------------------------- a pod's folder


def test_in_a_pod_a_folder_of_the_container_is_not_a_campaign(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    refuse_ephemeral_folder("/nowhere/campaign")
    monkeypatch.setenv("KFP_POD_NAME", "pod")
    for uri in ("/nowhere/campaign", " file:///nowhere/campaign"):
        with pytest.raises(LayerloopError, match=r"a folder of this pod, gone with it: give s3://bucket/prefix"):
            refuse_ephemeral_folder(uri)
    refuse_ephemeral_folder("s3://bucket/prefix")
    refuse_ephemeral_folder("/dev/shm/campaign")  # another file system, as a mounted volume is


def test_the_store_keeps_runs_apart_by_their_id(campaign: Campaign) -> None:
    start(campaign, "a", max_failures=3)
    start(campaign, "b", max_failures=3)
    assert open_store(campaign.uri).list("runs/") == ["runs/a.json", "runs/b.json"]
