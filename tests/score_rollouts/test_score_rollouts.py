"""`score_rollouts` end to end: real shards, the real openai client, the reference judge over HTTP."""

from __future__ import annotations

import json
import random
import re
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow.parquet as pq
import pytest

from layerloop.components.judge.rubric import load_rubric
from layerloop.components.schema.errors import LayerloopError
from layerloop.components.schema.runtime import JudgeRuntime
from layerloop.components.score_rollouts.ahead import Arrivals
from layerloop.components.score_rollouts.step import run
from layerloop.components.storage.campaign import Campaign
from layerloop.components.storage.lease import hold
from layerloop.components.storage.manifests import read_file

from ..campaigns import CampaignBuilder, named, plain_name
from .judges import meddling_judge, rows_of

MakeCampaign = Callable[..., Campaign]


def test_every_candidate_gets_a_row_and_better_ones_get_more(make_campaign: MakeCampaign, judge_url: str) -> None:
    campaign = make_campaign(groups=3, size=4, workers=2)
    result = run(campaign=campaign.uri, judge_url=judge_url)

    rows = rows_of(campaign)
    assert [(r.group, r.candidate) for r in rows] == [(g, c) for g in range(3) for c in range(4)]
    for group in range(3):
        rewards = [r.reward for r in rows if r.group == group]
        assert rewards == sorted(rewards, reverse=True) and rewards[0] > rewards[-1] + 0.3
    assert result.metrics["candidates"] == 12 and result.metrics["candidates_masked"] == 0
    assert result.metrics["judge_requests"] == 3 * (4 + 1) + 7 + 2
    assert result.manifests["scores"].iteration == 1


def test_the_table_holds_the_same_numbers_as_the_shard(make_campaign: MakeCampaign, judge_url: str) -> None:
    campaign = make_campaign(groups=2, size=3)
    manifest = run(campaign=campaign.uri, iteration=1, judge_url=judge_url).manifests["scores"]
    with campaign.store.open(manifest.file("scores.parquet").name) as file:
        table = pq.read_table(file).to_pylist()
    for row, line in zip(rows_of(campaign), table, strict=True):
        assert line["reward"] == row.reward and line["rubric_sha256"] == row.rubric_sha256
        assert line["rubric_version"] == row.rubric_version == "1"
        assert line["prompt_sha256"] == row.prompt_sha256 and len(row.prompt_sha256) == 64
        assert row.phase1 is not None and row.phase2 is not None
        assert line["phase1_alpha_cleanliness"] == row.phase1["alpha_cleanliness"]
        assert line["phase2_content_validity"] == row.phase2["content_validity"]


def test_phase_one_is_whole_numbers_and_phase_two_spreads_what_it_compares(
    make_campaign: MakeCampaign, judge_url: str
) -> None:
    campaign = make_campaign(groups=3, size=6)
    run(campaign=campaign.uri, judge_url=judge_url)
    rows = rows_of(campaign)
    assert all((5 * score).is_integer() for row in rows for score in (row.phase1 or {}).values())
    assert any(not (5 * score).is_integer() for row in rows for score in (row.phase2 or {}).values())
    weights = load_rubric("default").weights
    for row in rows:
        assert row.phase1 is not None and row.phase2 is not None
        assert row.reward == pytest.approx(sum(weights[name] * row.phase2[name] for name in weights))
        assert row.reward_phase1 == pytest.approx(sum(weights[name] * row.phase1[name] for name in weights))


def test_a_second_run_asks_nothing_and_changes_nothing(make_campaign: MakeCampaign, judge_url: str) -> None:
    campaign = make_campaign()
    first = run(campaign=campaign.uri, judge_url=judge_url)
    again = run(campaign=campaign.uri, iteration=1, judge_url="http://127.0.0.1:9/v1")  # nothing listens there
    assert again.manifests == first.manifests and again.metrics == first.metrics


