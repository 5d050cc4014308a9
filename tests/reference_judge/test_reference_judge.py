"""The reference judge: its rules, what it recovers from images, and its API over real HTTP."""

from __future__ import annotations

import http.client
import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest

from layerloop.components.judge.grids import draw_grid
from layerloop.components.judge.images import EncodedImage, candidate_images, encode_image
from layerloop.components.judge.methods import grid, rubric
from layerloop.components.judge.requests import Request
from layerloop.components.judge.rubric import load_rubric
from layerloop.components.layers.designs import render_sketches
from layerloop.components.layers.stack import composite
from layerloop.components.reference_judge import server
from layerloop.components.reference_judge.answers import QualityCache
from layerloop.components.reference_judge.identity import FINE, FINGERPRINT, NAME
from layerloop.components.reference_judge.request_images import BadRequestError, parse_images, recover_candidates
from layerloop.components.reference_judge.rules import CRITERIA, RecoveredLayers, qualities
from layerloop.components.schema.judging import BackdropName, JudgeRecipe

from ..judge_server import start_in_thread

RUBRIC = load_rubric("default")


@pytest.fixture(scope="module")
def reference_url() -> Iterator[str]:
    with start_in_thread() as url:
        yield url


@pytest.fixture(scope="module")
def one() -> Request:
    """A phase-1 request."""
    stack = designs(2)[1]
    return phase1_request(stack, composite(stack), ("white",))


@pytest.fixture(scope="module")
def three() -> Request:
    """A phase-2 request of three rows."""
    stack = designs(2)[1]
    return phase2_request({"white": draw_grid([stack] * 3, "white")}, composite(stack), rows=3, layers=len(stack))


def phase1_request(stack: np.ndarray, source: np.ndarray, backdrops: tuple[BackdropName, ...]) -> Request:
    return rubric.request(RUBRIC, encode_image(source), candidate_images(stack, backdrops), JudgeRecipe(), label="x")


def phase2_request(grids: dict[str, EncodedImage], source: np.ndarray, *, rows: int, layers: int) -> Request:
    phase1 = [dict.fromkeys(RUBRIC.names, 0.6)] * rows
    return grid.request(RUBRIC, encode_image(source), grids, JudgeRecipe(), phase1=phase1, layers=layers, label="x")


def designs(count: int = 6) -> list[np.ndarray]:
    """Designs of 2 to 5 layers, (L, 64, 64, 4)."""
    return [
        render_sketches(np.random.default_rng(seed), count=1, layers=2 + seed % 4, size=(64, 64))[0]
        for seed in range(count)
    ]


def seen(stack: np.ndarray, source: np.ndarray) -> RecoveredLayers:
    straight = stack.astype(np.float32) / 255
    colour = straight[..., :3] * straight[..., 3:]
    whole = composite(stack)
    shown = whole[..., :3] / 255 * (whole[..., 3:] / 255) + 1 - whole[..., 3:] / 255
    return RecoveredLayers(source[..., :3].astype(np.float32) / 255, shown.astype(np.float32), colour, straight[..., 3])


def reward(stack: np.ndarray, source: np.ndarray) -> float:
    return float(np.mean(list(qualities(seen(stack, source)).values())))


def mixed(a: np.ndarray, b: np.ndarray, share: float) -> np.ndarray:
    return np.rint(a + (b.astype(np.float32) - a) * share).astype(np.uint8)


def blanked(stack: np.ndarray, t: float) -> np.ndarray:
    out = stack.copy()
    out[1:, ..., 3] = np.rint(out[1:, ..., 3] * (1 - t))
    return out


def glazed(stack: np.ndarray, t: float) -> np.ndarray:
    out = stack.copy()
    out[1:, ..., 3] = mixed(out[1:, ..., 3], np.full_like(out[1:, ..., 3], 128), t)
    return out


def copied(stack: np.ndarray, t: float) -> np.ndarray:
    """The complete image, on a growing part of every upper layer."""
    out = stack.copy()
    edge = round(t * out.shape[2])
    out[1:, :, :edge] = composite(stack)[:, :edge]
    return out


