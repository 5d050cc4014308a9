"""What stands between the client and a judge: compressed bodies, redirects, certificates, proxies, variables."""

from __future__ import annotations

import asyncio
import datetime
import gzip
import ipaddress
import itertools
import json
import re
import socket
import ssl
import threading
import tracemalloc
import zlib
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from layerloop.components.judge.canaries import score_canaries
from layerloop.components.judge.client import Judge
from layerloop.components.judge.logprobs import TokenProbabilities
from layerloop.components.judge.network import TooLargeError, plain_body
from layerloop.components.judge.replies import UnusableError, read_body, read_version
from layerloop.components.judge.requests import Request
from layerloop.components.judge.rubric import load_rubric
from layerloop.components.schema.errors import LayerloopError, UnavailableError
from layerloop.components.schema.judging import JudgeRecipe
from layerloop.components.schema.runtime import JudgeRuntime

from .conftest import ScriptedJudge, http
from .test_judge_hell import GOOD, READ

BODY = json.dumps({"choices": [{"message": {"content": json.dumps({"scores": GOOD})}}]}).encode()
DEFLATED = zlib.compress(BODY)


def asked(url: str, request: Request, *, key: str = "sk-secret-1") -> list[dict[str, float]]:
    async def ask() -> list[dict[str, float]]:
        runtime = JudgeRuntime(retries=0, timeout_seconds=10, give_up_seconds=1e6, start_seconds=0)
        async with Judge(url, JudgeRecipe(model="scripted", redraws=0), runtime, api_key=key) as judge:
            await judge.check_reachable()
            return (await judge.ask(request))[0]

    return asyncio.run(ask())


@pytest.mark.parametrize(
    ("body", "coding"),
    [
        (gzip.compress(BODY), "gzip"), (gzip.compress(BODY), "x-gzip"), (gzip.compress(BODY), ""),
        (DEFLATED, "deflate"),
        (BODY, "gzip"), (BODY, "UTF-8"), (BODY, "deflate"),
    ],
)  # fmt: skip
def test_a_body_that_a_gateway_packed_unasked_is_read(
    body: bytes, coding: str, scripted: ScriptedJudge, one: Request
) -> None:
    scripted.answer = http(body, headers=f"Content-Encoding: {coding}\r\n" if coding else "")
    assert asked(scripted.url, one) == [pytest.approx(READ)]


def test_a_packed_refusal_is_read_and_a_coding_that_is_not_is_named(scripted: ScriptedJudge, one: Request) -> None:
    refusal = gzip.compress(b'{"error": {"message": "unknown field seed"}}')
    packed = http(refusal, status="400 Bad Request", headers="Content-Encoding: gzip\r\n")
    scripted.answer = lambda body, number: packed if "seed" in body else http(BODY)
    assert asked(scripted.url, one) == [pytest.approx(READ)]
    scripted.answer = http(b"\x0b\x02", headers="Content-Encoding: br\r\n")
    with pytest.raises(UnusableError, match=r"^body_compressed: br, which was not asked for: switch compression off"):
        asked(scripted.url, one)
    scripted.answer = http(gzip.compress(BODY)[:-9], headers="Content-Encoding: gzip\r\n")
    with pytest.raises(UnusableError, match=r"^body_compressed: and cut off$"):
        asked(scripted.url, one)


def test_no_more_is_unpacked_than_is_read() -> None:
    """A bomb of a gigabyte costs no more than the bound."""
    packer, bomb = zlib.compressobj(9, zlib.DEFLATED, zlib.MAX_WBITS | 16), b""
    for _ in range(64):
        bomb += packer.compress(bytes(1 << 20))
    bomb += packer.flush()

    async def read(most: int) -> tuple[int, int]:
        async def stream() -> AsyncIterator[bytes]:
            yield bomb

        sizes = []
        with pytest.raises(TooLargeError):
            async for part in plain_body(stream(), "gzip", most):
                sizes.append(len(part))
        return sum(sizes), len(sizes)

    tracemalloc.start()
    assert asyncio.run(read(1 << 20)) == (0, 0)
    assert tracemalloc.get_traced_memory()[1] < 8 << 20
    tracemalloc.stop()


