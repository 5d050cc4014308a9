"""What an endpoint says by its status, and by bodies that say something else: nothing is lost, or taken for more."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from layerloop.components.judge import check as checking
from layerloop.components.judge import serving
from layerloop.components.judge.check import check
from layerloop.components.judge.client import Judge
from layerloop.components.judge.errors import read_error
from layerloop.components.judge.features import EndpointFeatures
from layerloop.components.judge.network import is_direct
from layerloop.components.judge.replies import UnusableError
from layerloop.components.judge.requests import Request
from layerloop.components.judge.transport import read_retry_after
from layerloop.components.schema.errors import LayerloopError, UnavailableError
from layerloop.components.schema.judging import JudgeRecipe

from .conftest import ScriptedJudge, completion, http
from .test_judge_client import settings, variants
from .test_judge_hell import GOOD, READ

FINE = completion({"scores": GOOD})
SMALL = JudgeRecipe(resolution=64, phase2={"resolution": 64})  # type: ignore[arg-type]


def asked(url: str, requests: list[Request], *, check_first: bool = False, **changes: Any) -> list[Any]:
    """Answers or errors, in order."""

    async def all_of_them() -> list[Any]:
        async with Judge(url, *settings(**{"retries": 1, "concurrency": 1} | changes)) as judge:
            if check_first:
                await judge.check_reachable(probe=True)
            return await asyncio.gather(*(judge.ask(request) for request in requests), return_exceptions=True)

    return asyncio.run(all_of_them())


@pytest.mark.parametrize(
    "value",
    [
        "Fri, 1 Jan 99999999999 00:00:00 GMT", "Fri, 99999999999999999999999 Jan 2026 00:00:00 GMT",
        "Wed, 21 Oct 2026 07:28:00 +99999999999999", "Mon, 01 Jan 0001 00:00:00 -0000", "nan", "-1", "", "soon",
    ],
)  # fmt: skip
def test_a_retry_after_that_is_no_time_is_none(value: str) -> None:
    assert read_retry_after({"retry-after": value}) is None


def test_a_date_beyond_all_calendars_ends_no_step(scripted: ScriptedJudge, one: Request) -> None:
    when = "Retry-After: Fri, 1 Jan 99999999999 00:00:00 GMT\r\n"
    busy = http("{}", status="429 Too Many Requests", headers=when)
    scripted.answer = lambda body, number: FINE if number else busy
    [(scores, _)] = asked(scripted.url, [one])
    assert scores == [pytest.approx(READ)]


@pytest.mark.parametrize("status", [424, 498, 499, 529])
def test_a_failure_that_passes_is_sent_again(status: int, scripted: ScriptedJudge, one: Request) -> None:
    failed = http('{"error": {"message": "the operation was cancelled"}}', status=f"{status} Oops")
    scripted.answer = lambda body, number: FINE if number else failed
    [(scores, _)] = asked(scripted.url, [one])
    assert scores == [pytest.approx(READ)] and len(scripted.bodies) == 2


@pytest.mark.parametrize("status", [404, 405, 410])
def test_an_endpoint_that_goes_away_masks_only_a_few(status: int, scripted: ScriptedJudge, one: Request) -> None:
    """A proxy's "default backend - 404" while a judge is replaced is no judgement of anybody's."""
    gone = http("default backend - 404", status=f"{status} Gone")
    scripted.answer = lambda body, number: FINE if number < 2 else gone
    answers = asked(scripted.url, variants(one, 12))
    assert sum(isinstance(answer, UnusableError) for answer in answers) == 7
    assert isinstance(answers[9], UnavailableError)
    assert f"is not there any more (HTTP {status}, 8 times in a row: default backend - 404)" in str(answers[9])


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("<!doctype html><title>Open WebUI</title>", r"has no /chat/completions \(HTTP 200: Open WebUI\)"),
        ('{"error": "Unexpected endpoint or method. (POST /chat/completions)"}', r"\(HTTP 200: Unexpected endpoint"),
        ('{"detail": "Not Found"}', r"has no /chat/completions \(HTTP 200: Not Found\)"),
        ('{"error": {"message": "No auth credentials", "code": 401}}', r"refuses the key \(HTTP 401: No auth cred"),
        ('{"error": {"message": "Insufficient credits", "code": 402}}', r"has no credit \(HTTP 402: Insufficient"),
    ],
)
def test_a_refusal_with_status_200_costs_a_question_and_no_rollouts(
    body: str, said: str, scripted: ScriptedJudge, one: Request
) -> None:
    scripted.answer = http(body)
    with pytest.raises(LayerloopError, match=said):
        asked(scripted.url, [one], check_first=True)
    assert len(scripted.bodies) == 1


@pytest.mark.parametrize("status", ["429 Too Many Requests", "503 Loading", "500 Oops"])
def test_a_model_that_is_not_listed_and_busy_is_not_refused(status: str, scripted: ScriptedJudge, one: Request) -> None:
    busy = http('{"error": "loading the model"}', status=status)
    scripted.answer = lambda body, number: FINE if number else busy
    [(scores, _)] = asked(scripted.url, [one], check_first=True, model="a-deployment")
    assert scores == [pytest.approx(READ)]


def test_a_proxy_that_wants_a_password_is_one_line(scripted: ScriptedJudge, one: Request) -> None:
    scripted.answer = http("who are you?", status="407 Proxy Authentication Required")
    [error] = asked(scripted.url, [one])
    assert isinstance(error, LayerloopError) and "(HTTP 407: who are you?): write its user and password" in str(error)


def test_a_query_of_the_url_is_sent_behind_the_path(scripted: ScriptedJudge, one: Request) -> None:
    """Azure's `?api-version=...`, and gateways that take their key so."""
    scripted.answer = FINE
    [(scores, _)] = asked(f"{scripted.url}/?api-version=2024-10-21&b=", [one], check_first=True)
    assert scores == [pytest.approx(READ)]
    assert all("POST /v1/chat/completions?api-version=2024-10-21&b= HTTP" in head for head in scripted.headers)