def unfilled(stack: np.ndarray, t: float) -> np.ndarray:
    out = stack.copy()
    out[0] = mixed(out[0], composite(stack), t)
    return out


def haloed(stack: np.ndarray, t: float) -> np.ndarray:
    from PIL import Image, ImageFilter

    out, source = stack.copy(), composite(stack)
    for layer in out[1:]:
        soft = np.asarray(Image.fromarray(layer[..., 3]).filter(ImageFilter.GaussianBlur(1 + 3 * t)), np.float32)
        layer[..., :3] = np.where(layer[..., 3:] > 0, layer[..., :3], source[..., :3])
        layer[..., 3] = np.maximum(layer[..., 3], np.clip(1.6 * soft, 0, 255) * (t > 0))
    return out


def holed(stack: np.ndarray, t: float) -> np.ndarray:
    out = stack.copy()
    out[0, ..., 3] = np.where(stack[1:, ..., 3].max(0) > 0, np.rint(255 * (1 - t)), 255)
    return out


def speckled(stack: np.ndarray, t: float) -> np.ndarray:
    out = stack.copy()
    dirt = np.random.default_rng(0).random(out[1:, ..., 3].shape) < 0.2 * t
    out[1:, ..., 3] = np.where(dirt, 255 - out[1:, ..., 3], out[1:, ..., 3])
    return out


def unfaithful(stack: np.ndarray, t: float) -> np.ndarray:
    out = stack.copy()
    noise = np.random.default_rng(0).normal(0, 80 * t, out[..., :3].shape)
    out[..., :3] = np.clip(out[..., :3] + noise, 0, 255)
    return out


