"""Judge answers from hell, over real HTTP: each ends in scores that can be read in one way, or in the right mask."""

from __future__ import annotations

import asyncio
import gzip
import json
from typing import Any

import pytest

from layerloop.components.judge.client import Judge
from layerloop.components.judge.replies import UnusableError
from layerloop.components.judge.requests import Request
from layerloop.components.schema.judging import JudgeRecipe
from layerloop.components.schema.runtime import JudgeRuntime

NAMES = (
    "semantic_separation",
    "alpha_cleanliness",
    "background_inpainting",
    "feature_distribution",
    "content_validity",
)
GOOD = dict(zip(NAMES, (4, 3, 2, 5, 1), strict=True))
READ = dict(zip(NAMES, (0.8, 0.6, 0.4, 1.0, 0.2), strict=True))
FINE = {name: value - 0.5 for name, value in GOOD.items()}


def http(body: bytes | str, status: str = "200 OK", kind: str = "application/json", headers: str = "") -> bytes:
    data = body.encode() if isinstance(body, str) else body
    head = f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(data)}\r\n{headers}\r\n"
    return head.encode() + data


def says(content: Any, finish: str = "stop", **message: Any) -> bytes:
    text = content if isinstance(content, str | list) or content is None else json.dumps(content)
    choice = {"index": 0, "finish_reason": finish, "message": {"role": "assistant", "content": text, **message}}
    return http(json.dumps({"id": "x", "object": "chat.completion", "model": "m", "choices": [choice]}))


def without(name: str) -> dict[str, int]:
    return {key: value for key, value in GOOD.items() if key != name}


def having(name: str, value: Any) -> dict[str, Any]:
    return {"scores": {**GOOD, name: value}}


def raw(name: str, literal: str) -> str:
    """The good answer with one value replaced by a literal that json.dumps would not write."""
    return json.dumps(having(name, "@")).replace('"@"', literal)


TEXT = json.dumps({"scores": GOOD})
A = "alpha_cleanliness"