@pytest.mark.parametrize(
    "url", ["http://0.0.0.0:8000/v1", "http://[::]:8000/v1", "http://[::1]:8000", "http://localhost"]
)
def test_a_judge_of_this_machine_is_called_without_a_proxy(url: str) -> None:
    assert is_direct(url)


POLICY = {
    "error": {"code": "content_filter", "message": "The response was filtered by our content management policy."}
}  # fmt: skip


@pytest.mark.parametrize("error", [POLICY, {"code": "1301", "message": "可能包含不安全或敏感内容"}])
def test_a_first_request_that_is_moderated_costs_no_feature(error: Any, scripted: ScriptedJudge, one: Request) -> None:
    flagged = http(json.dumps(error), status="400 Bad Request")
    scripted.answer = lambda body, number: FINE if number else flagged
    answers = asked(scripted.url, variants(one, 2))
    assert getattr(answers[0], "reason", "") == "http_400" and not isinstance(answers[1], BaseException)
    assert {"seed", "temperature", "max_tokens"} <= scripted.bodies[-1].keys()
    assert scripted.bodies[-1]["response_format"]["type"] == "json_schema" and len(scripted.bodies) == 2


@pytest.mark.parametrize(
    "message",
    ["JSON output is not supported by this model", "It has no structured generation", "no strict mode"],
)
def test_a_format_that_is_refused_in_other_words_is_given_up(message: str) -> None:
    features = EndpointFeatures().without(message)
    assert features is not None and features.response_format == "json_object"


@pytest.mark.parametrize(
    "error",
    [
        {"error": {"message": "Your account is in arrears", "code": "Arrearage"}},
        {"error": {"message": "please check", "type": "exceeded_current_quota_error"}},
        {"error": {"code": "1113", "message": "余额不足,请充值"}},
    ],
)
def test_an_account_that_is_empty_stops_the_step_in_whatever_words(
    error: Any, scripted: ScriptedJudge, one: Request
) -> None:
    scripted.answer = http(json.dumps(error), status="429 Too Many Requests")
    [found] = asked(scripted.url, [one])
    assert isinstance(found, UnavailableError) and "has no credit (HTTP 429: " in str(found)


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (b'{"Message": "User is not authorized"}', "User is not authorized"),
        (b'{"fault": {"faultstring": "Rate limit quota violation"}}', "Rate limit quota violation"),
        (b'{"errorMessage": "bad seed", "request_id": "x"}', "bad seed"),
        (b'{"errors": "seed is unknown"}', "seed is unknown"),
        (b'{"errors": {"seed": ["Unknown field."]}}', "seed: Unknown field."),
        (b'{"detail": [{"loc": ["body", "seed"], "type": "extra_forbidden"}]}', "body.seed: extra_forbidden"),
        (b"[400] Unknown parameter seed", "400; Unknown parameter seed"),
        (b'Error: {"a": 1} unknown field seed', "Error; unknown field seed"),
        (b'\xef\xbb\xbf{"error": {"message": "x"}}', "x"),
        (b'{"error": {"message": {"text": "deep"}}}', "deep"),
        (b'{"status": "error", "data": "unknown seed"}', "status error; data unknown seed"),
    ],
)
def test_the_endpoints_own_words_are_found_under_any_key(body: bytes, text: str) -> None:
    assert read_error(body) == text


def test_check_waits_for_a_busy_judge_and_finds_what_it_finds_without(
    scripted: ScriptedJudge, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every other request is too much for it."""
    monkeypatch.setattr(checking, "IMAGE_COUNTS", (4, 8))
    busy = http('{"error": "slow down"}', status="429 Too Many Requests", headers="Retry-After: 0.001\r\n")
    scripted.answer = lambda body, number: busy if number % 2 else FINE
    report = check(scripted.url, recipe=SMALL, designs=1)
    assert report.json_schema and report.json_object and report.images_per_request == 8
    assert report.thinking == "off (3 answers)" and "not known" not in report.prefix_caching


def test_check_says_once_why_nothing_is_known_of_an_endpoint_that_takes_four_images(scripted: ScriptedJudge) -> None:
    limit = http('{"error": {"message": "At most 4 image(s) may be provided"}}', status="400 Bad Request")

    def answer(body: dict[str, Any], number: int) -> bytes:
        return limit if json.dumps(body["messages"]).count('"image_url": {') > 4 else FINE

    scripted.answer = answer
    report = check(scripted.url, recipe=SMALL, designs=1)
    why = "http_400: At most 4 image(s) may be provided"
    assert (
        report.verdict == "unfit"
        and report.images_per_request == 4
        and not any("thinking" in p for p in report.problems)
    )
    assert f"it answers no request of 5 images ({why})" in report.problems
    lines = report.lines()
    assert "JSON schema           not known: no answer came" in lines
    assert [line for line in lines if line.endswith(f"perfect-0, unfilled-0: {why}")] and len(lines) < 25
    assert not any("JSON schema:" in problem for problem in report.problems)


def test_check_draws_no_conclusion_from_a_judge_that_is_only_busy(
    scripted: ScriptedJudge, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving, "LONGEST_WAIT", 0.01)
    scripted.answer = http('{"error": "Loading model"}', status="503 Service Unavailable")
    with pytest.raises(UnavailableError, match=r"is busy \(http_503: Loading model\): check it again later"):
        check(scripted.url, recipe=SMALL, designs=1)
