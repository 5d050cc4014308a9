"""The client against scripted judges over real HTTP: congestion, retries, the breaker, endpoint features, the store."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from layerloop.components.judge.client import NO_KEY, Judge, ReplyMemory
from layerloop.components.judge.images import candidate_images, encode_image
from layerloop.components.judge.methods import rubric
from layerloop.components.judge.replies import UnusableError
from layerloop.components.judge.requests import Request
from layerloop.components.judge.rubric import load_rubric
from layerloop.components.layers.stack import composite
from layerloop.components.schema.errors import LayerloopError
from layerloop.components.schema.judging import JudgeRecipe
from layerloop.components.schema.runtime import JudgeRuntime, split_runtime

Say = Callable[..., bytes]


@pytest.fixture
def good(one: Request, say: Say) -> bytes:
    return say({"scores": dict.fromkeys(one.names, 4)})


def settings(**changes: Any) -> tuple[JudgeRecipe, JudgeRuntime]:
    """Recipe and runtime of a judge, each with its own of `changes`."""
    recipe, runtime = split_runtime(
        {"judge": {"model": "scripted", "timeout_seconds": 20, "timeout_factor": 0} | changes}
    )
    return JudgeRecipe.model_validate(recipe.get("judge", {})), JudgeRuntime.model_validate(runtime["judge"])


def variants(request: Request, count: int) -> list[Request]:
    """Requests that differ, so that none is answered from the store."""
    return [replace(request, system=f"{request.system} {index}") for index in range(count)]


async def ask_all(judge: Judge, requests: list[Request]) -> list[Any]:
    async with judge:
        return await asyncio.gather(*(judge.ask(request) for request in requests), return_exceptions=True)


def test_never_more_requests_in_flight_than_the_runtime_allows(scripted: Any, one: Request, good: bytes) -> None:
    scripted.answer, scripted.seconds = good, 0.2
    answers = asyncio.run(ask_all(Judge(scripted.url, *settings(concurrency=3)), variants(one, 15)))
    assert all(scores == [dict.fromkeys(one.names, 0.8)] for scores, _ in answers)
    assert scripted.most_in_flight == 3


def test_a_failed_attempt_is_asked_again_and_the_slot_is_free_meanwhile(
    scripted: Any, one: Request, good: bytes, respond: Say
) -> None:
    scripted.answer = lambda body, number: good if number != 0 else respond("{}", status="500 Oops")
    judge = Judge(scripted.url, *settings(concurrency=1))
    answers = asyncio.run(ask_all(judge, variants(one, 2)))
    assert [scores[0]["alpha_cleanliness"] for scores, _ in answers] == [0.8, 0.8]
    systems = [body["messages"][0]["content"][-1] for body in scripted.bodies]
    assert systems == ["0", "1", "0"]  # the second request went ahead while the first was waiting to try again
    assert judge.statistics.failures == {"http_500": 1}


def test_retries_end_in_a_mask_with_the_reason(scripted: Any, one: Request, respond: Say) -> None:
    scripted.answer = respond("{}", status="500 Oops")
    answers = asyncio.run(ask_all(Judge(scripted.url, *settings(retries=2, give_up_seconds=1e6)), [one]))
    assert isinstance(answers[0], UnusableError) and answers[0].reason == "http_500"
    assert len(scripted.bodies) == 3


def test_an_unusable_answer_is_asked_again_with_another_seed_and_some_temperature(
    scripted: Any, one: Request, good: bytes, say: Say
) -> None:
    scripted.answer = lambda body, number: good if number == 2 else say("no idea")
    judge = Judge(scripted.url, *settings())
    answers = asyncio.run(ask_all(judge, [one]))
    assert answers[0][0] == [dict.fromkeys(one.names, 0.8)]
    assert len({body["seed"] for body in scripted.bodies}) == 3
    assert [body["temperature"] for body in scripted.bodies] == [0.0, 0.4, 0.4]
    assert judge.statistics.invalid_retries == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, {"refusal": "I cannot judge this."}), ("I'm sorry, I cannot evaluate this image.", {})],
    ids=["in-its-field", "in-words"],
)
def test_a_refusal_is_not_asked_again(
    scripted: Any, one: Request, say: Say, content: str | None, message: dict[str, Any]
) -> None:
    scripted.answer = say(content, **message)
    judge = Judge(scripted.url, *settings())
    answers = asyncio.run(ask_all(judge, [one]))
    assert answers[0].reason == "refused" and len(scripted.bodies) == 1
    assert judge.statistics.tokens_out == 10  # a refusal is paid too


def test_the_limit_comes_to_rest_on_what_the_judge_takes(
    scripted: Any, one: Request, good: bytes, respond: Say
) -> None:
    busy = respond("{}", status="429 Too Many Requests", headers="Retry-After: 0.05\r\n")

    def answer(body: Any, number: int) -> bytes:
        if scripted.in_flight > 4:
            return busy
        time.sleep(0.05)
        return good

    scripted.answer = answer
    judge = Judge(scripted.url, *settings(concurrency=32, retries=20, give_up_seconds=1e6))
    answers = asyncio.run(ask_all(judge, variants(one, 80)))
    assert all(not isinstance(a, BaseException) for a in answers)
    assert judge.limiter.lowest <= 12 and judge.limiter.limit < 32  # it takes 4, and 32 were tried at first
    assert judge.statistics.rate_limited < 80  # most requests were accepted at the first attempt


def test_retry_after_is_obeyed_by_everyone(scripted: Any, one: Request, good: bytes, respond: Say) -> None:
    times: list[float] = []

    def answer(body: Any, number: int) -> bytes:
        times.append(time.monotonic())
        return good if number else respond("{}", status="503 Busy", headers="Retry-After: 0.7\r\n")

    scripted.answer = answer
    asyncio.run(ask_all(Judge(scripted.url, *settings(concurrency=1)), variants(one, 3)))
    assert len(times) == 4 and times[1] - times[0] >= 0.7


def test_the_breaker_opens_when_the_judge_is_gone_and_says_what_to_do(scripted: Any, one: Request, good: bytes) -> None:
    scripted.answer = lambda body, number: good if number < 3 else b""
    judge = Judge(scripted.url, *settings(concurrency=2, retries=6, give_up_seconds=0.2))
    answers = asyncio.run(ask_all(judge, variants(one, 30)))
    gone = [a for a in answers if isinstance(a, LayerloopError)]
    assert gone and f"judge {scripted.url} failed" in str(gone[0]) and "run the step again" in str(gone[0])
    assert "\n" not in str(gone[0])
    assert len(scripted.bodies) < 150  # of 30 * 7 attempts


def test_masks_alone_do_not_open_the_breaker(scripted: Any, one: Request, say: Say) -> None:
    scripted.answer = say("no idea")
    answers = asyncio.run(ask_all(Judge(scripted.url, *settings(concurrency=4, give_up_seconds=0)), variants(one, 20)))
    assert all(isinstance(a, UnusableError) and a.reason == "no_json" for a in answers)


def test_a_request_that_hangs_is_given_up_after_a_multiple_of_what_is_usual(
    scripted: Any, one: Request, good: bytes
) -> None:
    def answer(body: Any, number: int) -> bytes:
        time.sleep(100.0 if number == 30 else 0.1)
        return good

    scripted.answer = answer
    judge = Judge(scripted.url, *settings(concurrency=2, timeout_factor=3.0, timeout_seconds=100))
    start = time.monotonic()
    answers = asyncio.run(ask_all(judge, variants(one, 40)))
    assert all(not isinstance(a, BaseException) for a in answers)
    assert judge.statistics.given_up >= 1 and time.monotonic() - start < 60


@pytest.mark.parametrize(
    ("complaint", "gone"),
    [
        ("Unknown parameter: 'response_format.json_schema' is not supported", "json_schema"),
        ("This model does not support 'seed'", "seed"),
        ("'temperature' does not support 0, only the default (1) is supported", "temperature"),
        ("Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead.", "max_tokens"),
    ],
)
def test_what_the_endpoint_does_not_know_is_given_up(
    complaint: str, gone: str, scripted: Any, one: Request, good: bytes, respond: Say
) -> None:
    def answer(body: Any, number: int) -> bytes:
        if f'"{gone}"' in json.dumps({k: v for k, v in body.items() if k != "messages"}):
            return respond(json.dumps({"error": {"message": complaint}}), status="400 Bad Request")
        return good

    scripted.answer = answer
    judge = Judge(scripted.url, *settings(retries=0, concurrency=2))
    answers = asyncio.run(ask_all(judge, variants(one, 6)))
    assert all(not isinstance(a, BaseException) for a in answers)
    assert len(scripted.bodies) <= 6 + 2  # at most the two in flight learned it the hard way


def test_a_server_without_any_response_format_is_asked_in_words(
    scripted: Any, one: Request, good: bytes, respond: Say
) -> None:
    def answer(body: Any, number: int) -> bytes:
        if "response_format" in body:
            return respond('{"error": {"message": "response_format is not supported"}}', status="400 Bad Request")
        assert "Answer with one JSON object of this form" in body["messages"][1]["content"][-1]["text"]
        return good

    scripted.answer = answer
    answers = asyncio.run(ask_all(Judge(scripted.url, *settings(retries=0)), [one]))
    assert answers[0][0] == [dict.fromkeys(one.names, 0.8)]
    assert [body.get("response_format", {}).get("type") for body in scripted.bodies] == [
        "json_schema",
        "json_object",
        None,
    ]


def test_a_refusal_without_a_reason_is_taken_for_one_of_the_schema_until_something_was_answered(
    scripted: Any, one: Request, good: bytes, respond: Say
) -> None:
    def answer(body: Any, number: int) -> bytes:
        schema = body.get("response_format", {}).get("type") == "json_schema"
        return respond("Bad Request", status="400 Bad Request") if schema or number == 3 else good

    scripted.answer = answer
    judge = Judge(scripted.url, *settings(retries=0, concurrency=1))
    answers = asyncio.run(ask_all(judge, variants(one, 3)))
    assert [isinstance(a, UnusableError) for a in answers] == [False, False, True]  # number 3: its own fault
    assert judge.features.response_format == "json_object"


def test_the_words_and_the_source_come_first_so_that_a_group_shares_its_prefix(
    scripted: Any, truth: Any, good: bytes
) -> None:
    """What a server with prefix caching keeps: the same bytes up to the first image of the candidate's own."""
    source, words = encode_image(composite(truth)), load_rubric("default")
    worse = truth.copy()
    worse[:, ..., :3] //= 2
    shown = [candidate_images(stack, ("white",)) for stack in (truth, worse)]
    requests = [rubric.request(words, source, images, JudgeRecipe(), label="x") for images in shown]
    scripted.answer = good
    asyncio.run(ask_all(Judge(scripted.url, *settings(concurrency=1)), requests))
    first, second = (body["messages"] for body in scripted.bodies)
    assert first[0] == second[0] and first[1]["content"][:3] == second[1]["content"][:3]
    kinds = [part["type"] for part in first[1]["content"][:4]]
    assert kinds == ["text", "image_url", "text", "image_url"]
    assert first[1]["content"][3] != second[1]["content"][3]


