"""A step before a judge in trouble: what is masked, what fails the step, and what is sent when it is run again."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from layerloop.components.reference_judge.answers import QualityCache, answer
from layerloop.components.reference_judge.server import completion
from layerloop.components.schema.errors import LayerloopError
from layerloop.components.score_rollouts.step import run
from layerloop.components.storage.campaign import Campaign

from .judges import in_order, rows_of

MakeCampaign = Callable[..., Campaign]


class Troubled(ThreadingHTTPServer):
    """The reference judge, but that `trouble(number, body)` may give a status and a body of its own."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.trouble: Callable[[int, dict[str, Any]], tuple[int, Any] | None] = lambda number, body: None
        self.asked = 0
        self.cache, self.lock = QualityCache(), threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class _Handler(BaseHTTPRequestHandler):
    server: Troubled
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.reply(200, {"object": "list", "data": [{"id": "layerloop-reference-judge", "object": "model"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            number = self.server.asked
            self.server.asked += 1
        trouble = self.server.trouble(number, body)
        if trouble is not None:
            self.reply(*trouble)
            return
        text, tokens, images = answer(body, self.server.cache)
        self.reply(200, completion(text, tokens, images))

    def reply(self, status: int, value: Any) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def troubled() -> Iterator[Troubled]:
    server = Troubled()
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_one_403_after_good_answers_masks_one_candidate(make_campaign: MakeCampaign, troubled: Troubled) -> None:
    campaign = make_campaign(groups=6, size=4, canaries=False, concurrency=1)
    flagged = {"error": {"code": 403, "message": "flagged by moderation"}}
    words: list[str] = []  # of the request that is flagged, each time that it comes

    def flag(number: int, body: dict[str, Any]) -> tuple[int, Any] | None:
        what = json.dumps(body["messages"])
        if number == 20 or what in words:
            words.append(what)
            return 403, flagged
        return None

    troubled.trouble = flag
    result = run(campaign=campaign.uri, judge_url=troubled.url)
    masked = [row.reason for row in rows_of(campaign) if row.reward is None]
    assert len(words) == 2 and 1 <= len(masked) <= 4 and all("http_403" in (reason or "") for reason in masked)
    assert result.metrics["groups_dropped"] <= 1


def test_without_credit_nothing_is_committed_and_then_only_the_rest_is_sent(
    make_campaign: MakeCampaign, troubled: Troubled
) -> None:
    campaign = make_campaign(groups=8, size=4, canaries=False, concurrency=1)
    troubled.trouble = lambda number, body: (402, {"error": {"message": "Payment Required"}}) if number >= 28 else None
    with pytest.raises(LayerloopError, match=r"has no credit \(HTTP 402: Payment Required\)") as caught:
        run(campaign=campaign.uri, judge_url=troubled.url)
    assert "\n" not in str(caught.value) and campaign.find(campaign.scores_dir(1)) is None
    troubled.trouble = lambda number, body: None
    result = run(campaign=campaign.uri, judge_url=troubled.url)
    assert result.metrics["judge_cache_hits"] == 28 and result.metrics["judge_requests"] == 8 * (4 + 1) - 28
    assert all(row.reason is None for row in rows_of(campaign)) and in_order(rows_of(campaign))


def test_an_outage_longer_than_all_retries_is_not_committed_as_masks(
    make_campaign: MakeCampaign, troubled: Troubled
) -> None:
    campaign = make_campaign(groups=3, size=4, canaries=False, concurrency=2, retries=1)
    troubled.trouble = lambda number, body: (502, {"error": "bad gateway"}) if 5 <= number < 17 else None
    run(campaign=campaign.uri, judge_url=troubled.url)
    assert all(row.reason is None for row in rows_of(campaign)) and in_order(rows_of(campaign))


def test_a_step_that_fails_for_refusals_shows_their_reason_and_says_what_was_given_up(
    make_campaign: MakeCampaign, troubled: Troubled, capsys: pytest.CaptureFixture[str]
) -> None:
    campaign = make_campaign(groups=2, size=3, canaries=False)
    said = [{"error": {"code": 400, "message": 'Unknown name "{}": Cannot find field.'}}]
    troubled.trouble = lambda number, body: (
        400,
        json.loads(json.dumps(said).replace("{}", "seed" if "seed" in body else "image_url")),
    )
    with pytest.raises(LayerloopError, match=r'phase1: http_400: Unknown name "image_url": Cannot find field'):
        run(campaign=campaign.uri, judge_url=troubled.url)
    lines = [line for line in capsys.readouterr().err.splitlines() if "refuses seed: goes on without" in line]
    assert len(lines) == 1


def test_thought_in_another_field_is_masked_with_what_to_switch(
    make_campaign: MakeCampaign, troubled: Troubled, capsys: pytest.CaptureFixture[str]
) -> None:
    campaign = make_campaign(groups=4, size=4, canaries=False, concurrency=1, redraws=0)

    def thinks(number: int, body: dict[str, Any]) -> tuple[int, Any] | None:
        message = {"role": "assistant", "content": None, "reasoning_content": '{"scores": {}}'}
        return (200, {"choices": [{"finish_reason": "stop", "message": message}]}) if number == 0 else None

    troubled.trouble = thinks
    run(campaign=campaign.uri, judge_url=troubled.url)
    (reason,) = [row.reason for row in rows_of(campaign) if row.reward is None]
    assert reason is not None and reason.startswith("phase1: empty: content is empty, the text is in reasoning_content")
    assert "switch thinking off" in capsys.readouterr().err