# name -> (the bytes that come back, the reason of the mask or None if the scores can be read)
ALONE: dict[str, tuple[bytes, str | None]] = {
    # the way to the judge
    "connection closed before a byte": (b"", "connection"),
    "not HTTP": (b"SSH-2.0-OpenSSH_9.6\r\n", "connection"),
    "closed in the middle of the body": (
        b'HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 5000\r\nConnection: close\r\n\r\n{"id"',
        "connection",
    ),
    "half a chunked body": (
        b'HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n400\r\n{"id": "x"',
        "connection",
    ),
    "50 MB": (http(b" " * (50 << 20)), "body_too_large"),
    "50 MB of error": (http(b" " * (50 << 20), "500 Internal Server Error"), "body_too_large"),
    "a gzip bomb": (http(gzip.compress(b" " * (50 << 20)), headers="Content-Encoding: gzip\r\n"), "body_too_large"),
    "500 with HTML": (http("<html>oops</html>", "500 Internal Server Error", "text/html"), "http_500"),
    "502 of a proxy": (http("<h1>Bad Gateway</h1>", "502 Bad Gateway", "text/html"), "http_502"),
    "429": (http('{"error": {"message": "slow down"}}', "429 Too Many Requests"), "http_429"),
    "503 with Retry-After nonsense": (
        http("{}", "503 Service Unavailable", headers="Retry-After: tomorrow-ish\r\n"),
        "http_503",
    ),
    "400": (http('{"error": {"message": "image too small"}}', "400 Bad Request"), "http_400"),
    "413": (http("", "413 Payload Too Large"), "http_413"),
    "204 without a body": (b"HTTP/1.1 204 No Content\r\nContent-Length: 0\r\n\r\n", "empty_body"),
    # the body
    "an empty body": (http(""), "empty_body"),
    "white space": (http(" \n\t "), "empty_body"),
    "HTML with status 200": (http("<!doctype html><title>Sign in</title>", kind="text/html"), "body_not_json"),
    "invalid UTF-8": (http(b'{"choices": "\xff\xfe\xfa"}'), "body_not_utf8"),
    "half a JSON": (http('{"choices": [{"message": {"content": "'), "body_not_json"),
    "a JSON list": (http("[]"), "body_not_json"),
    "null": (http("null"), "body_not_json"),
    "200 with an error object": (http('{"error": {"message": "overloaded", "code": 529}}'), "error_body"),
    "200 with an error text": (http('{"error": "model is loading"}'), "error_body"),
    "no choices": (http('{"object": "chat.completion", "choices": []}'), "no_choices"),
    "choices of the wrong kind": (http('{"choices": {"0": 1}}'), "no_choices"),
    "a choice without a message": (http('{"choices": [{"text": "4"}]}'), "no_choices"),
    "JSON nested 100,000 deep": (http("[" * 100_000), "body_not_json"),
    # the message
    "no content": (says(None), "empty"),
    "empty content": (says("  "), "empty"),
    "a tool call": (says(None, "tool_calls", tool_calls=[{"id": "1"}]), "empty"),
    "a refusal field": (says(None, refusal="I can't help with that."), "refused"),
    "a content filter": (says("", "content_filter"), "refused"),
    "a refusal in words": (says("I'm sorry, but I can't assist with that request."), "refused"),
    "content in parts": (says([{"type": "text", "text": TEXT}]), None),
    # the text around the JSON
    "only words": (says("The layers look fine to me, solid work overall."), "no_json"),
    "fenced": (says(f"```json\n{TEXT}\n```"), None),
    "a fence that never closes": (says(f"```json\n{TEXT}"), None),
    "chatty": (says(f"Sure! Here you go:\n\n{TEXT}\n\nLet me know if you need more {{details}}."), None),
    "thinking aloud first": (says(f'<think>maybe {{"scores": {{"{A}": 0}}}}?</think>{TEXT}'), None),
    "a byte order mark": (says("\ufeff" + TEXT), None),
    "the same answer twice": (says(f"{TEXT}\n{TEXT}"), None),
    "two different answers": (says(f"{TEXT}\nOn reflection:\n{json.dumps(having(A, 0))}"), "ambiguous"),
    "a key given twice": (says(TEXT.replace(f'"{A}": 3', f'"{A}": 3, "{A}": 5')), "ambiguous"),
    "trailing commas": (says(TEXT.replace("}}", ",},}")), None),
    "a Python literal": (says(str({"scores": GOOD})), None),
    "cut after the last digit": (says(TEXT[:-2], "length"), None),
    "cut in the middle": (says(TEXT[:60], "length"), "truncated"),
    "cut in a key": (says(TEXT[: TEXT.index("content_") + 4], "length"), "truncated"),
    "brackets without end": (says("[" * 50_000 + "{" * 50_000), "no_json"),
    "a million braces in words": (says("{ " * 500_000), "no_json"),
    "thirty thousand braces in words": (says("{ " * 30_000), "no_json"),
    # the values
    "without the outer key": (says(GOOD), None),
    "keys in title case": (says({"scores": {k.replace("_", " ").title(): v for k, v in GOOD.items()}}), None),
    "numbers as text": (says({"scores": {k: f"{v}/5" for k, v in GOOD.items()}}), None),
    "scores with reasons": (says({"scores": {k: {"score": v, "why": "so"} for k, v in GOOD.items()}}), None),
    "something extra": (says({"scores": {**GOOD, "beauty": 9}, "overall": 7}), None),
    "a missing criterion": (says({"scores": without(A)}), "missing_criterion"),
    "scores that are a list": (says({"scores": [4, 3, 2, 5, 1]}), "missing_criterion"),
    "NaN": (says(raw(A, "NaN")), "not_a_number"),
    "infinity": (says(raw(A, "Infinity")), "not_a_number"),
    "1e999": (says(raw(A, "1e999")), "not_a_number"),
    "a number of 5000 digits": (says(raw(A, "9" * 5000)), "no_json"),
    "negative": (says(having(A, -1)), "out_of_range"),
    "six of five": (says(having(A, 6)), "out_of_range"),
    "of ten": (says(having(A, "8/10")), "out_of_range"),
    "of ten, and under five": (says(having(A, "4/10")), "out_of_range"),
    "true": (says(having(A, True)), "not_a_number"),
    "null score": (says(having(A, None)), "not_a_number"),
    "a word": (says(having(A, "good")), "not_a_number"),
}