def test_a_wrong_key_stops_everything_at_once(scripted: Any, one: Request, respond: Say) -> None:
    scripted.answer = respond('{"error": {"message": "bad key sk-123"}}', status="401 Unauthorized")
    answers = asyncio.run(ask_all(Judge(scripted.url, *settings(), api_key="sk-secret"), [one]))
    assert isinstance(answers[0], LayerloopError) and "set OPENAI_API_KEY" in str(answers[0])
    assert "sk-secret" not in str(answers[0]) and len(scripted.bodies) == 1


def test_the_key_comes_from_the_environment_or_is_a_dummy(
    scripted: Any, one: Request, good: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted.answer = good
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    asyncio.run(ask_all(Judge(scripted.url, *settings()), [one]))
    monkeypatch.setenv("OPENAI_API_KEY", "sk-from-environment")
    asyncio.run(ask_all(Judge(scripted.url, *settings()), [one]))
    assert f"Bearer {NO_KEY}" in scripted.headers[0] and "Bearer sk-from-environment" in scripted.headers[1]


def test_what_was_answered_is_never_asked_again_even_if_it_was_unusable(
    scripted: Any, one: Request, good: bytes, say: Say
) -> None:
    replies = ReplyMemory()
    scripted.answer = lambda body, number: say("no idea") if number == 0 else good
    first = asyncio.run(ask_all(Judge(scripted.url, *settings(), replies=replies), [one]))
    scripted.answer = b""  # from now on the judge is gone
    judge = Judge(scripted.url, *settings(), replies=replies)
    again = asyncio.run(ask_all(judge, [one]))
    assert again[0][0] == first[0][0] and len(scripted.bodies) == 2
    assert judge.statistics.sent == 0 and judge.statistics.cache_hits == 2
    assert judge.statistics.tokens_in == 200  # what the iteration cost, whichever run paid it


@pytest.mark.parametrize(
    ("message", "reason", "asked"),
    [({"refusal": "I must decline."}, "refused", 1), ({"content": ""}, "empty", 3)],
    ids=["refusal", "empty"],
)
def test_a_paid_answer_without_scores_is_stored_too(
    scripted: Any, one: Request, say: Say, message: dict[str, Any], reason: str, asked: int
) -> None:
    """It is stored, since it was paid, and not recalled for ever: the next attempt of the step asks again, as often as
    the first and under other keys, for what is wrong with a judge passes. This attempt does not."""
    replies = ReplyMemory()
    scripted.answer = say("", **message)

    async def twice(judge: Judge) -> list[Any]:
        async with judge:
            return [await asyncio.gather(judge.ask(one), return_exceptions=True) for _ in range(2)]

    for attempt in (1, 2, 3):
        for [error] in asyncio.run(twice(Judge(scripted.url, *settings(retries=2), replies=replies))):
            assert isinstance(error, UnusableError) and error.reason == reason
        assert len(scripted.bodies) == len(replies) == attempt * asked
    assert len({body["seed"] for body in scripted.bodies}) == 3 * asked


def test_no_more_replies_are_paid_and_not_stored_yet_than_may_be_in_flight(
    scripted: Any, one: Request, good: bytes
) -> None:
    """A kill loses those, and they are paid again."""
    unstored: list[int] = []

    class Slow(ReplyMemory):
        def put(self, key: str, data: bytes) -> bytes:
            time.sleep(0.05)
            unstored.append(len(scripted.bodies) - len(self))
            return super().put(key, data)

    scripted.answer = good
    asyncio.run(ask_all(Judge(scripted.url, *settings(concurrency=2), replies=Slow()), variants(one, 10)))
    assert len(unstored) == 10 and max(unstored) <= 2


def test_of_two_runs_that_ask_at_once_both_judge_by_the_reply_that_was_stored_first(
    scripted: Any, one: Request, good: bytes, say: Say
) -> None:
    theirs = say({"scores": dict.fromkeys(one.names, 1)}).partition(b"\r\n\r\n")[2]

    class Overtaken(ReplyMemory):
        def put(self, key: str, data: bytes) -> bytes:
            self.setdefault(key, theirs)  # of the other run, between our look and now
            return super().put(key, data)

    replies = Overtaken()
    scripted.answer = good
    [(scores, _)] = asyncio.run(ask_all(Judge(scripted.url, *settings(), replies=replies), [one]))
    assert scores == [dict.fromkeys(one.names, 0.2)] and list(replies.values()) == [theirs]


def test_an_interrupted_round_of_redraws_goes_on_where_it_was(
    scripted: Any, one: Request, good: bytes, say: Say
) -> None:
    replies = ReplyMemory()
    scripted.answer = lambda body, number: say("no idea") if number < 2 else b""
    judge = Judge(scripted.url, *settings(redraws=4, retries=0, give_up_seconds=1e6), replies=replies)
    [error] = asyncio.run(ask_all(judge, [one]))
    assert isinstance(error, UnusableError) and len(replies) == 2
    scripted.answer = say("no idea")
    asyncio.run(ask_all(Judge(scripted.url, *settings(redraws=4), replies=replies), [one]))
    assert len(replies) == 5  # as many as an uninterrupted run draws


def test_a_request_that_was_refused_is_sent_again_as_often_as_its_caller_allows(
    scripted: Any, one: Request, good: bytes, respond: Say
) -> None:
    flagged = respond('{"error": {"message": "flagged by moderation"}}', status="403 Forbidden")
    scripted.answer = lambda body, number: flagged if number == 1 else good
    judge = Judge(scripted.url, *settings(), replies=ReplyMemory())

    async def twice() -> None:
        async with judge:
            await judge.ask(one, sample=0)
            await judge.ask(one, sample=1, refusals=1)

    asyncio.run(twice())
    assert len(scripted.bodies) == 3 and scripted.bodies[1] == scripted.bodies[2]


def test_another_model_sample_or_seed_is_another_question(scripted: Any, one: Request, good: bytes) -> None:
    replies = ReplyMemory()
    scripted.answer = good

    async def twice(judge: Judge) -> None:
        async with judge:
            await judge.ask(one, sample=0)
            await judge.ask(one, sample=1)

    asyncio.run(twice(Judge(scripted.url, *settings(), replies=replies)))
    asyncio.run(twice(Judge(scripted.url, *settings(), replies=replies, seed=1)))
    asyncio.run(twice(Judge(scripted.url, *settings(model="other"), replies=replies)))
    assert len(replies) == len(scripted.bodies) == 6


def test_tokens_latency_and_version_are_counted(scripted: Any, one: Request, good: bytes) -> None:
    scripted.answer, scripted.seconds = good, 0.02
    judge = Judge(scripted.url, *settings())
    asyncio.run(ask_all(judge, variants(one, 5)))
    statistics = judge.statistics
    assert (statistics.tokens_in, statistics.tokens_out, statistics.answered) == (500, 50, 5)
    assert 0.02 <= statistics.percentile(0.5) <= statistics.percentile(0.99)
    assert statistics.versions == {"scripted": 5}


def test_the_openai_package_makes_the_requests(scripted: Any, one: Request, good: bytes) -> None:
    scripted.answer = good
    asyncio.run(ask_all(Judge(scripted.url, *settings()), [one]))
    assert "AsyncOpenAI/Python" in scripted.headers[0]


def test_a_judge_that_is_being_started_is_waited_for(one: Request, good: bytes) -> None:
    import socket
    import threading

    from layerloop.components.reference_judge.server import JudgeServer

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    servers: list[JudgeServer] = []

    def start() -> None:
        servers.append(JudgeServer("127.0.0.1", port))
        servers[0].serve_forever(poll_interval=0.05)

    async def reach(seconds: float) -> list[str]:
        async with Judge(f"http://127.0.0.1:{port}/v1", JudgeRecipe(), JudgeRuntime(start_seconds=seconds)) as judge:
            return await judge.check_reachable()

    with pytest.raises(LayerloopError, match="does not answer"):
        asyncio.run(reach(0))
    timer = threading.Timer(1.0, start)
    timer.start()
    assert asyncio.run(reach(60)) == ["layerloop-reference-judge"]
    servers[0].shutdown()
    servers[0].server_close()
