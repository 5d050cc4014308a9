"""Endpoints as people have them, by stand-ins over real HTTP that refuse, list and complain as each of them does.

The shapes are those that docs/JUDGE.md, section Endpoints, cites.
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from layerloop.components.judge.check import check
from layerloop.components.judge.client import NO_KEY, Judge, ReplyMemory
from layerloop.components.judge.errors import LONGEST, read_error, shown
from layerloop.components.judge.features import EndpointFeatures
from layerloop.components.judge.replies import UnusableError
from layerloop.components.judge.requests import Request
from layerloop.components.reference_judge.answers import QualityCache
from layerloop.components.reference_judge.answers import answer as reference_answer
from layerloop.components.schema.errors import LayerloopError
from layerloop.components.schema.judging import JudgeRecipe
from layerloop.components.schema.runtime import JudgeRuntime
from layerloop.pipelines.inputs import check_judge

from .test_judge_client import settings, variants
from .test_judge_hell import GOOD, READ

SMALL = JudgeRecipe(resolution=64, phase2={"resolution": 64})  # type: ignore[arg-type]
Chat = Callable[[dict[str, Any], int], tuple[int, Any]]


def completion(text: Any) -> dict[str, Any]:
    message = {"role": "assistant", "content": text if isinstance(text, str) else json.dumps(text)}
    usage = {"prompt_tokens": 100, "completion_tokens": 10}
    return {"model": "m", "choices": [{"index": 0, "finish_reason": "stop", "message": message}], "usage": usage}


FINE = completion({"scores": GOOD})


class Endpoint(ThreadingHTTPServer):
    """`chat(body, number)` and `models` give a status and a body (JSON is made of anything but bytes); all other paths
    than base + /models and /chat/completions are 404."""

    daemon_threads = True

    def __init__(self, chat: Chat, models: tuple[int, Any], base: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.chat, self.models, self.base = chat, models, base
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str] = []
        self.lock = threading.Lock()

    @property
    def root(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    @property
    def url(self) -> str:
        return f"{self.root}{self.base}"

    @property
    def judgements(self) -> list[dict[str, Any]]:
        """What was asked about images; the short question whether the model answers is none of these."""
        return [body for body in self.bodies if isinstance(body["messages"][-1]["content"], list)]


class _Handler(BaseHTTPRequestHandler):
    server: Endpoint
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.reply(
            *(self.server.models if self.path == f"{self.server.base}/models" else (404, {"detail": "Not Found"}))
        )

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path != f"{self.server.base}/chat/completions":
            self.reply(404, {"detail": "Not Found"})
            return
        with self.server.lock:
            self.server.bodies.append(body)
            self.server.keys.append(self.headers["Authorization"])
            number = len(self.server.judgements) - 1
        self.reply(*self.server.chat(body, number))

    def reply(self, status: int, value: Any) -> None:
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def serve() -> Iterator[Callable[..., Endpoint]]:
    """`serve(chat, models=(200, ...), base="/v1")`: an endpoint, until the test ends."""
    running: list[Endpoint] = []

    def start(
        chat: Chat = lambda body, number: (200, FINE),
        models: tuple[int, Any] = (200, {"object": "list", "data": [{"id": "scripted", "object": "model"}]}),
        base: str = "/v1",
    ) -> Endpoint:
        running.append(Endpoint(chat, models, base))
        threading.Thread(target=running[-1].serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return running[-1]

    yield start
    for server in running:
        server.shutdown()
        server.server_close()


def ask(judge: Judge, requests: list[Request]) -> list[Any]:
    async def all_of_them() -> list[Any]:
        async with judge:
            return await asyncio.gather(*(judge.ask(request) for request in requests), return_exceptions=True)

    return asyncio.run(all_of_them())


# ---- refused features, in the words of each endpoint

GEMINI_TEXT = 'Invalid JSON payload received. Unknown name "{}": Cannot find field.'


def gemini(name: str) -> Any:
    text = GEMINI_TEXT.format(name)
    details = [{"@type": "type.googleapis.com/google.rpc.BadRequest", "fieldViolations": [{"description": text}]}]
    return [{"error": {"code": 400, "message": text, "status": "INVALID_ARGUMENT", "details": details}}]


def mistral(name: str) -> Any:
    detail = [{"type": "extra_forbidden", "loc": ["body", name], "msg": "Extra inputs are not permitted", "input": 5}]
    return {"object": "error", "message": {"detail": detail}, "type": "invalid_request_error", "param": None}


SHAPES: dict[str, tuple[int, Callable[[str], Any]]] = {
    "OpenAI": (400, lambda n: {"error": {"message": f"Unsupported parameter: '{n}'.", "param": n, "code": "no"}}),
    "OpenAI, by param alone": (400, lambda n: {"error": {"message": "Unsupported parameter.", "param": n}}),
    "Gemini": (400, gemini),
    "Mistral": (422, mistral),
    "Mistral, older": (422, lambda n: {"object": "error", "message": json.dumps(mistral(n)["message"])}),
    "LM Studio": (400, lambda n: {"error": f"'{n}' is not supported"}),
    "FastAPI": (422, lambda n: {"detail": [{"loc": ["body", n], "msg": "extra fields not permitted", "type": "x"}]}),
    "vLLM, earlier": (400, lambda n: {"object": "error", "message": f"{n} is not supported", "code": 400}),
    "LiteLLM": (400, lambda n: {"error": {"message": f"litellm.BadRequestError: MistralException - {mistral(n)}"}}),
    "OpenRouter": (
        400,
        lambda n: {
            "error": {
                "message": "Provider returned error",
                "code": 400,
                "metadata": {"raw": json.dumps(gemini(n)), "provider_name": "Google"},
            }
        },
    ),
    "plain text": (400, lambda n: f"unknown field {n}".encode()),
    "HTML": (400, lambda n: f"<html><head><title>Bad Request</title></head><body>unknown {n}</body></html>".encode()),
    "after 900 characters": (400, lambda n: {"error": {"message": f"{'It failed. ' * 90}Unsupported parameter: {n}"}}),
}  # fmt: skip


@pytest.mark.parametrize("field", ["seed", "temperature", "logprobs", "max_tokens", "response_format"])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_refused_feature_is_given_up_in_whatever_shape_it_is_said(
    shape: str, field: str, serve: Any, one: Request
) -> None:
    status, body_of = SHAPES[shape]
    server = serve(lambda body, number: (status, body_of(field)) if field in body else (200, FINE))
    said: list[str] = []
    recipe, runtime = settings(retries=0, concurrency=1, extraction="expected")
    judge = Judge(server.url, recipe, runtime)
    judge.log = said.append
    answers = ask(judge, variants(one, 3))
    assert all(scores == [pytest.approx(READ)] for scores, _ in answers)
    steps = 2 if field == "response_format" else 1  # a JSON object is tried between
    assert len(server.judgements) == 3 + steps and len(said) == steps
    assert all(f"refuses {field}" in line or "refuses response_format" in line for line in said)
    assert not any("\n" in line for line in said)
    if field != "response_format":
        last = server.judgements[-1]
        assert last["response_format"]["type"] == "json_schema"  # nothing else is lost
        others = {"seed", "temperature", "logprobs", "max_tokens"} - {field}
        assert others <= last.keys() and field not in last
        assert ("max_completion_tokens" in last) == (field == "max_tokens")


@pytest.mark.parametrize("shape", SHAPES)
def test_a_refusal_for_good_shows_the_reason(shape: str, serve: Any, one: Request) -> None:
    status, body_of = SHAPES[shape]
    server = serve(lambda body, number: (status, body_of("images")))
    (answer,) = ask(Judge(server.url, *settings(retries=0)), [one])
    assert isinstance(answer, UnusableError) and answer.reason == f"http_{status}"
    assert "images" in answer.detail and len(answer.detail) < 330 and "<" not in answer.detail


def test_an_o_series_model_is_asked_without_what_it_refuses(serve: Any, one: Request) -> None:
    def chat(body: dict[str, Any], number: int) -> tuple[int, Any]:
        if "max_tokens" in body:
            text = "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens'."
            return 400, {"error": {"message": text, "param": "max_tokens", "code": "unsupported_parameter"}}
        if "temperature" in body:
            text = "Unsupported value: 'temperature' does not support 0 with this model. Only the default (1) is."
            return 400, {"error": {"message": text, "param": "temperature", "code": "unsupported_value"}}
        return 200, FINE

    server = serve(chat)
    (answer,) = ask(Judge(server.url, *settings(retries=0)), [one])
    assert answer[0] == [pytest.approx(READ)]
    assert {"max_completion_tokens", "seed", "response_format"} <= server.judgements[-1].keys()


def test_lm_studio_takes_a_schema_but_no_json_object(serve: Any, one: Request) -> None:
    def chat(body: dict[str, Any], number: int) -> tuple[int, Any]:
        if body.get("response_format", {}).get("type") == "json_object":
            return 400, {"error": "'response_format.type' must be 'json_schema' or 'text'"}
        return 200, FINE

    server = serve(chat)
    ask(Judge(server.url, *settings(retries=0)), [one])
    assert [body["response_format"]["type"] for body in server.judgements] == ["json_schema"]


def test_a_limit_that_is_too_large_is_no_unknown_parameter() -> None:
    text = "'max_tokens' or 'max_completion_tokens' is too large: 1024. The context length that is supported"
    assert EndpointFeatures().without(text) is None


def test_giving_up_ends() -> None:
    """Whatever an endpoint says, every step gives up something, and after the last there is none."""
    for message in (*(name for name in EndpointFeatures.__dataclass_fields__), "unsupported max_tokens seed schema"):
        features: EndpointFeatures | None = EndpointFeatures(logprobs=True)
        for _ in range(10):
            features = features and (features.without(f"unsupported {message}") or features.blindly())
        assert features is None


# ---- error bodies


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (b"", ""),
        (b"null", "null"),
        (b'{"detail": "Not Found"}', "Not Found"),
        (b'{"error": {"message": "a"}, "message": "a"}', "a"),
        (b"<html><head><title>502 Bad</title></head><body><h1>502 Bad</h1></body></html>", "502 Bad"),
        (b"\xff\xfe", "\ufffd\ufffd"),
        (b'{"error": {"message": "busy", "type": "overloaded_error"}}', "busy; type overloaded_error"),
        (b'{"errors": [{"message": "one"}, {"message": "two"}]}', "one; two"),
    ],
)  # fmt: skip
def test_what_an_error_body_says(body: bytes, text: str) -> None:
    assert read_error(body) == text


@pytest.mark.parametrize("body", [b"[" * 99_000, b'{"a":' * 50_000, b"<" * 500_000, b"{'a': " * 9_000, b"\0" * 99_000])
def test_hostile_error_bodies_are_read_too(body: bytes) -> None:
    assert len(read_error(body)) <= LONGEST and len(shown(read_error(body))) <= 300


# ---- models, URLs


async def reach(url: str, model: str, **runtime: Any) -> list[str]:
    async with Judge(url, JudgeRecipe(model=model), JudgeRuntime(**runtime)) as judge:
        return await judge.check_reachable()


def listing(*names: str) -> tuple[int, Any]:
    return 200, {"object": "list", "data": [{"id": name, "object": "model"} for name in names]}


@pytest.mark.parametrize(
    ("models", "wanted"),
    [
        (listing("qwen3-vl:latest"), "qwen3-vl"),
        (listing("models/gemini-x"), "gemini-x"),
        (listing("gemini-x"), "models/gemini-x"),
        (listing("something-else"), "a-deployment"),  # Azure lists models, not deployments; the question decides
        ((403, {"error": {"message": "no permission to list"}}), "x"),
        ((401, {"error": {"message": "no permission to list"}}), "x"),
        ((404, b"not here"), "x"),
        ((200, b"<html>welcome</html>"), "x"),
        ((500, b""), "x"),
    ],
)
def test_a_list_of_models_alone_decides_nothing(models: tuple[int, Any], wanted: str, serve: Any) -> None:
    asyncio.run(reach(serve(models=models).url, wanted))


def test_a_model_that_is_neither_listed_nor_answers_is_refused(serve: Any) -> None:
    missing = {"error": {"message": "The model `x` does not exist.", "type": "NotFoundError", "code": 404}}
    with pytest.raises(LayerloopError, match=r"recipe.judge.model is 'x', judge .* serves y: choose one of these"):
        asyncio.run(reach(serve(lambda body, number: (404, missing), listing("y")).url, "x"))
    with pytest.raises(LayerloopError, match=r"does not serve recipe.judge.model 'x' \(HTTP 404: The model"):
        asyncio.run(reach(serve(lambda body, number: (404, missing), (404, b"")).url, "x"))


def test_a_url_without_its_v1_is_refused_with_a_hint(serve: Any, one: Request) -> None:
    server = serve()
    with pytest.raises(LayerloopError, match=rf"{server.root} has no /chat/completions .*: try {server.root}/v1$"):
        check_judge(server.root, JudgeRecipe(model="scripted"), JudgeRuntime())
    with pytest.raises(LayerloopError, match=rf"try {server.root}/v1$"):
        check(server.root, recipe=SMALL, designs=1)
    with pytest.raises(LayerloopError, match=r"leave out /chat/completions"):
        check_judge(f"{server.url}/chat/completions", JudgeRecipe(model="scripted"), JudgeRuntime())
    (answer,) = ask(Judge(server.root, *settings(retries=0)), [one])
    assert isinstance(answer, LayerloopError) and f"try {server.root}/v1" in str(answer)
    assert server.bodies == []


def test_a_server_that_lists_models_and_serves_nothing_is_refused_before_a_run(serve: Any) -> None:
    server = serve(lambda body, number: (404, {"detail": "Not Found"}))
    with pytest.raises(LayerloopError, match=r"has no /chat/completions \(HTTP 404: Not Found\)"):
        check_judge(server.url, JudgeRecipe(model="scripted"), JudgeRuntime())


# ---- keys, access and credit


@pytest.mark.parametrize("key", ["sk-1\n", " sk-1", "sk-1\r\n", "\ufeffsk-1 "])
def test_a_key_is_used_without_the_blanks_around_it(key: str, serve: Any, one: Request, monkeypatch: Any) -> None:
    server = serve()
    ask(Judge(server.url, *settings(), api_key=key), [one])
    monkeypatch.setenv("OPENAI_API_KEY", key)
    ask(Judge(server.url, *settings()), [one])
    monkeypatch.setenv("OPENAI_API_KEY", " \n")
    ask(Judge(server.url, *settings()), [one])
    assert server.keys == ["Bearer sk-1", "Bearer sk-1", f"Bearer {NO_KEY}"]


@pytest.mark.parametrize("key", ["sk 1", "sk-\u00e9", "sk-1\nsk-2"])
def test_a_key_that_no_header_can_carry_is_one_line(key: str) -> None:
    with pytest.raises(LayerloopError, match="OPENAI_API_KEY has a blank") as caught:
        Judge("http://127.0.0.1:9/v1", JudgeRecipe(), api_key=key)
    assert key not in str(caught.value)


def test_a_first_403_stops_and_a_later_one_masks_its_request(serve: Any, one: Request) -> None:
    refused = {"error": {"message": "flagged by moderation"}}
    server = serve(lambda body, number: (403, refused))
    (answer,) = ask(Judge(server.url, *settings()), [one])
    assert isinstance(answer, LayerloopError) and "refuses access (HTTP 403: flagged by moderation)" in str(answer)

    flagged = variants(one, 25)[3].system
    for concurrency in (1, 25):  # a refusal may come before any answer: a moderator is faster than a judge
        server = serve(
            lambda body, number: (403, refused) if body["messages"][0]["content"] == flagged else (200, FINE)
        )
        answers = ask(Judge(server.url, *settings(concurrency=concurrency)), variants(one, 25))
        failed = [answer for answer in answers if isinstance(answer, BaseException)]
        assert len(failed) == 1 and isinstance(failed[0], UnusableError) and failed[0].reason == "http_403"
    first = variants(one, 3)[0].system
    server = serve(lambda body, number: (403, refused) if body["messages"][0]["content"] == first else (200, FINE))
    answers = ask(Judge(server.url, *settings(concurrency=1)), variants(one, 3))
    assert [getattr(answer, "reason", "") for answer in answers] == ["http_403", "", ""]
    assert len(server.bodies) == 4  # with the short question that shows that the key is good

    server = serve(lambda body, number: (403, refused) if number == 20 else (200, FINE))
    answers = ask(Judge(server.url, *settings(concurrency=1)), variants(one, 25))
    failed = [answer for answer in answers if isinstance(answer, BaseException)]
    assert len(failed) == 1 and isinstance(failed[0], UnusableError) and failed[0].reason == "http_403"
    assert len(server.bodies) == 25  # it is not asked again

    server = serve(lambda body, number: (403, refused) if number >= 5 else (200, FINE))
    answers = ask(Judge(server.url, *settings(concurrency=1)), variants(one, 25))
    assert any(isinstance(answer, LayerloopError) and "8 times in a row" in str(answer) for answer in answers)


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (402, {"error": {"message": "Insufficient credits. Add more using ...", "code": 402}}),
        (402, b""),
        (429, {"error": {"message": "You exceeded your current quota", "code": "insufficient_quota"}}),
        (400, {"error": {"message": "Your credit balance is too low to access the API"}}),
        (403, {"error": {"message": "insufficient balance"}}),
        (200, {"error": {"message": "Insufficient credits", "code": 402}}),
    ],
)
def test_without_credit_the_judge_stops_and_later_only_the_rest_is_sent(
    status: int, body: Any, serve: Any, one: Request
) -> None:
    replies = ReplyMemory()
    server = serve(lambda asked, number: (status, body) if number >= 28 else (200, FINE))
    requests = variants(one, 40)
    answers = ask(Judge(server.url, *settings(concurrency=1), replies=replies), requests)
    failed = [answer for answer in answers if isinstance(answer, BaseException)]
    assert failed and all(isinstance(error, LayerloopError) and "has no credit" in str(error) for error in failed)
    server.chat = lambda asked, number: (200, FINE)
    before = len(server.bodies)
    answers = ask(Judge(server.url, *settings(concurrency=1), replies=replies), requests)
    assert all(scores == [pytest.approx(READ)] for scores, _ in answers)
    assert len(server.bodies) - before == 40 - 28


def test_a_rate_limit_that_speaks_of_quota_is_waited_for(serve: Any, one: Request) -> None:
    """Gemini's 429 of a minute's limit has the words of an account without quota, but not its code."""
    said = [{"error": {"code": 429, "message": "You exceeded your current quota", "status": "RESOURCE_EXHAUSTED"}}]
    server = serve(lambda body, number: (429, said) if number == 0 else (200, FINE))
    (answer,) = ask(Judge(server.url, *settings()), [one])
    assert answer[0] == [pytest.approx(READ)]


# ---- outages


def test_an_outage_that_ends_masks_nothing(serve: Any, one: Request) -> None:
    """Longer than all retries together, shorter than give_up_seconds."""
    start: list[float] = []

    def chat(body: dict[str, Any], number: int) -> tuple[int, Any]:
        if number == 3:
            start.append(time.monotonic())
        down = bool(start) and time.monotonic() - start[0] < 3
        return (503, b"") if down else (200, FINE)

    answers = ask(Judge(serve(chat).url, *settings(concurrency=2, retries=1, give_up_seconds=60)), variants(one, 12))
    assert all(scores == [pytest.approx(READ)] for scores, _ in answers)


def test_an_outage_that_lasts_fails_and_is_no_mask(serve: Any, one: Request) -> None:
    server = serve(lambda body, number: (200, FINE) if number < 3 else (500, b"oops"))
    answers = ask(Judge(server.url, *settings(concurrency=2, retries=1, give_up_seconds=1)), variants(one, 8))
    failed = [answer for answer in answers if isinstance(answer, BaseException)]
    assert failed and all(isinstance(error, LayerloopError) for error in failed)
    assert "run the step again when it is back" in str(failed[0])


def test_a_request_that_always_fails_is_a_mask_where_the_judge_answers_others(serve: Any, one: Request) -> None:
    def chat(body: dict[str, Any], number: int) -> tuple[int, Any]:
        poison = body["messages"][0]["content"].endswith(" 2")
        return (500, b"cannot decode") if poison else (200, FINE)

    answers = ask(Judge(serve(chat).url, *settings(concurrency=1, retries=1, give_up_seconds=30)), variants(one, 4))
    assert [isinstance(answer, UnusableError) for answer in answers] == [False, False, True, False]
    assert answers[2].reason == "http_500" and "cannot decode" in answers[2].detail


# ---- judge check


def reference(body: dict[str, Any], cache: QualityCache) -> tuple[int, Any]:
    if not isinstance(body["messages"][-1]["content"], list):
        return 200, completion("yes")
    return 200, completion(reference_answer(body, cache)[0])


def test_check_gives_the_same_verdict_where_fields_are_refused_or_one_probe_is_nonsense(serve: Any) -> None:
    cache = QualityCache()

    def strict(body: dict[str, Any], number: int) -> tuple[int, Any]:
        for field in ("max_tokens", "temperature"):
            if field in body:
                return 400, {"error": {"message": f"Unsupported parameter: '{field}'", "param": field}}
        return reference(body, cache)

    def moody(body: dict[str, Any], number: int) -> tuple[int, Any]:
        return (200, completion("Nice weather.")) if number % 10 == 0 else reference(body, cache)

    reports = [
        check(serve(chat).url, recipe=SMALL, designs=1)
        for chat in (lambda body, number: reference(body, cache), strict, moody)
    ]
    assert len({(report.verdict, report.json_schema, report.images_per_request) for report in reports}) == 1
    assert reports[0].canaries.rewards == reports[1].canaries.rewards == reports[2].canaries.rewards
    assert [len(report.given_up) for report in reports] == [0, 2, 0]
    assert "refuses max_tokens (max_completion_tokens is sent)" in "\n".join(reports[1].lines())


# ---- the environment


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("ALL_PROXY", "socks5://u:secret@h:1", r"ALL_PROXY is socks5://...@h:1, which cannot be used"),
        ("all_proxy", "socks4://h:1", r"all_proxy is socks4://h:1"),
        ("HTTPS_PROXY", "foo:bar", r"HTTPS_PROXY is 'foo:bar', which is no address"),
        ("SSL_CERT_FILE", "/nowhere.pem", r"SSL_CERT_FILE is /nowhere.pem, which does not exist"),
        ("SSL_CERT_DIR", "/nowhere", r"SSL_CERT_DIR is /nowhere, which does not exist"),
        ("SSL_CERT_FILE", "/etc/hostname", r"certificates of /etc/hostname cannot be loaded"),
    ],
)
def test_an_environment_that_cannot_work_is_one_line_before_anything(
    name: str, value: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(LayerloopError, match=says) as caught:
        check_judge("https://judge.invalid/v1", JudgeRecipe(), JudgeRuntime())
    assert "\n" not in str(caught.value) and "secret" not in str(caught.value)


def test_a_proxy_has_no_part_in_a_judge_of_this_machine_or_of_no_proxy(serve: Any, monkeypatch: Any) -> None:
    monkeypatch.setenv("ALL_PROXY", "socks5://h:1")
    assert asyncio.run(reach(serve().url, "scripted")) == ["scripted"]
    monkeypatch.setenv("NO_PROXY", "judge.invalid")
    with pytest.raises(LayerloopError, match="does not answer"):
        asyncio.run(reach("https://judge.invalid/v1", "scripted"))
