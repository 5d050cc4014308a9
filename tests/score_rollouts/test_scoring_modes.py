"""Everything a recipe can ask of the judge, end to end against the reference judge over HTTP."""

from __future__ import annotations

import base64
import io
import json
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from layerloop.components.judge.canaries import make_canaries
from layerloop.components.judge.grids import Layout, cells_of, draw_grid
from layerloop.components.judge.images import encode_image, fitted
from layerloop.components.layers.measure import bad, duplicate
from layerloop.components.reference_judge.answers import QualityCache, answer
from layerloop.components.reference_judge.rules import CRITERIA
from layerloop.components.reference_judge.server import completion
from layerloop.components.schema.errors import LayerloopError
from layerloop.components.schema.judging import ScoreRow
from layerloop.components.score_rollouts.rollouts import Group, read_groups
from layerloop.components.score_rollouts.step import run
from layerloop.components.storage.campaign import Campaign
from layerloop.components.storage.images import decode_png
from layerloop.components.storage.shards import read_shard

MakeCampaign = Callable[..., Campaign]
Change = Callable[[dict[str, Any], int, str], str | None]


def rows_of(campaign: Campaign) -> list[ScoreRow]:
    return [
        ScoreRow.from_json(members["json"], where=key)
        for shard in campaign.scores(1).shards
        for key, members in read_shard(campaign.store, shard)
    ]


