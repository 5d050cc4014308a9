"""What a judge's endpoint may not do: drip for ever, hide a large file of answers, or put a password into our words."""

from __future__ import annotations

import asyncio
import http.server
import json
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from layerloop.components.judge import batch, transport
from layerloop.components.judge.client import Judge
from layerloop.components.judge.requests import Request
from layerloop.components.judge.transport import TransportError
from layerloop.components.reference_judge.server import JudgeServer
from layerloop.components.schema.errors import LayerloopError
from layerloop.components.schema.judging import JudgeRecipe
from layerloop.components.schema.runtime import JudgeRuntime

BATCH = {"enabled": True, "poll_seconds": 0.05, "linger_seconds": 0.2}


class Dripping(http.server.BaseHTTPRequestHandler):
    """Answers with a byte now and then, and never ends."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.send_response(200)
        self.send_header("Content-Length", "1000000")
        self.end_headers()
        try:
            for _ in range(400):
                self.wfile.write(b" ")
                time.sleep(0.05)
        except OSError:
            pass

    do_POST = do_GET

    def log_message(self, format: str, *args: Any) -> None:
        pass


def serving(server: http.server.HTTPServer) -> Iterator[str]:
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}/v1"
    server.shutdown()
    server.server_close()


@pytest.fixture
def dripping() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Dripping)
    server.daemon_threads = True
    yield from serving(server)


@pytest.fixture
def talkative() -> Iterator[str]:
    """The reference judge, with a megabyte of something else in every answer."""

    class Talkative(JudgeServer):
        def complete(self, data: bytes) -> dict[str, Any]:
            return super().complete(data) | {"trace": "x" * 1_000_000}

    yield from serving(Talkative("127.0.0.1", 0))


@pytest.mark.timeout(30)
@pytest.mark.parametrize("call", ["models", "post", "batch"])
def test_an_endpoint_that_drips_is_given_up_in_all(
    dripping: str, one: Request, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch, "FILE_SECONDS", 0.5)
    monkeypatch.setattr(batch, "CALL_SECONDS", 0.5)
    monkeypatch.setattr(batch, "POLL_FAILURES", 2)
    runtime = JudgeRuntime.model_validate({"batch": BATCH | {"enabled": call == "batch"}})
    calls: dict[str, Callable[[Judge], Any]] = {
        "models": lambda judge: judge.connection.models(timeout=0.5),
        "post": lambda judge: judge.connection.post(b"{}", timeout=0.5),
        "batch": lambda judge: judge.ask(one),
    }

    async def ask() -> None:
        async with Judge(dripping, JudgeRecipe(), runtime) as judge:
            await calls[call](judge)

    began = time.monotonic()
    with pytest.raises((LayerloopError, TransportError), match="does not answer|timeout|cannot be reached"):
        asyncio.run(ask())
    assert time.monotonic() - began < 8


def variants(request: Request, count: int) -> list[Request]:
    from dataclasses import replace

    return [replace(request, system=f"{request.system} {index}") for index in range(count)]


async def ask_all(judge: Judge, requests: list[Request]) -> list[Any]:
    async with judge:
        return await asyncio.gather(*(judge.ask(request) for request in requests), return_exceptions=True)


def test_a_batchs_file_of_answers_may_be_larger_than_any_answer(talkative: str, one: Request) -> None:
    runtime = JudgeRuntime.model_validate({"batch": BATCH})
    answers = asyncio.run(ask_all(Judge(talkative, JudgeRecipe(), runtime), variants(one, 10)))
    assert [a for a in answers if isinstance(a, BaseException)] == []


def test_a_file_of_answers_over_the_bound_is_one_line(
    talkative: str, one: Request, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transport, "MAX_FILE", 3_000_000)
    monkeypatch.setattr(batch, "MAX_FILE", 3_000_000)
    runtime = JudgeRuntime.model_validate({"batch": BATCH})
    answers = asyncio.run(ask_all(Judge(talkative, JudgeRecipe(), runtime), variants(one, 4)))
    assert all(isinstance(a, LayerloopError) for a in answers)
    assert "gives a file of answers of over 2 MB: lower runtime.judge.batch.max_requests" in str(answers[0])


@pytest.mark.parametrize("status", ["401 Unauthorized", "402 Payment Required", "404 Not Found", ""])
def test_a_password_in_the_judges_url_is_in_no_message(scripted: Any, one: Request, respond: Any, status: str) -> None:
    url = scripted.url.replace("http://", "http://ann:sesame@") + "?token=sesame"
    refused = respond(json.dumps({"error": {"message": "no"}}), status=status)
    scripted.answer = (lambda body, number: refused) if status else b""
    judge = Judge(url, JudgeRecipe(model="scripted"), JudgeRuntime(give_up_seconds=0.1, retries=0))
    said: list[str] = []
    judge.log = said.append
    [answer] = asyncio.run(ask_all(judge, [one]))
    assert isinstance(answer, LayerloopError)
    assert "sesame" not in f"{answer} {judge.url} {said}" and "...@127.0.0.1" in str(answer)