def test_a_redirect_is_said_before_anything_is_masked(scripted: ScriptedJudge, one: Request) -> None:
    place = "Location: https://u:pw@judge.example.com/v1/chat/completions?token=abc\r\n"
    scripted.answer = http("", status="308 Permanent Redirect", headers=place)
    with pytest.raises(LayerloopError) as caught:
        asked(scripted.url, one)
    assert "redirects (HTTP 308) to https://...@judge.example.com/v1/chat/completions?...: give that" in str(
        caught.value
    )
    scripted.answer = http("", status="301 Moved", headers="Location: /api/v1/chat/completions\r\n")
    with pytest.raises(LayerloopError, match=rf"to {scripted.url.removesuffix('/v1')}/api/v1: give that as its URL"):
        asked(scripted.url, one)


def test_a_refused_key_in_a_body_with_status_200_stops_at_once(scripted: ScriptedJudge, one: Request) -> None:
    scripted.answer = http('{"error": {"code": 401, "message": "no such key sk-secret-1"}}')
    with pytest.raises(LayerloopError, match=r"refuses the key \(HTTP 401: no such key \.\.\.; code 401\)"):
        asked(scripted.url, one)


def test_tasks_that_are_all_refused_are_one_line(scripted: ScriptedJudge) -> None:
    scripted.answer = http('{"error": {"message": "no such key"}}', status="401 Unauthorized")
    recipe = JudgeRecipe(model="scripted", resolution=64)

    async def ask() -> None:
        async with Judge(scripted.url, recipe, JudgeRuntime(retries=0), api_key="sk-1") as judge:
            await score_canaries(judge, load_rubric("default"), recipe)

    with pytest.raises(LayerloopError, match=r"refuses the key \(HTTP 401: no such key\)"):
        asyncio.run(ask())


def test_no_error_shows_the_key(scripted: ScriptedJudge, one: Request) -> None:
    scripted.answer = http('{"error": {"message": "image: my0wn!key is odd"}}', status="400 Bad Request")
    with pytest.raises(UnusableError, match=r"^http_400: image: \.\.\. is odd$"):
        asked(scripted.url, one, key="my0wn!key")


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b'data: {"choices": []}\n\ndata: [DONE]\n\n', "body_not_json: it streams, which was not asked for"),
        (b": ping\n\nevent: x\ndata: {}\n\n", "body_not_json: it streams"),
        (b'{"detail": "Not Found"}', "no_choices: Not Found"),
        (b'{"code": 40100, "msg": "no such key", "data": null}', "no_choices: no such key; code 40100"),
        (
            b'{"choices": [{"message": {"content": "half"}, "finish_reason": "error"}]}',
            "error_body: finish_reason error",
        ),
        (b'{"a": 1}', "no_choices: keys ['a']"),
    ],
)
def test_a_body_that_is_no_completion_says_what_it_is(body: bytes, said: str) -> None:
    with pytest.raises(UnusableError) as caught:
        read_body(body)
    assert str(caught.value).startswith(said)


@pytest.mark.parametrize("odd", ["5", "[1, null]", '{"a": 1}', '"x"'])
def test_alternatives_of_tokens_that_are_none_are_left_out(odd: str) -> None:
    tokens = {"content": [{"token": "4", "top_logprobs": json.loads(odd)}]}
    body = {"choices": [{"message": {"content": "4"}, "logprobs": tokens}]}
    reply = read_body(json.dumps(body).encode())
    assert reply.tokens == ({"token": "4", "top_logprobs": []},)
    assert TokenProbabilities(reply).mean(0, float) is None
    assert read_version({"model": "m\ud83d"}) == r"m\ud83d"


def test_texts_in_a_list_are_an_answer() -> None:
    assert read_body(b'{"choices": [{"message": {"content": ["{\\"a\\":", " 1}"]}}]}').text == '{"a": 1}'