@pytest.fixture
def meddling() -> Iterator[Any]:
    """The reference judge with `change(body, number, text)` in between: another text, or None for a 500."""

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        change: Change = staticmethod(lambda body, number, text: text)
        asked = 0
        cache = QualityCache()
        lock = threading.Lock()

        @property
        def url(self) -> str:
            return f"http://127.0.0.1:{self.server_address[1]}/v1"

    class Handler(BaseHTTPRequestHandler):
        server: Server
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.reply(200, {"object": "list", "data": [{"id": "layerloop-reference-judge", "object": "model"}]})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with self.server.lock:
                number = self.server.asked
                self.server.asked += 1
            text, tokens, images = answer(body, self.server.cache)
            changed = self.server.change(body, number, text)
            if changed is None:
                self.reply(500, {"error": {"message": "no"}})
            else:
                self.reply(200, completion(changed, tokens, images))

        def reply(self, status: int, value: Any) -> None:
            data = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = Server(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def in_order(rows: list[ScoreRow]) -> bool:
    """Whether every group's rewards fall from the truth (candidate 0) to the most spoiled."""
    groups = {row.group for row in rows}
    by_group = [[r.reward for r in rows if r.group == g and r.reward is not None] for g in groups]
    return all(len(r) > 1 and r == sorted(r, reverse=True) and r[0] > r[-1] for r in by_group)


@pytest.mark.parametrize(
    "judge",
    [
        {"phase2": {"enabled": False}},
        {"extraction": "expected"},
        {"method": "checklist", "extraction": "expected"},
        {"phase2": {"resolution": 32, "method": "pairwise"}},
        {"phase2": {"resolution": 32, "max_candidates": 3, "overlap": 1, "repeats": 2}},
        {"phase2": {"resolution": 32, "max_megapixels": 0.02}},
        {"aggregation": "log", "observations": True},
        {"samples": 2, "temperature": 0.7},
        {"backdrops": ["white"]},
        {"backdrops": ["white", "checker"]},
        {"canaries": False},
        {"batch": {"enabled": True, "poll_seconds": 0.1, "linger_seconds": 0.5}},
    ],
    ids=lambda judge: "-".join(judge),
)
def test_every_way_of_judging_puts_the_better_first(
    judge: dict[str, Any], make_campaign: MakeCampaign, judge_url: str
) -> None:
    campaign = make_campaign(groups=2, size=4, **judge)
    result = run(campaign=campaign.uri, judge_url=judge_url)
    rows = rows_of(campaign)
    assert len(rows) == 8 and in_order(rows)
    assert all(row.reason is None for row in rows)
    assert ("canary_agreement" in result.metrics) == judge.get("canaries", True)


def test_a_rubric_of_ones_own_needs_the_texts_of_its_methods_before_anything_is_asked(
    make_campaign: MakeCampaign, meddling: Any, tmp_path: Path
) -> None:
    shipped = (resources.files("layerloop.components.judge") / "rubrics" / "default.yaml").read_text()
    mine = tmp_path / "mine.yaml"
    mine.write_text(re.sub(r"\n(pairwise|checklist): \|\n(  .*\n)+", "\n", shipped))
    campaign = make_campaign(groups=1, rubric=str(mine))
    assert len(rows_of_run(campaign, meddling.url)) == 4
    asked = meddling.asked
    for name in campaign.store.list():
        campaign.store.delete(name)
    campaign = make_campaign(groups=1, rubric=str(mine), phase2={"resolution": 32, "method": "pairwise"})
    with pytest.raises(LayerloopError, match="has no text pairwise, which recipe.judge.phase2.method pairwise needs"):
        run(campaign=campaign.uri, judge_url=meddling.url)
    assert meddling.asked == asked


def rows_of_run(campaign: Campaign, url: str) -> list[ScoreRow]:
    run(campaign=campaign.uri, judge_url=url)
    rows = rows_of(campaign)
    assert in_order(rows)
    return rows


def test_canaries_agree_with_the_reference_judge_and_do_not_drift(make_campaign: MakeCampaign, judge_url: str) -> None:
    campaign = make_campaign(resolution=192)  # the canaries' own; at 32 the bad ones look alike
    result = run(campaign=campaign.uri, judge_url=judge_url)
    assert result.metrics["canary_agreement"] == result.metrics["canary_agreement_phase2"] == 1.0
    assert result.metrics["canary_injection_gain"] == 0.0 and result.metrics["canaries_failed"] == 0
    canaries = result.manifests["scores"].metadata["canaries"]
    assert isinstance(canaries, dict) and len(canaries) == 7


def test_a_judge_that_obeys_writing_in_images_is_seen_in_every_iteration(
    make_campaign: MakeCampaign, meddling: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    injected = next(canary for canary in make_canaries() if canary.name == "injected")
    written = encode_image(fitted(injected.source, 32)).url.decode()

    def obey(body: dict[str, Any], number: int, text: str) -> str:
        if written not in json.dumps(body):
            return text
        return json.dumps({"scores": dict.fromkeys(json.loads(text)["scores"], 5)})

    meddling.change = obey
    result = run(campaign=make_campaign(groups=1).uri, judge_url=meddling.url)
    assert result.metrics["canary_injection_gain"] > 0.5 and result.metrics["canary_agreement"] < 1.0
    said = capsys.readouterr()
    assert "the judge obeys text inside images" in said.out + said.err


def test_a_step_that_is_killed_resumes_without_repeating_a_paid_request(
    make_campaign: MakeCampaign, meddling: Any
) -> None:
    campaign = make_campaign(groups=4, size=4, canaries=False, concurrency=2, impatience=0)
    reached = threading.Event()

    def slowly(body: dict[str, Any], number: int, text: str) -> str:
        if number >= 8:  # the rest of the first run hangs
            reached.set()
            hang.wait(60)
        return text

    hang = threading.Event()
    meddling.change = slowly
    command = [sys.executable, "-m", "layerloop.components.score_rollouts"]
    with subprocess.Popen([*command, "--campaign", campaign.uri, "--judge-url", meddling.url]) as step:
        assert reached.wait(120)
        step.send_signal(signal.SIGKILL)
    hang.set()
    stored = [name for name in campaign.store.list(f"{campaign.scores_dir(1)}/replies/") if "/batches/" not in name]
    assert campaign.find(campaign.scores_dir(1)) is None and 6 <= len(stored) <= 8
    meddling.change = lambda body, number, text: text
    result = run(campaign=campaign.uri, judge_url=meddling.url)
    assert result.metrics["judge_cache_hits"] == len(stored)
    assert result.metrics["judge_requests"] == 4 * (4 + 1) - len(stored)
    assert in_order(rows_of(campaign))


def test_a_failed_judgement_is_a_mask_and_the_others_go_on(make_campaign: MakeCampaign, meddling: Any) -> None:
    campaign = make_campaign(groups=2, size=4, retries=0, canaries=False, concurrency=1, give_up_seconds=1e6)
    meddling.change = lambda body, number, text: None if number == 1 else text
    result = run(campaign=campaign.uri, judge_url=meddling.url)
    masked = [row for row in rows_of(campaign) if row.reward is None]
    assert len(masked) == 1 and masked[0].reason is not None and masked[0].reason.startswith("phase1: http_500")
    assert masked[0].phase1 is None and masked[0].phase2 is None
    assert result.metrics["candidates_masked"] == 1 and result.metrics["groups_dropped"] == 0
    assert result.manifests["scores"].metadata["masks"] == {"phase1: http_500": 1}


def test_a_group_without_enough_valid_candidates_is_dropped_whole_and_counted(
    make_campaign: MakeCampaign, meddling: Any
) -> None:
    campaign = make_campaign(
        groups=4, size=3, retries=0, canaries=False, min_valid=3, concurrency=1, give_up_seconds=1e6
    )
    meddling.change = lambda body, number, text: None if number == 0 else text
    result = run(campaign=campaign.uri, judge_url=meddling.url)
    rows = rows_of(campaign)
    dropped = {row.group for row in rows if row.reward is None}
    assert len(dropped) == 1 and result.metrics["groups_dropped"] == 1
    reasons = sorted(row.reason or "" for row in rows if row.group in dropped)
    assert reasons[:2] == ["group: 2 of 3 candidates are valid"] * 2 and reasons[2].startswith("phase1: http_500")


def test_too_many_dropped_groups_fail_the_step_in_one_line(make_campaign: MakeCampaign, meddling: Any) -> None:
    campaign = make_campaign(groups=2, size=3, retries=0, canaries=False, give_up_seconds=1e6)
    meddling.change = lambda body, number, text: "I would rather not say."
    with pytest.raises(LayerloopError, match=r"2 of 2 groups have fewer than 2 valid.*phase1: no_json") as caught:
        run(campaign=campaign.uri, judge_url=meddling.url)
    assert "\n" not in str(caught.value)
    assert campaign.find(campaign.scores_dir(1)) is None


def test_a_judge_that_goes_away_fails_the_step_and_loses_nothing(make_campaign: MakeCampaign, meddling: Any) -> None:
    campaign = make_campaign(groups=2, size=4, retries=3, canaries=False, concurrency=1, give_up_seconds=0.0)
    meddling.change = lambda body, number, text: text if number < 5 else None
    with pytest.raises(LayerloopError, match="run the step again when it is back"):
        run(campaign=campaign.uri, judge_url=meddling.url)
    assert campaign.find(campaign.scores_dir(1)) is None
    meddling.change = lambda body, number, text: text
    result = run(campaign=campaign.uri, judge_url=meddling.url)
    assert result.metrics["judge_cache_hits"] == 5
    assert result.metrics["judge_requests"] == 2 * (4 + 1) - 5
    assert in_order(rows_of(campaign))


def test_a_judge_that_prefers_the_first_row_is_seen(make_campaign: MakeCampaign, meddling: Any) -> None:
    def favour(body: dict[str, Any], number: int, text: str) -> str:
        scores = json.loads(text)["scores"]
        if "candidate_1" in scores:
            for row, label in enumerate(scores):
                scores[label] = {name: max(0.0, 4.5 - row) for name in scores[label]}
        return json.dumps({"scores": scores})

    campaign = make_campaign(groups=4, size=4, canaries=False)
    meddling.change = favour
    biased = run(campaign=campaign.uri, judge_url=meddling.url)
    assert biased.metrics["position_share_beyond_chance"] > 0.9


def test_the_judges_doubt_lowers_the_weight_of_a_group(make_campaign: MakeCampaign, meddling: Any) -> None:
    def waver(body: dict[str, Any], number: int, text: str) -> str:
        scores = json.loads(text)["scores"]
        if "candidate_1" in scores:
            for index, label in enumerate(scores):
                scores[label] = dict.fromkeys(scores[label], 2.5 + 2 * (-1) ** (index + number))
        return json.dumps({"scores": scores})

    campaign = make_campaign(
        groups=1, size=4, canaries=False, uncertainty_weighting=True, phase2={"resolution": 32, "repeats": 4}
    )
    meddling.change = waver
    run(campaign=campaign.uri, judge_url=meddling.url)
    rows = rows_of(campaign)
    assert all(row.weight < 0.9 and row.uncertainty is not None and row.uncertainty > 0.1 for row in rows)


def test_a_steady_judge_gives_full_weight(make_campaign: MakeCampaign, judge_url: str) -> None:
    campaign = make_campaign(groups=1, uncertainty_weighting=True, phase2={"resolution": 32, "repeats": 2})
    run(campaign=campaign.uri, judge_url=judge_url)
    for row in rows_of(campaign):
        assert row.uncertainty is not None and row.uncertainty < 0.01  # it was measured, over the two repeats
        assert 0.99 < row.weight <= 1.0


def test_the_artifact_penalty_is_taken_off_and_shown(make_campaign: MakeCampaign, judge_url: str) -> None:
    def rewards(**judge: Any) -> tuple[list[ScoreRow], list[float]]:
        campaign = make_campaign(groups=2, size=3, canaries=False, **judge)
        run(campaign=campaign.uri, judge_url=judge_url)
        found, shares = rows_of(campaign), []
        for source, stacks in stacks_of(campaign):
            shares += [float((bad(stack) | duplicate(stack, source)).mean()) for stack in stacks]
        for name in campaign.store.list():
            campaign.store.delete(name)
        return found, shares

    (plain, shares), (fined, _) = rewards(), rewards(artifact_penalty=0.6)
    assert 0 in shares and any(share > 0.2 for share in shares)
    assert all(row.penalty == 0 for row in plain)
    assert [row.penalty for row in fined] == pytest.approx([0.6 * share for share in shares])
    for before, after in zip(plain, fined, strict=True):
        assert before.reward is not None and (before.reward > after.penalty or after.reward == 0.0)
        assert after.reward == pytest.approx(max(0.0, before.reward - after.penalty))


# ----------------------------------------------------------------------------------------------- phase 2 as it is sent


def stacks_of(campaign: Campaign) -> list[tuple[np.ndarray, list[np.ndarray]]]:
    """(source, layers of every candidate) of every group, in order."""
    return [(decode_png(group.source)[..., :3], [c.stack() for c in group.candidates]) for group in groups_of(campaign)]


def groups_of(campaign: Campaign) -> list[Group]:
    return sorted(read_groups(campaign, 1), key=lambda group: group.record.group)


def is_phase2(body: dict[str, Any]) -> bool:
    return any(part.get("text", "").startswith("Grid on") for part in body["messages"][1]["content"])


def group_and_order(body: dict[str, Any], campaign: Campaign) -> tuple[int, list[int]]:
    """Which group a phase-2 request shows, and its candidates from the top row down, by the pixels of the cells."""
    parts = body["messages"][1]["content"]
    at = next(i for i, part in enumerate(parts) if part.get("text", "").startswith("Grid on white"))
    found = re.match(r"Grid on white: (\d+) rows, .*; (\d+) columns", parts[at]["text"])
    assert found is not None
    rows, columns = int(found[1]), int(found[2])
    shown = cells(base64.b64decode(parts[at + 1]["image_url"]["url"].partition(",")[2]), rows, columns)
    for group, (_, stacks) in enumerate(stacks_of(campaign)):
        if stacks[0].shape[0] + 1 != columns:
            continue
        drawn = [cells(draw_grid([fitted(s, 32)], "white").png, 1, columns)[0] for s in stacks]
        order = [next((i for i, d in enumerate(drawn) if np.array_equal(d, row)), None) for row in shown]
        if None not in order:
            return group, [index for index in order if index is not None]
    raise AssertionError("the grid shows no group of the campaign")


def cells(png: bytes, rows: int, columns: int) -> np.ndarray:
    pixels = np.asarray(Image.open(io.BytesIO(png)))
    layout = Layout.of_image((pixels.shape[1], pixels.shape[0]), rows, columns)
    assert layout is not None
    return cells_of(pixels, layout)


def test_each_grid_has_its_rows_in_an_order_of_its_own_and_scores_follow_the_candidates(
    make_campaign: MakeCampaign, meddling: Any
) -> None:
    campaign = make_campaign(groups=2, size=5, canaries=False, phase2={"resolution": 32, "repeats": 2})
    orders: list[tuple[int, tuple[int, ...]]] = []

    def by_candidate(body: dict[str, Any], number: int, text: str) -> str:
        if not is_phase2(body):
            return text
        group, order = group_and_order(body, campaign)
        orders.append((group, tuple(order)))
        names = json.loads(text)["scores"]["candidate_1"]
        scores = {f"candidate_{row + 1}": dict.fromkeys(names, 4.5 - c) for row, c in enumerate(order)}
        return json.dumps({"scores": scores})

    meddling.change = by_candidate
    run(campaign=campaign.uri, judge_url=meddling.url)
    assert sorted(group for group, _ in orders) == [0, 0, 1, 1]
    assert len({order for _, order in orders}) == 4 and (0, 1, 2, 3, 4) not in {order for _, order in orders}
    assert all(sorted(order) == [0, 1, 2, 3, 4] for _, order in orders)
    for row in rows_of(campaign):
        assert row.phase2 is not None
        assert list(row.phase2.values()) == pytest.approx([(4.5 - row.candidate) / 5] * 5)


def test_pairs_are_shown_in_both_orders_and_wins_follow_the_candidates(
    make_campaign: MakeCampaign, meddling: Any
) -> None:
    campaign = make_campaign(groups=1, size=5, canaries=False, phase2={"resolution": 32, "method": "pairwise"})
    pairs: list[tuple[int, int]] = []

    def lower_wins(body: dict[str, Any], number: int, text: str) -> str:
        if not is_phase2(body):
            return text
        _, (upper, lower) = group_and_order(body, campaign)
        pairs.append((upper, lower))
        return json.dumps({"better": dict.fromkeys(json.loads(text)["better"], 1 if upper < lower else 2)})

    meddling.change = lower_wins
    run(campaign=campaign.uri, judge_url=meddling.url)
    assert len({frozenset(pair) for pair in pairs}) == len(pairs) == 10
    assert 2 <= sum(upper > lower for upper, lower in pairs) <= 8
    for row in rows_of(campaign):
        assert row.phase2 is not None
        assert list(row.phase2.values()) == pytest.approx([1 - row.candidate / 4] * 5)


def test_the_judge_is_given_the_phase1_scores_of_every_row_in_phase_2(
    make_campaign: MakeCampaign, meddling: Any
) -> None:
    campaign = make_campaign(groups=2, size=4, canaries=False)
    sent: list[dict[str, Any]] = []

    def record(body: dict[str, Any], number: int, text: str) -> str:
        if is_phase2(body):
            sent.append(body)
        return text

    meddling.change = record
    run(campaign=campaign.uri, judge_url=meddling.url)
    phase1 = {(row.group, row.candidate): row.phase1 or {} for row in rows_of(campaign)}
    assert len({tuple(scores.values()) for scores in phase1.values()}) > 2  # so that a wrong row is noticed
    assert len(sent) == 2
    for body in sent:
        group, order = group_and_order(body, campaign)
        lines = body["messages"][1]["content"][-1]["text"].splitlines()
        start = lines.index("First judgements:") + 1
        for row, candidate in enumerate(order):
            scores = ", ".join(f"{name} {5 * phase1[group, candidate][name]:.1f}" for name in CRITERIA)
            assert lines[start + row] == f"candidate {row + 1}: {scores}"


@pytest.mark.parametrize("observations", [False, True])
def test_observations_are_in_the_schema_that_a_strict_judge_is_held_to(
    observations: bool, make_campaign: MakeCampaign, meddling: Any
) -> None:
    sent: list[dict[str, Any]] = []
    meddling.change = lambda body, number, text: sent.append(body) or text
    run(campaign=make_campaign(groups=1, canaries=False, observations=observations).uri, judge_url=meddling.url)
    expected = ["observations", "scores"] if observations else ["scores"]
    assert len(sent) == 4 + 1
    for body in sent:
        schema = body["response_format"]["json_schema"]["schema"]
        assert list(schema["properties"]) == schema["required"] == expected  # before the numbers, so written first
        assert schema["additionalProperties"] is False


def test_prices_give_a_cost(make_campaign: MakeCampaign, judge_url: str) -> None:
    campaign = make_campaign(groups=1, canaries=False, price={"input": 2.0, "output": 10.0})
    metrics = run(campaign=campaign.uri, judge_url=judge_url).metrics
    tokens = 2.0 * metrics["judge_tokens_input"] + 10.0 * metrics["judge_tokens_output"]
    assert metrics["judge_cost"] == pytest.approx(tokens / 1e6) and metrics["judge_cost"] > 0