FAULTS = {
    "blank": (blanked, "content_validity"),
    "glazed": (glazed, "alpha_cleanliness"),
    "copied": (copied, "semantic_separation"),
    "unfilled": (unfilled, "background_inpainting"),
    "haloed": (haloed, "alpha_cleanliness"),
    "holed": (holed, "background_inpainting"),
    "speckled": (speckled, "alpha_cleanliness"),
    "unfaithful": (unfaithful, "content_validity"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_worse_the_fault_the_lower_the_reward(fault: str) -> None:
    spoil, criterion = FAULTS[fault]
    for stack in designs():
        source = composite(stack)
        rewards = [reward(spoil(stack, t), source) for t in (0, 0.25, 0.5, 0.75, 1)]
        steps = np.diff(rewards)
        assert rewards[-1] < rewards[0] - 0.1
        assert (steps < 0.02).all(), rewards  # never better for being worse
        worst = qualities(seen(spoil(stack, 1.0), source))[criterion]
        assert worst < qualities(seen(stack, source))[criterion] - 0.1


def test_a_true_decomposition_is_near_the_top() -> None:
    rewards = [reward(stack, composite(stack)) for stack in designs(12)]
    assert np.mean(rewards) > 0.8


def test_nothing_is_earned_without_taking_apart() -> None:
    for stack in designs():
        source = composite(stack)
        empty = np.zeros_like(stack[1:])
        nothing = np.concatenate([source[None], empty])
        hidden = np.concatenate([stack[1:], source[None]])  # everything under one opaque copy
        noise = np.random.default_rng(0).integers(0, 256, stack.shape, np.uint8)
        for cheat in (nothing, hidden, noise, np.stack([source] * len(stack))):
            assert reward(cheat, source) < 0.35 < reward(stack, source)


def test_a_small_fault_costs_a_little() -> None:
    for stack in designs():
        source = composite(stack)
        top = reward(stack, source)
        assert abs(top - reward(unfilled(stack, 0.02), source)) < 0.1
        assert abs(top - reward(glazed(stack, 0.01), source)) < 0.2


@pytest.mark.parametrize(
    "backdrops", [("white",), ("white", "black"), ("white", "checker"), ("black", "checker"), ("checker",)]
)
def test_layers_are_recovered_from_images_alone(backdrops: tuple[str, ...]) -> None:
    for stack in designs(4):
        source = composite(stack)
        request = phase1_request(stack, source, backdrops)
        found = recover_candidates(parse_images(json.loads(request.payload({}))["messages"]))[0]
        truth = seen(stack, source)
        exact = {"white", "black"} <= set(backdrops)
        assert np.abs(found.alpha - truth.alpha).mean() < (0.004 if exact else 0.04)
        assert np.abs(found.colour - truth.colour).mean() < (0.004 if exact else 0.04)


def test_a_grid_is_seen_as_well_as_single_images() -> None:
    stack = designs(4)[3]
    source, worse = composite(stack), unfilled(stack, 0.5)
    grids = {name: draw_grid([stack, worse], name) for name in ("white", "black")}
    request = phase2_request(grids, source, rows=2, layers=len(stack))
    found = recover_candidates(parse_images(json.loads(request.payload({}))["messages"]))
    for shown, given in zip(found, (stack, worse), strict=True):
        np.testing.assert_allclose(shown.alpha, seen(given, source).alpha, atol=0.01)


# -------------------------------------------------------------------------------------------------------- over HTTP


def ask(url: str, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> tuple[int, Any]:
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=30)
    data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    connection.request(method, path, data, headers or {"Content-Type": "application/json"})
    response = connection.getresponse()
    text = response.read()
    connection.close()
    return response.status, json.loads(text)


def body_of(request: Request, **options: Any) -> dict[str, Any]:
    return dict(json.loads(request.payload({"model": NAME, **options})))


def schema_of(request: Request) -> dict[str, Any]:
    schema = {"name": request.kind, "schema": request.schema, "strict": True}
    return {"type": "json_schema", "json_schema": schema}


def test_it_says_that_it_is_rules(reference_url: str, one: Request) -> None:
    status, models = ask(reference_url, "GET", "/v1/models")
    assert status == 200 and [m["id"] for m in models["data"]] == [NAME] == ["layerloop-reference-judge"]
    _, reply = ask(reference_url, "POST", "/v1/chat/completions", body_of(one))
    assert reply["system_fingerprint"] == FINGERPRINT and "not a vision-language model" in FINGERPRINT


@pytest.mark.parametrize("form", ["json_schema", "json_object", "text"])
def test_the_answer_has_the_form_that_was_asked_for(
    form: str, reference_url: str, one: Request, three: Request
) -> None:
    import jsonschema

    for request in (one, three):
        wanted = schema_of(request) if form == "json_schema" else {"type": form}
        status, reply = ask(reference_url, "POST", "/v1/chat/completions", body_of(request, response_format=wanted))
        assert status == 200 and reply["choices"][0]["finish_reason"] == "stop"
        jsonschema.validate(json.loads(reply["choices"][0]["message"]["content"]), request.schema)
        assert reply["usage"]["prompt_tokens"] > 0 and reply["usage"]["completion_tokens"] > 0


def test_alone_it_is_coarse_and_its_full_range_variant_is_not(reference_url: str) -> None:
    scores_of: dict[str, list[int]] = {NAME: [], FINE: []}
    with start_in_thread(model=FINE) as fine_url:
        for name, url in ((NAME, reference_url), (FINE, fine_url)):
            for truth in designs():
                source = composite(truth)
                for stack in (truth, blanked(truth, 0.5), blanked(truth, 1.0)):
                    request = phase1_request(stack, source[..., :3], ("white", "black"))
                    _, reply = ask(url, "POST", "/v1/chat/completions", body_of(request, model=name))
                    assert reply["model"] == name
                    scores_of[name] += json.loads(reply["choices"][0]["message"]["content"])["scores"].values()
    assert set(scores_of[NAME]) <= {1, 2, 3, 4}
    assert sum(score in (2, 3) for score in scores_of[NAME]) >= 0.8 * len(scores_of[NAME])
    assert set(scores_of[FINE]) >= {0, 2, 3, 5}


def test_the_same_request_gets_the_same_answer(reference_url: str, three: Request) -> None:
    texts = {
        ask(reference_url, "POST", "/v1/chat/completions", body_of(three, seed=seed))[1]["choices"][0]["message"][
            "content"
        ]
        for seed in range(3)
    }
    assert len(texts) == 1


def test_it_does_not_judge_in_phase_2_without_the_phase1_scores_of_every_row(
    reference_url: str, three: Request
) -> None:
    body = body_of(three, response_format=schema_of(three))
    question = body["messages"][1]["content"][-1]
    complete = question["text"]
    assert ask(reference_url, "POST", "/v1/chat/completions", body)[0] == 200
    without_a_row = "\n".join(line for line in complete.splitlines() if not line.startswith("candidate 2: "))
    for text, listed in ((without_a_row, 2), (complete.replace("candidate ", "row "), 0)):
        question["text"] = text
        status, reply = ask(reference_url, "POST", "/v1/chat/completions", body)
        assert status == 400 and f"first judgements of {listed} of 3 rows" in reply["error"]["message"]
    question["text"] = complete.replace("alpha_cleanliness 3.0, ", "", 1)
    status, reply = ask(reference_url, "POST", "/v1/chat/completions", body)
    assert status == 400 and "first judgements of 2 of 3 rows" in reply["error"]["message"]


PIXEL = EncodedImage(b"").url.decode()
TEXT_PART = {"type": "text", "text": "Source picture:"}


def user(*parts: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(parts)}]


def image(url: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        (b"{", 400, "not JSON"),
        (b"[" * 100_000, 400, "not JSON"),
        ([], 400, "not a JSON object"),
        ({}, 404, "does not exist"),
        ({"model": "gpt-4o", "messages": []}, 404, "'gpt-4o' does not exist"),
        ({"model": NAME}, 400, "non-empty list"),
        ({"model": NAME, "messages": "hello"}, 400, "non-empty list"),
        ({"model": NAME, "messages": [{"content": "x"}]}, 400, "with a role"),
        ({"model": NAME, "messages": [{"role": "user", "content": 7}]}, 400, "text or a list of parts"),
        ({"model": NAME, "messages": user({"type": "audio"})}, 400, "neither a text nor an image_url"),
        ({"model": NAME, "messages": user(image("https://example.org/cat.png"))}, 400, "no URL is fetched"),
        ({"model": NAME, "messages": user(image("file:///etc/passwd"))}, 400, "no URL is fetched"),
        ({"model": NAME, "messages": user(image(PIXEL))}, 400, "cannot be decoded"),
        ({"model": NAME, "messages": user(image(PIXEL + "!!!"))}, 400, "cannot be decoded"),
        ({"model": NAME, "messages": user(TEXT_PART)}, 400, "has no line"),
        ({"model": NAME, "messages": user(TEXT_PART), "stream": True}, 400, "'stream' is not supported"),
        ({"model": NAME, "messages": user(TEXT_PART), "n": 3}, 400, "'n' must be 1"),
        ({"model": NAME, "messages": user(TEXT_PART), "temperature": 9}, 400, "'temperature' is 9"),
        ({"model": NAME, "messages": user(TEXT_PART), "max_tokens": 0}, 400, "'max_tokens' is 0"),
        ({"model": NAME, "messages": user(TEXT_PART), "top_logprobs": 5}, 400, "needs 'logprobs'"),
        ({"model": NAME, "messages": user(TEXT_PART), "response_format": {"type": "xml"}}, 400, "response_format"),
    ],
)
def test_a_wrong_request_is_refused_in_the_words_of_the_api(
    body: Any, status: int, says: str, reference_url: str
) -> None:
    got, reply = ask(reference_url, "POST", "/v1/chat/completions", body)
    assert got == status and says in reply["error"]["message"]
    assert set(reply["error"]) == {"message", "type", "param", "code"}