def test_a_step_that_lost_its_output_repeats_no_request(make_campaign: MakeCampaign, judge_url: str) -> None:
    campaign = make_campaign()
    first = run(campaign=campaign.uri, judge_url=judge_url)
    before = rows_of(campaign)
    folder = campaign.scores_dir(1)
    for name in ("manifest.json", "scores.parquet", "000000.tar"):
        campaign.store.delete(named(campaign.store, f"{folder}/{name}"))
    again = run(campaign=campaign.uri, judge_url=judge_url)
    assert again.metrics["judge_requests"] == 0
    assert again.metrics["judge_cache_hits"] == first.metrics["judge_replies"]
    assert [r.reward for r in rows_of(campaign)] == [r.reward for r in before]


def test_two_at_once_with_a_judge_that_never_says_the_same_twice_leave_scores_that_are_whole(
    make_campaign: MakeCampaign,
) -> None:
    """Of one run, so that the lease keeps neither waiting: what either writes has names of its own."""

    def moody(body: dict[str, Any], number: int, text: str) -> str:
        return re.sub(r"\b[0-5](\.\d+)?\b", lambda _: str(random.randint(0, 5)), text)

    campaign = make_campaign()
    with meddling_judge() as judge:
        judge.change = moody  # type: ignore[method-assign]
        with ThreadPoolExecutor(2) as pool:
            results = list(pool.map(lambda _: run(campaign=campaign.uri, iteration=1, judge_url=judge.url), range(2)))
    assert results[0].manifests == results[1].manifests == {"scores": campaign.scores(1)}
    assert len(rows_of(campaign)) == 8 and read_file(campaign.store, campaign.scores(1).file("scores.parquet"))


def test_a_second_run_waits_for_the_one_that_judges_and_asks_nothing(
    make_campaign: MakeCampaign, capsys: pytest.CaptureFixture[str]
) -> None:
    campaign = make_campaign()
    holds, go_on = threading.Event(), threading.Event()

    def first() -> None:
        with hold(campaign.store, log=lambda line: None, run="first"):
            holds.set()
            go_on.wait(60)
            CampaignBuilder(campaign).scores(1)

    thread = threading.Thread(target=first)
    thread.start()
    assert holds.wait(30)
    threading.Timer(1.0, go_on.set).start()
    run(campaign=campaign.uri, iteration=1, judge_url="http://127.0.0.1:9/v1")  # nothing listens there
    thread.join()
    assert f"training of {campaign.uri} is held by run first (" in capsys.readouterr().err


