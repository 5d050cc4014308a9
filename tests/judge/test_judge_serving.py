"""What `judge check` finds about prefix caching and thinking, on endpoints that do it, do not, and do not say."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from layerloop.components.judge.check import check
from layerloop.components.judge.serving import SHORT, Prefixes, thought_in
from layerloop.components.reference_judge.rules import CRITERIA
from layerloop.components.schema.judging import JudgeRecipe

SMALL = JudgeRecipe(resolution=64, phase2={"resolution": 64})  # type: ignore[arg-type]


def endpoint(scripted: Any, respond: Any, *, caches: bool, reports: bool, message: dict[str, Any]) -> None:
    """A scripted judge that takes 400 ms for a source that it has not seen, where only that is asked about."""
    seen: set[str] = set()

    def answer(body: dict[str, Any], number: int) -> bytes:
        source = next(p["image_url"]["url"] for p in body["messages"][1]["content"] if p["type"] == "image_url")
        known = caches and source in seen
        seen.add(source)
        time.sleep(0.4 if body["max_tokens"] == SHORT and not known else 0)
        text = json.dumps({"scores": dict.fromkeys(CRITERIA, 3)})
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text} | message}
        usage: dict[str, Any] = {"prompt_tokens": 2000, "completion_tokens": 20}
        if reports:
            usage["prompt_tokens_details"] = {"cached_tokens": 1500 if known else 0}
        return bytes(respond(json.dumps({"id": "x", "model": "scripted", "choices": [choice], "usage": usage})))

    scripted.answer = answer


@pytest.mark.parametrize(
    ("caches", "reports", "says"),
    [
        (True, True, "yes (1500 of 2000 tokens cached; "),
        (False, True, "no effect (0 of 2000 tokens cached; "),
        (True, False, "likely (a known prefix takes "),
    ],
)
def test_check_says_whether_a_prefix_sent_twice_is_computed_once(
    scripted: Any, respond: Any, caches: bool, reports: bool, says: str
) -> None:
    endpoint(scripted, respond, caches=caches, reports=reports, message={})
    report = check(scripted.url, recipe=SMALL, designs=1)
    assert report.prefix_caching.startswith(says) and report.thinking == "off (3 answers)"
    assert any(line.startswith("prefix caching        ") and says in line for line in report.lines())


def test_check_says_that_thinking_is_on_and_where_to_switch_it(scripted: Any, respond: Any) -> None:
    endpoint(scripted, respond, caches=True, reports=True, message={"reasoning_content": "Hmm."})
    report = check(scripted.url, recipe=SMALL, designs=1)
    assert report.thinking == "on in 3 of 3 answers, in the field reasoning_content"
    assert any("thinking is on in 3 of 3 answers" in p and "enable_thinking" in p for p in report.problems)


@pytest.mark.parametrize(
    ("choice", "usage", "where"),
    [
        ({"content": '{"scores": {}}'}, {}, None),
        ({"content": '<think>a draft</think>{"scores": {}}'}, {}, "in the text"),
        ({"content": "<think>a draft without an end"}, {}, "in the text"),
        ({"content": "{}", "reasoning": "Hmm."}, {}, "in the field reasoning"),
        ({"content": "{}"}, {"completion_tokens_details": {"reasoning_tokens": 64}}, "64 tokens, hidden"),
        ({"content": "{}"}, {"completion_tokens_details": None}, None),
    ],
)
def test_thought_is_found_wherever_an_endpoint_puts_it(choice: Any, usage: Any, where: str | None) -> None:
    body = json.dumps({"choices": [{"message": choice}], "usage": usage}).encode()
    assert thought_in(body) == where


@pytest.mark.parametrize("body", [b"", b"[]", b'{"choices": []}', b'{"choices": [{"message": null}]}', b"[" * 10_000])
def test_a_body_that_is_no_completion_has_no_thought(body: bytes) -> None:
    assert thought_in(body) is None


def test_an_endpoint_that_reports_is_believed_more_than_the_clock() -> None:
    slow = Prefixes(seconds_new=1.0, seconds_known=0.9, tokens=1000, cached=None)
    assert str(slow).startswith("no effect seen (a known prefix takes 0.90 s, a new one 1.00 s; cached tokens are not")
    assert not Prefixes(seconds_new=1.0, seconds_known=0.1, tokens=1000, cached=0).effective
    assert not Prefixes(seconds_new=0.02, seconds_known=0.01, tokens=1000, cached=None).effective  # which is chance
    assert Prefixes(seconds_new=1.0, seconds_known=1.0, tokens=1000, cached=900).effective