def rows(*labels: str) -> dict[str, dict[str, float]]:
    return {label: {k: v - index * 0.5 for k, v in FINE.items()} for index, label in enumerate(labels)}


THREE = rows("candidate_1", "candidate_2", "candidate_3")
LIST = [{"candidate": int(label[-1]), "scores": scores} for label, scores in THREE.items()]

# the same of phase 2, three rows; rows get 0.5 less each
TOGETHER: dict[str, tuple[bytes, str | None]] = {
    "as asked": (says({"scores": THREE}), "out_of_range"),  # the third row's last score is -0.5
    "in another order": (
        says({"scores": {k: {n: abs(v) for n, v in THREE[k].items()} for k in sorted(THREE, reverse=True)}}),
        None,
    ),
    "as a labelled list in another order": (
        says(json.dumps([{**e, "scores": {n: abs(v) for n, v in e["scores"].items()}} for e in reversed(LIST)])),
        None,
    ),
    "a candidate missing": (says({"scores": rows("candidate_1", "candidate_3")}), "wrong_count"),
    "a candidate too many": (
        says({"scores": {f"candidate_{i}": GOOD for i in range(1, 5)}}),
        "wrong_count",
    ),
    "labels from zero": (says({"scores": {f"candidate_{i}": GOOD for i in range(3)}}), "wrong_labels"),
    "labels that name nobody": (
        says({"scores": dict.fromkeys(("left", "middle", "right"), GOOD)}),
        "wrong_labels",
    ),
    "a label twice in a list": (
        says(json.dumps([{"candidate": i, "scores": GOOD} for i in (1, 2, 2)])),
        "wrong_labels",
    ),
    "a list one short": (says(json.dumps([{"scores": GOOD}] * 2)), "wrong_count"),
    "cut in a decimal": (says(json.dumps({"scores": dict.fromkeys(THREE, GOOD)})[:-3] + "1", "length"), "truncated"),
    "only one candidate's scores": (says({"scores": GOOD}), "wrong_labels"),
}


async def judged(url: str, request: Request) -> list[dict[str, float]]:
    runtime = JudgeRuntime(retries=0, timeout_seconds=20, give_up_seconds=1e6)
    async with Judge(url, JudgeRecipe(model="scripted", redraws=0), runtime) as judge:
        return (await judge.ask(request))[0]


@pytest.mark.parametrize("name", ALONE)
def test_an_answer_about_one_candidate(name: str, scripted: Any, one: Request) -> None:
    scripted.answer, reason = ALONE[name]
    if reason is None:
        assert asyncio.run(judged(scripted.url, one)) == [pytest.approx(READ)]
    else:
        with pytest.raises(UnusableError) as caught:
            asyncio.run(judged(scripted.url, one))
        assert caught.value.reason == reason
    assert len(scripted.bodies) == 1


@pytest.mark.parametrize("name", TOGETHER)
def test_an_answer_about_three_candidates(name: str, scripted: Any, three: Request) -> None:
    scripted.answer, reason = TOGETHER[name]
    if reason is None:
        scores = asyncio.run(judged(scripted.url, three))
        assert [row["semantic_separation"] for row in scores] == pytest.approx([0.7, 0.6, 0.5])
    else:
        with pytest.raises(UnusableError) as caught:
            asyncio.run(judged(scripted.url, three))
        assert caught.value.reason == reason


def test_the_table_has_enough_of_hell() -> None:
    assert len(ALONE) + len(TOGETHER) >= 40