def test_results_do_not_depend_on_workers_or_concurrency(
    make_campaign: MakeCampaign, judge_url: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    one = make_campaign(groups=3, concurrency=1)
    run(campaign=one.uri, judge_url=judge_url)
    rewards = [(r.group, r.candidate, r.reward) for r in rows_of(one)]
    one.store.root.rename(tmp_path_factory.mktemp("old") / "campaign")  # type: ignore[attr-defined]
    many = make_campaign(groups=3, workers=3, concurrency=32)
    run(campaign=many.uri, judge_url=judge_url)
    assert [(r.group, r.candidate, r.reward) for r in rows_of(many)] == rewards


OTHER_RUNTIMES: dict[str, object] = {
    "concurrency": 2, "timeout_seconds": 77.0, "timeout_factor": 0.0, "retries": 1, "start_seconds": 3.0,
    "give_up_seconds": 5.0, "price": {"input": 1.0, "cached_input": 0.5, "output": 2.0},
    "batch": {"enabled": True, "poll_seconds": 0.05, "linger_seconds": 0.2, "max_hours": 1.0, "max_requests": 50,
              "max_megabytes": 3},
}  # fmt: skip


def test_no_value_of_the_judges_runtime_changes_a_score_or_the_name_of_a_reply(
    make_campaign: MakeCampaign, judge_url: str
) -> None:
    """Each is changed in a campaign that was judged with the defaults, whose judgement was lost."""
    assert OTHER_RUNTIMES.keys() == JudgeRuntime.model_fields.keys(), "every key is tried"
    campaign = make_campaign(groups=2, size=3)
    folder, found = campaign.scores_dir(1), {}
    for key, value in {"": None, **OTHER_RUNTIMES}.items():
        run(campaign=campaign.uri, judge_url=judge_url, runtime=json.dumps({"judge": {key: value}} if key else {}))
        files = {
            plain_name(name): campaign.store.read(name)
            for name in campaign.store.list(f"{folder}/")
            if "/batches/" not in name
        }
        scores = {name: files[f"{folder}/{name}"] for name in ("000000.tar", "scores.parquet")}
        found[key] = scores, sorted(name for name in files if "/replies/" in name)
        for name in campaign.store.list(f"{folder}/"):
            campaign.store.delete(name)
    assert len(found[""][1]) == 2 * (3 + 1) + 9, "replies about candidates, groups and canaries"
    for key in OTHER_RUNTIMES:
        assert found[key] == found[""], key


def test_a_judge_that_is_not_there_is_one_clear_line_and_nothing_is_committed(make_campaign: MakeCampaign) -> None:
    campaign = make_campaign()
    refusal = r"http://127\.0\.0\.1:9/v1 does not answer.*layerloop judge serve"
    with pytest.raises(LayerloopError, match=refusal) as caught:
        run(campaign=campaign.uri, judge_url="http://127.0.0.1:9/v1")
    assert "\n" not in str(caught.value)
    assert campaign.find(campaign.scores_dir(1)) is None


def test_no_url_at_all_names_both_places_it_can_come_from(
    make_campaign: MakeCampaign, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    with pytest.raises(LayerloopError, match=r"judge_url is empty and OPENAI_BASE_URL is not set"):
        run(campaign=make_campaign().uri)


def test_another_model_name_is_refused_with_the_names_that_are_served(
    make_campaign: MakeCampaign, judge_url: str
) -> None:
    campaign = make_campaign(model="gpt-nothing")
    with pytest.raises(LayerloopError, match=r"'gpt-nothing', judge .* serves layerloop-reference-judge"):
        run(campaign=campaign.uri, judge_url=judge_url)


def test_the_manifest_says_who_judged_and_by_which_rubric(make_campaign: MakeCampaign, judge_url: str) -> None:
    campaign = make_campaign()
    metadata = run(campaign=campaign.uri, judge_url=judge_url).manifests["scores"].metadata
    assert "not a vision-language model" in str(metadata["judge_version"])
    assert len(str(metadata["rubric_sha256"])) == 64 and metadata["rubric"] == "default"
    json.dumps(metadata)


def test_groups_are_judged_as_they_are_committed(make_campaign: MakeCampaign, judge_url: str) -> None:
    """The second group is committed only when the first is judged; the rows are those of a judge who had both."""
    campaign = make_campaign(canaries=False)
    late = f"{campaign.rollouts_dir(1)}/g000001.json"
    manifest, waited = campaign.store.read(late), []
    run(campaign=campaign.uri, judge_url=judge_url)
    expected = rows_of(campaign)
    for name in (late, *campaign.store.list(f"{campaign.scores_dir(1)}/")):
        campaign.store.delete(name)
    with pytest.raises(LayerloopError, match="lacks groups 1 of 2"):
        run(campaign=campaign.uri, judge_url=judge_url)

    class Looks(Arrivals):
        def wait(self) -> None:
            waited.append(time.monotonic())
            first_is_judged = (
                len(campaign.store.list(f"{campaign.scores_dir(1)}/replies/")) > campaign.recipe.rollout.group_size
            )
            if first_is_judged:
                campaign.store.write(late, manifest)
            assert waited[-1] - waited[0] < 20
            time.sleep(0.05)

    run(Looks(), campaign=campaign.uri, judge_url=judge_url)
    assert waited and rows_of(campaign) == expected