def test_an_image_bomb_is_refused_before_it_is_decoded(reference_url: str) -> None:
    import struct
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    bomb = (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 1000))
        + chunk(b"IEND", b"")
    )
    start = time.monotonic()
    body = {"model": NAME, "messages": user(TEXT_PART, image(EncodedImage(bomb).url.decode()))}
    assert ask(reference_url, "POST", "/v1/chat/completions", body)[0] == 400
    assert time.monotonic() - start < 10


def test_paths_methods_and_lengths_are_checked(reference_url: str) -> None:
    assert ask(reference_url, "GET", "/v1/nothing")[0] == 404
    assert ask(reference_url, "GET", "/v1/chat/completions")[0] == 405
    assert ask(reference_url, "POST", "/v1/models", b"{}")[0] == 405
    assert ask(reference_url, "POST", "/v1/chat/completions", b"", {"Content-Length": str(1 << 40)})[0] == 413
    assert ask(reference_url, "POST", "/v1/chat/completions", None, {"Transfer-Encoding": "chunked"})[0] == 411
    assert ask(reference_url, "GET", "/health")[1]["status"] == "ok"


def test_a_criterion_that_it_has_no_rule_for_is_refused(reference_url: str, one: Request) -> None:
    schema = {
        "type": "object",
        "properties": {"scores": {"type": "object", "properties": {"beauty": {"type": "integer"}}}},
    }
    body = body_of(one, response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}})
    status, reply = ask(reference_url, "POST", "/v1/chat/completions", body)
    assert status == 400 and "no rule for 'beauty'" in reply["error"]["message"]