# --------------------------------------------------------------------------------------------------------- environment


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("HTTP_PROXY", "http://proxy:99999", r"HTTP_PROXY is 'http://proxy:99999', which is no address of a proxy"),
        ("http_proxy", "http://", r"http_proxy is 'http://', which is no address of a proxy: write it as http://proxy"),
        ("ALL_PROXY", " http://u:pw@h:1", r"ALL_PROXY is '\.\.\.@h:1', which is no address"),
        ("OPENAI_ORG_ID", "org-1\n", r"OPENAI_ORG_ID has characters that no HTTP header has"),
        ("OPENAI_PROJECT_ID", "pröj", r"OPENAI_PROJECT_ID has characters that no HTTP header has"),
        ("OPENAI_CUSTOM_HEADERS", "a: b\nc: é", r"OPENAI_CUSTOM_HEADERS has characters that no HTTP header has"),
    ],
)
def test_a_variable_that_no_request_survives_is_one_line_that_names_it(
    name: str, value: str, said: str, one: Request, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(LayerloopError, match=said) as caught:
        asked("http://judge.invalid:1/v1", one)
    assert "pw" not in str(caught.value)


def test_a_host_that_no_address_has_is_one_line(one: Request) -> None:
    with pytest.raises(LayerloopError, match="^judge_url is http://a\u200b.invalid/v1 .Invalid IDNA hostname"):
        asked("http://a\u200b.invalid/v1", one)


def test_why_no_connection_came_about_is_said(one: Request, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnavailableError, match=r"does not answer \(its host is not known: .*\): start it"):
        asked("http://judge.invalid/v1", one)
    with socket.create_server(("127.0.0.1", 0)) as closed:
        nobody = f"127.0.0.1:{closed.getsockname()[1]}"
    with pytest.raises(UnavailableError, match=r"does not answer \(Connection refused\): start it"):
        asked(f"http://{nobody}/v1", one)
    monkeypatch.setenv("http_proxy", f"http://{nobody}")
    with pytest.raises(UnavailableError, match=r"\(Connection refused, through the proxy of http_proxy\)"):
        asked("http://judge.invalid/v1", one)


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """(URL of a judge whose certificate nobody has signed, the certificate)."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.datetime.now(datetime.UTC)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "judge")])
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1)).not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .sign(key, hashes.SHA256())
    )  # fmt: skip
    encoding = serialization.Encoding.PEM
    file = tmp_path_factory.mktemp("tls") / "judge.pem"
    private = key.private_bytes(encoding, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    file.write_bytes(private + made.public_bytes(encoding))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(file)
    server = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                plain, _ = server.accept()
            except OSError:  # the test is over
                return
            try:
                with context.wrap_socket(plain, server_side=True) as secure:
                    head = _read_request(secure)
                    models = b"/models" in head.split(b"\r\n")[0]
                    secure.sendall(
                        http(b'{"data": [{"id": "scripted"}]}' if models else BODY, headers="Connection: close\r\n")
                    )
            except OSError:
                continue

    threading.Thread(target=serve, daemon=True).start()
    yield f"https://127.0.0.1:{server.getsockname()[1]}/v1", file
    server.shutdown(socket.SHUT_RDWR)
    server.close()


def _read_request(connection: socket.socket) -> bytes:
    """The head of a request that was read to its end: what is left unread resets the connection when it is closed."""
    with connection.makefile("rb") as file:
        head = b"".join(itertools.takewhile(lambda line: line != b"\r\n", file))
        length = re.search(rb"(?i)^content-length: *(\d+)", head, re.MULTILINE)
        file.read(int(length[1]) if length else 0)
    return head


def test_a_certificate_of_nobody_is_named_with_the_remedy(
    tls: tuple[str, Path], one: Request, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, file = tls
    said = r"cannot be called by TLS \(its certificate is not trusted: self-signed certificate\): set SSL_CERT_FILE"
    with pytest.raises(LayerloopError, match=said) as caught:
        asked(url, one)
    assert not isinstance(caught.value, UnavailableError), "another attempt would fail alike"
    monkeypatch.setenv("SSL_CERT_FILE", str(file))
    assert asked(url, one) == [pytest.approx(READ)]


def test_folders_of_certificates_may_be_several(
    tls: tuple[str, Path], one: Request, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_DIR", f"/nowhere:{tls[1].parent}")  # has no hashed names, so it makes nothing trusted
    with pytest.raises(LayerloopError, match=r"not trusted"):
        asked(tls[0], one)
    monkeypatch.setenv("SSLKEYLOGFILE", "/nowhere/keys")
    with pytest.raises(LayerloopError, match=r"^SSLKEYLOGFILE is /nowhere/keys, which cannot be written"):
        asked(tls[0], one)


@pytest.mark.parametrize("key", ['"sk-1234567"', "'sk-1234567'\n", '" sk-1234567 "'])
def test_a_key_in_quotation_marks_is_sent_without_them(key: str, scripted: ScriptedJudge, one: Request) -> None:
    scripted.answer = http(BODY)
    asked(scripted.url, one, key=key)
    assert "authorization: Bearer sk-1234567\r\n".lower() in scripted.headers[-1].lower()
