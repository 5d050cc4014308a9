"""Batch API mode against the reference judge's files and batches, over HTTP."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from layerloop.components.judge.batch import ODD_ANSWERS, LedgerMemory, _State, read_output
from layerloop.components.judge.client import Judge, ReplyMemory
from layerloop.components.judge.replies import UnusableError
from layerloop.components.judge.requests import Request
from layerloop.components.reference_judge.batches import BatchDesk
from layerloop.components.schema.errors import LayerloopError, UnavailableError
from layerloop.components.schema.judging import JudgeRecipe
from layerloop.components.schema.runtime import JudgeRuntime

from .conftest import http

BATCH = {"enabled": True, "poll_seconds": 0.05, "linger_seconds": 0.3}


def settings(**batch: Any) -> tuple[JudgeRecipe, JudgeRuntime]:
    return JudgeRecipe(redraws=1), JudgeRuntime.model_validate({"batch": {**BATCH, **batch}, "retries": 1})


def variants(request: Request, count: int) -> list[Request]:
    return [replace(request, system=f"{request.system} {index}") for index in range(count)]


async def ask_all(judge: Judge, requests: list[Request]) -> list[Any]:
    async with judge:
        return await asyncio.gather(*(judge.ask(request) for request in requests), return_exceptions=True)


def test_requests_that_come_together_go_as_one_batch(reference_url: str, one: Request) -> None:
    judge = Judge(reference_url, *settings())
    answers = asyncio.run(ask_all(judge, variants(one, 12)))
    direct = asyncio.run(ask_all(Judge(reference_url, JudgeRecipe()), [one]))
    assert all(scores == direct[0][0] for scores, _ in answers)
    assert judge.batches is not None and judge.batches.sent == 1
    assert judge.statistics.answered == 12


def test_a_full_file_is_sent_at_once(reference_url: str, one: Request) -> None:
    judge = Judge(reference_url, *settings(max_requests=5))
    answers = asyncio.run(ask_all(judge, variants(one, 12)))
    assert not [a for a in answers if isinstance(a, BaseException)]
    assert judge.batches is not None and judge.batches.sent == 3


def test_a_killed_step_collects_the_batch_that_it_had_sent(reference_url: str, one: Request) -> None:
    ledger, requests = LedgerMemory(), variants(one, 6)

    async def killed() -> None:
        async with Judge(reference_url, *settings(poll_seconds=60.0), ledger=ledger) as judge:
            asking = asyncio.gather(*(judge.ask(request) for request in requests))
            while not any(entry["batch"] for entry in ledger.values()):
                await asyncio.sleep(0.05)
            asking.cancel()

    asyncio.run(killed())
    judge = Judge(reference_url, *settings(), ledger=ledger, replies=ReplyMemory())
    answers = asyncio.run(ask_all(judge, requests))
    assert not [a for a in answers if isinstance(a, BaseException)]
    assert judge.batches is not None and judge.batches.sent == 0  # nothing is paid twice


def test_a_batch_that_takes_too_long_is_worth_another_attempt_which_collects_it(
    reference_url: str, one: Request, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(BatchDesk, "_work", lambda *_: None)
    answers = asyncio.run(ask_all(Judge(reference_url, *settings(max_hours=1e-6)), [one]))
    assert type(answers[0]) is UnavailableError and "it will collect the same batch" in str(answers[0])


def test_a_batch_that_was_made_but_not_entered_is_found_by_its_digest(reference_url: str, one: Request) -> None:
    ledger, requests = LedgerMemory(), variants(one, 3)
    asyncio.run(ask_all(Judge(reference_url, *settings(), ledger=ledger), requests))
    for entry in ledger.values():
        entry["batch"] = None  # as if the step had been killed in between
    judge = Judge(reference_url, *settings(), ledger=ledger)
    answers = asyncio.run(ask_all(judge, requests))
    assert not [a for a in answers if isinstance(a, BaseException)]
    assert judge.batches is not None and judge.batches.sent == 0


def test_a_request_that_the_judge_refuses_is_a_mask_of_its_own(reference_url: str, one: Request) -> None:
    blind = replace(one, parts=one.parts[-1:])  # no image at all
    answers = asyncio.run(ask_all(Judge(reference_url, *settings()), [one, blind]))
    assert not isinstance(answers[0], BaseException)
    assert isinstance(answers[1], UnusableError) and answers[1].reason == "http_400"


def test_an_endpoint_without_batches_is_one_clear_line(scripted: Any, one: Request) -> None:
    judge = Judge(scripted.url, JudgeRecipe(model="scripted"), settings()[1])
    scripted.serve = lambda sock: sock.sendall(
        b"HTTP/1.1 404 Not Found\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}"
    )
    answers = asyncio.run(ask_all(judge, [one]))
    assert isinstance(answers[0], LayerloopError) and "runtime.judge.batch.enabled" in str(answers[0])


PAGE, MADE = ("text/html", "<html>Sign in</html>"), ("application/json", '{"id": "x", "status": "validating"}')


@pytest.mark.parametrize(
    ("answers", "asked"),
    [
        ({"POST /v1/files": PAGE}, 1),
        ({"POST /v1/files": ("application/json", "{")}, 1),
        ({"POST /v1/files": MADE, "POST /v1/batches": ("application/json", "[]")}, 2),  # it may have made a batch
        ({"POST /v1/files": MADE, "POST /v1/batches": MADE, "GET /v1/batches": PAGE}, 2 + ODD_ANSWERS),
    ],
)
def test_calls_about_batches_that_something_else_answers_are_one_clear_line(
    answers: dict[str, tuple[str, str]], asked: int, scripted: Any, one: Request
) -> None:
    seen: list[str] = []

    def serve(sock: Any) -> None:
        with sock.makefile("rb") as file:
            head = b"".join(iter(file.readline, b"\r\n")).decode()
            length = next((line for line in head.lower().split("\r\n") if line.startswith("content-length:")), ":0")
            file.read(int(length.split(":")[1]))
        seen.append(head)
        kind, body = next(answer for start, answer in answers.items() if head.startswith(start))
        sock.sendall(http(body, content_type=kind, headers="Connection: close\r\n"))

    scripted.serve = serve
    [error] = asyncio.run(ask_all(Judge(scripted.url, *settings(linger_seconds=0.05)), [one]))
    assert isinstance(error, LayerloopError) and "answers calls about batches with something else" in str(error)
    assert len(seen) == asked


def test_why_a_batch_failed_is_said_in_whatever_shape() -> None:
    for errors in ("no\nfile", {"data": [{"message": "no file"}]}, [{"message": "no file"}]):
        state = _State.of(SimpleNamespace(status="failed", output_file_id=5, error_file_id=None, errors=errors))
        assert state == _State("failed", [], "no file")


@pytest.mark.parametrize("line", [b"", b"not json", b"[]", b"{}", b'{"custom_id": "a"}', b'{"custom_id": [1]}'])
def test_an_output_file_is_read_with_suspicion(line: bytes) -> None:
    good = json.dumps({"custom_id": "b", "response": {"status_code": 200, "body": {"x": 1}}}).encode()
    answers = read_output(line + b"\n" + good + b"\n")
    assert answers["b"] == (200, b'{"x": 1}')
    assert answers.get("a", (500,))[0] == 500