def test_serve_prints_its_url_and_stops_on_sigterm() -> None:
    code = "from layerloop.components.reference_judge.server import serve; serve(port=0)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("listening on http://127.0.0.1:") and line.endswith("/v1\n")
        assert ask(line.split()[-1], "GET", "/health")[0] == 200
        process.terminate()
        assert process.wait(30) == 0


def test_the_cache_drops_what_was_used_longest_ago() -> None:
    cache = QualityCache(size=2)
    stacks = designs(3)
    a, b, c = (seen(stack, composite(stack)) for stack in stacks)
    first, second = cache.qualities(a), cache.qualities(b)
    assert first == qualities(a) and cache.qualities(a) is first  # used again, so b is now the oldest
    cache.qualities(c)
    assert cache.qualities(a) is first
    assert cache.qualities(b) is not second and cache.qualities(b) == second


def test_the_rules_cover_the_default_rubric() -> None:
    assert RUBRIC.names == CRITERIA


def test_the_pixels_of_a_request_are_bounded_in_all() -> None:
    """A few kilobytes of PNG each, 24 million pixels each: the third is not decoded."""
    image = encode_image(np.zeros((4800, 5000, 3), np.uint8))
    part = {"type": "image_url", "image_url": {"url": image.url.decode()}}
    assert parse_images([{"role": "user", "content": [part]}]).question == ""
    with pytest.raises(BadRequestError, match="the images of the request have over 48000000 pixels"):
        parse_images([{"role": "user", "content": [part] * 3}])


@pytest.mark.timeout(30)
@pytest.mark.parametrize(
    "sent",
    [b"POST /v1/chat/completions HTTP/1.1\r\n", b"POST /v1/chat/completions HTTP/1.1\r\nContent-Length: 900\r\n\r\n"],
)
def test_a_client_that_sends_a_byte_now_and_then_is_let_go(sent: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "HEAD_SECONDS", 0.6)
    monkeypatch.setattr(server, "BODY_SECONDS", 0.6)
    with start_in_thread() as url, socket.create_connection((urlsplit(url).hostname, urlsplit(url).port)) as client:
        client.sendall(sent)
        client.settimeout(0.1)
        began = time.monotonic()
        while time.monotonic() - began < 10:
            try:
                client.sendall(b"x")
                if client.recv(100) == b"":
                    break
            except TimeoutError:
                continue
            except OSError:
                break
        assert 0.4 < time.monotonic() - began < 5
        assert ask_status(url) == 200  # others are served


def ask_status(url: str) -> int:
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=10)
    connection.request("GET", "/health")
    return connection.getresponse().status
