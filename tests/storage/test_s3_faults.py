"""The S3 store against servers that misbehave as real ones do: a proxy in front of moto spoils chosen requests."""

from __future__ import annotations

import base64
import contextlib
import functools
import hashlib
import http.client
import itertools
import os
import re
import socket
import struct
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from layerloop.components.schema.errors import LayerloopError, UnavailableError
from layerloop.components.storage import s3, s3_client, s3_pace, s3_requests
from layerloop.components.storage.stores import MissingObjectError, Store, open_store

Spoil = Callable[["Proxy"], bool]  # whether it has answered the request itself


class Proxy(BaseHTTPRequestHandler):
    """Forwards to moto, except for what the server's `spoil` does to a request."""

    protocol_version = "HTTP/1.1"
    server: FaultyServer

    def handle_any(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.seen.append(f"{self.command} {self.path}")
        if self.server.spoil(self):
            return
        status, headers, data = self.forward()
        self.answer(status, data, headers)

    def forward(self) -> tuple[int, list[tuple[str, str]], bytes]:
        connection = http.client.HTTPConnection(self.server.upstream, timeout=30)
        headers = {name: value for name, value in self.headers.items() if name.lower() != "expect"}
        connection.request(self.command, self.path, body=self.body, headers=headers)
        response = connection.getresponse()
        data = response.read()
        kept = [
            (n, v) for n, v in response.getheaders() if n.lower() not in ("connection", "transfer-encoding", "date")
        ]
        return response.status, kept, data

    def answer(self, status: int, data: bytes, headers: list[tuple[str, str]] | None = None) -> None:
        self.send_response_only(status)
        for name, value in headers if headers is not None else [("Content-Length", str(len(data)))]:
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def drop(self) -> None:
        """Cut the connection without an answer."""
        self.close_connection = True
        self.connection.shutdown(2)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = handle_any

    def log_message(self, *_: object) -> None:
        pass


class FaultyServer(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, upstream: str) -> None:
        super().__init__(("127.0.0.1", 0), Proxy)
        self.upstream = upstream
        self.seen: list[str] = []
        self.spoil: Spoil = lambda _: False


@pytest.fixture(scope="module")
def proxy(s3_environment: dict[str, str]) -> Iterator[FaultyServer]:
    server = FaultyServer(urlsplit(s3_environment["AWS_ENDPOINT_URL"]).netloc)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def faulty(proxy: FaultyServer, monkeypatch: pytest.MonkeyPatch) -> FaultyServer:
    """A proxy that boto3 is led to; tests set its `spoil`. What a process learns of a bucket is forgotten before."""
    proxy.seen, proxy.spoil = [], lambda _: False
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.server_port}")
    monkeypatch.setattr(s3, "_ignores_conditions", {})
    monkeypatch.setattr(s3, "_other_etags", set())
    monkeypatch.setattr(s3_requests, "_answered", set())
    monkeypatch.setattr(s3_client.checksums(f"http://127.0.0.1:{proxy.server_port}"), "compares_crc32", None)
    return proxy


@pytest.fixture
def store(faulty: FaultyServer, s3_bucket: str) -> Store:
    return open_store(s3_bucket)


def probe(request: Proxy) -> bool:
    return "conditional-write-probe" in request.path


NO_CONDITIONS = (
    "no conditional writes here, so create-only writes bid for a second, and a writer that stops in the middle may "
    "replace a manifest"
)


def test_a_server_that_overlooks_conditions_is_noticed_once_and_still_creates_only_once(
    faulty: FaultyServer, store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    def overlook(request: Proxy) -> bool:
        del request.headers["If-None-Match"]
        return False

    faulty.spoil = overlook
    assert store.create("a", b"1")
    assert not store.create("a", b"2")
    assert store.create("c/b", b"3")
    assert store.read("a") == b"1"
    assert store.list() == ["a", "c/b"]  # the probe is gone
    assert [record.getMessage().split(": ")[1] for record in caplog.records] == [NO_CONDITIONS]
    assert len([line for line in faulty.seen if line.startswith("PUT") and "probe" in line]) == 2


@pytest.mark.parametrize(("status", "code"), [(501, "NotImplemented"), (400, "InvalidArgument")])
def test_a_server_that_refuses_the_header_is_noticed(
    faulty: FaultyServer, store: Store, caplog: pytest.LogCaptureFixture, status: int, code: str
) -> None:
    def refuse(request: Proxy) -> bool:
        if "If-None-Match" not in request.headers:
            return False
        request.answer(status, f"<Error><Code>{code}</Code><Message>no</Message></Error>".encode())
        return True

    faulty.spoil = refuse
    assert store.create("a", b"1")
    assert not store.create("a", b"2")
    assert store.read("a") == b"1"
    assert [record.getMessage().split(": ")[1] for record in caplog.records] == [NO_CONDITIONS]


def test_a_server_with_conditions_is_probed_once_in_silence(
    faulty: FaultyServer, store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    assert store.create("a", b"1")
    assert not store.create("a", b"2")
    assert store.create("c/b", b"3")
    assert len([line for line in faulty.seen if line.startswith("PUT") and "probe" in line]) == 2
    assert caplog.records == []


def test_a_create_whose_answer_was_lost_knows_itself_as_the_winner(faulty: FaultyServer, store: Store) -> None:
    lost = itertools.count()

    def lose_first_answer(request: Proxy) -> bool:
        if request.command == "PUT" and not probe(request) and next(lost) == 0:
            request.forward()  # the object is made, but the answer is lost; boto3's second attempt meets a 412
            request.drop()
            return True
        return False

    faulty.spoil = lose_first_answer
    assert store.create("m.json", b"mine")
    assert next(lost) >= 2
    assert not store.create("m.json", b"mine")
    assert store.read("m.json") == b"mine"


def test_a_conflict_with_a_writer_in_flight_is_settled_by_trying_again(faulty: FaultyServer, store: Store) -> None:
    puts = itertools.count()

    def conflict(request: Proxy) -> bool:
        if request.command != "PUT" or probe(request) or next(puts) > 0:
            return False
        request.answer(409, b"<Error><Code>ConditionalRequestConflict</Code><Message>busy</Message></Error>")
        return True

    faulty.spoil = conflict
    assert store.create("m.json", b"mine")
    assert store.read("m.json") == b"mine"
    assert next(puts) == 2


def test_throttling_and_broken_connections_are_tried_again(faulty: FaultyServer, store: Store, tmp_path: Path) -> None:
    count = itertools.count()

    def stumble(request: Proxy) -> bool:
        turn = next(count) % 3
        if turn == 0:
            request.answer(503, b"<Error><Code>SlowDown</Code><Message>slow</Message></Error>")
        elif turn == 1:
            request.drop()
        return turn < 2

    faulty.spoil = stumble
    store.write("x", b"payload")
    assert store.read("x") == b"payload"
    assert store.list() == ["x"]


def test_a_body_that_breaks_off_is_fetched_again(faulty: FaultyServer, store: Store) -> None:
    data = bytes(range(256)) * 4000
    store.write("x", data)
    gets = itertools.count()

    def break_off(request: Proxy) -> bool:
        if request.command != "GET" or next(gets) > 0:
            return False
        status, headers, body = request.forward()
        request.answer(status, body[: len(body) // 2], headers)  # Content-Length promises the whole
        request.drop()
        return True

    faulty.spoil = break_off
    assert store.read("x") == data
    assert next(gets) >= 2


@pytest.mark.parametrize(
    ("status", "code", "message"),
    [
        (
            403,
            "AccessDenied",
            " to the credentials in use, which need get, put, list and delete",
        ),
        (403, "InvalidAccessKeyId", "the store refused the credentials (InvalidAccessKeyId): renew or correct them"),
        (400, "ExpiredToken", "the credentials have expired (ExpiredToken): renew them and run the step again"),
        (404, "NoSuchBucket", "bucket layerloop-tests does not exist: create it or correct the URI"),
        (403, "QuotaExceeded", "there is no room left (QuotaExceeded): free some space, or raise the quota"),
        (418, "XMinioStorageFull", "there is no room left (XMinioStorageFull): free some space, or raise the quota"),
        (403, "RequestTimeTooSkewed", "this machine's clock is off by 20 minutes (RequestTimeTooSkewed): set it right"),
        (400, "IllegalLocationConstraintException", "bucket layerloop-tests is in another region"),
        (418, "Teapot", "the store answered Teapot: see its own log"),
        (418, "418", "the server answered 418: see its log, or correct AWS_ENDPOINT_URL where it is not an S3 store"),
    ],
)
def test_refusals_are_one_line_without_secrets(
    faulty: FaultyServer, store: Store, tmp_path: Path, status: int, code: str, message: str
) -> None:
    def refuse(request: Proxy) -> bool:
        text = f"<Error><Code>{code}</Code><Message>key testing-id secret testing-secret</Message>"
        text += "<RequestTime>20261128T091500Z</RequestTime><ServerTime>2026-11-28T08:55:00Z</ServerTime></Error>"
        request.answer(status, text.encode())
        return True

    faulty.spoil = refuse
    (tmp_path / "file").write_bytes(b"1")
    for ask in (
        lambda: store.write("x", b""),
        lambda: store.list(),
        lambda: store.create("x", b""),
        lambda: store.upload("x", tmp_path / "file"),
        lambda: store.read("x"),
    ):
        with pytest.raises(LayerloopError) as caught:
            ask()
        assert message in str(caught.value)
        assert "testing-i" not in str(caught.value) and "testing-secret" not in str(caught.value)


def test_a_store_that_is_too_busy_is_no_refusal_for_good(
    faulty: FaultyServer, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So a retried task tries again: refusals are remembered, this is not."""

    def busy(request: Proxy) -> bool:
        request.answer(503, b"<Error><Code>SlowDown</Code><Message>slow</Message></Error>")
        return True

    monkeypatch.setattr(s3_client, "ATTEMPTS", 1)
    s3_client._new_client.cache_clear()
    faulty.spoil = busy
    with pytest.raises(UnavailableError, match=r"x: the store is too busy \(SlowDown\): try again later"):
        open_store(store.uri).write("x", b"")
    s3_client._new_client.cache_clear()


def once(spoil: Callable[[Proxy], None], *, command: str) -> tuple[Spoil, list[str]]:
    """Spoil the first request of a kind; and the paths of all of that kind."""
    seen: list[str] = []

    def maybe(request: Proxy) -> bool:
        if request.command != command or probe(request):
            return False
        seen.append(request.path)
        if len(seen) > 1:
            return False
        spoil(request)
        return True

    return maybe, seen


def cut_short(request: Proxy) -> None:
    status, headers, body = request.forward()
    kept = [(name, value) for name, value in headers if name.lower() != "content-length"]
    request.answer(status, body[: len(body) // 2], [*kept, ("Content-Length", str(len(body)))])
    request.wfile.flush()
    request.drop()


def reset(request: Proxy) -> None:
    """Half of the answer, and then a reset where the rest should be."""
    status, headers, body = request.forward()
    kept = [(name, value) for name, value in headers if name.lower() != "content-length"]
    request.answer(status, body[: len(body) // 2], [*kept, ("Content-Length", str(len(body)))])
    request.wfile.flush()
    request.close_connection = True
    request.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    request.connection.close()


def flip_a_bit(request: Proxy) -> None:
    status, headers, body = request.forward()
    request.answer(status, body[:-1] + bytes([body[-1] ^ 1]), headers)


def test_a_reset_in_the_middle_of_an_error_or_a_listing_is_asked_again(faulty: FaultyServer, store: Store) -> None:
    store.write("there", b"1")
    faulty.spoil, seen = once(reset, command="GET")
    with pytest.raises(MissingObjectError):
        store.read("nowhere")
    assert len(seen) == 2
    for spoil in (reset, cut_short):
        faulty.spoil, seen = once(spoil, command="GET")
        assert store.list() == ["there"]
        assert len(seen) == 2


def test_an_opened_file_whose_body_breaks_off_is_fetched_again_with_patience(
    faulty: FaultyServer, store: Store, tmp_path: Path
) -> None:
    data = bytes(range(256)) * 1000
    store.write("x", data)
    gets = itertools.count()

    def break_off(request: Proxy) -> bool:
        if request.command != "GET" or next(gets) > 6:  # more often than boto3 tries by itself
            return False
        cut_short(request)
        return True

    faulty.spoil = break_off
    with store.open("x") as file:
        assert file.read() == data
    gets = itertools.count()
    store.download("x", tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == data


def test_a_bit_that_flips_on_the_way_from_the_store_is_read_again(faulty: FaultyServer, store: Store) -> None:
    store.write("x", b"manifest")
    faulty.spoil, seen = once(flip_a_bit, command="GET")
    assert store.read("x") == b"manifest"
    assert len(seen) == 2


def test_a_store_whose_etags_are_no_md5_is_read_twice_once_only(faulty: FaultyServer, store: Store) -> None:
    """Encrypted by a key of the user's, for instance."""
    for name in ("x", "y"):
        store.write(name, b"content")

    def other_etag(request: Proxy) -> bool:
        if request.command != "GET":
            return False
        status, headers, body = request.forward()
        kept = [(name, value) for name, value in headers if name.lower() != "etag"]
        request.answer(status, body, [*kept, ("ETag", f'"{"0" * 32}"')])
        return True

    faulty.spoil = other_etag
    before = len(faulty.seen)
    assert [store.read(name) for name in ("x", "y", "x")] == [b"content"] * 3
    assert len(faulty.seen) - before == 4


def compare(request: Proxy) -> bool:
    """Refuse a body that is not that of its headers, as S3 and rclone do and moto does not."""
    said = [request.headers[name] for name in ("Content-MD5", "x-amz-checksum-crc32") if name in request.headers]
    own = (hashlib.md5(request.body).digest(), zlib.crc32(request.body).to_bytes(4, "big"))
    assert said, "nothing to compare with"
    if set(said) <= {base64.b64encode(digest).decode() for digest in own}:
        return False
    request.answer(400, b"<Error><Code>BadDigest</Code><Message>no</Message></Error>")
    return True


def test_a_bit_that_flips_on_the_way_to_the_store_is_noticed_there(
    faulty: FaultyServer, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The header that comes with every object and part says so."""
    monkeypatch.setattr(s3, "PART_BYTES", 5 << 20)
    flipped = set[str]()

    def flip(request: Proxy) -> bool:
        if request.command != "PUT" or probe(request):
            return False
        if (what := re.sub("uploadId=[^&]*", "", request.path)) not in flipped:
            flipped.add(what)
            request.body = bytes([request.body[0] ^ 1]) + request.body[1:]
        return compare(request)

    faulty.spoil = flip
    store.write("x", b"content")
    assert store.read("x") == b"content" and len(flipped) == 1
    (tmp_path / "small").write_bytes(b"file")
    (tmp_path / "large").write_bytes(os.urandom(11 << 20))
    for name in ("small", "large"):
        store.upload(name, tmp_path / name)
        assert store.read(name) == (tmp_path / name).read_bytes()
    assert len(flipped) == 5, "the large one has three parts"


def hashes_sent(faulty: FaultyServer, spoil: Spoil) -> list[tuple[bool, bool]]:
    """Of every upload's request whether it brings Content-MD5 and CRC-32, while `spoil` is at work."""
    sent: list[tuple[bool, bool]] = []

    def look(request: Proxy) -> bool:
        if request.command == "PUT" and not probe(request):
            sent.append(("Content-MD5" in request.headers, "x-amz-checksum-crc32" in request.headers))
        return spoil(request)

    faulty.spoil = look
    return sent


def without_crc32(request: Proxy) -> bool:
    """A store that overlooks it."""
    for name in [name for name in request.headers if "checksum" in name.lower()]:
        del request.headers[name]
    return False


def refuse_crc32(request: Proxy) -> bool:
    """A store that refuses it."""
    if any("checksum" in name.lower() for name in request.headers):
        request.answer(501, b"<Error><Code>NotImplemented</Code><Message>no such header</Message></Error>")
        return True
    return False


def test_a_file_goes_with_the_hash_that_its_store_compares(
    faulty: FaultyServer, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MD5 until the store has shown that it knows CRC-32, and for ever where it overlooks or refuses that."""
    monkeypatch.setattr(s3, "PART_BYTES", 5 << 20)
    (tmp_path / "small").write_bytes(b"file")
    (tmp_path / "large").write_bytes(bytes(11 << 20))
    sent = hashes_sent(faulty, lambda _: False)
    store.upload("small", tmp_path / "small")
    store.upload("large", tmp_path / "large")
    store.write("x", b"")
    assert sent == [(True, True), *[(False, True)] * 3, (True, False)]
    for spoil, first in ((without_crc32, [(True, True)]), (refuse_crc32, [(True, True), (True, False)])):
        s3_client.checksums(os.environ["AWS_ENDPOINT_URL"]).compares_crc32 = None
        sent = hashes_sent(faulty, spoil)
        store.upload("small", tmp_path / "small")
        assert sent == first
        store.upload("large", tmp_path / "large")
        assert sent[len(first) :] == [(True, False)] * 3
        assert store.size("large") == 11 << 20


def test_an_answer_without_a_length_is_looked_up_in_the_listing(faulty: FaultyServer, store: Store) -> None:
    store.write("x", b"123")

    def without_length(request: Proxy) -> bool:
        if request.command != "HEAD":
            return False
        status, headers, _ = request.forward()
        request.answer(status, b"", [(n, v) for n, v in headers if n.lower() != "content-length"])
        request.close_connection = True
        return True

    faulty.spoil = without_length
    assert store.size("x") == 3


def test_unfinished_uploads_are_left_over_and_removed(faulty: FaultyServer, store: Store) -> None:
    import boto3

    bucket, _, prefix = store.uri.removeprefix("s3://").partition("/")
    client = boto3.client("s3")
    client.create_multipart_upload(Bucket=bucket, Key=f"{prefix}/big.tar")
    other = client.create_multipart_upload(Bucket=bucket, Key="elsewhere/big.tar")
    store.write(f"{s3.PROBE}0123", b"")
    store.write("kept", b"1")
    assert store.leftovers() == [f"{s3.PROBE}0123", "unfinished upload of big.tar"]
    store.remove_leftovers()
    assert store.leftovers() == [] and store.list() == ["kept"]
    client.abort_multipart_upload(Bucket=bucket, Key="elsewhere/big.tar", UploadId=other["UploadId"])


def test_a_bucket_that_does_not_exist_is_one_line(s3_environment: dict[str, str]) -> None:
    with pytest.raises(LayerloopError, match="bucket no-such-bucket does not exist: create it or correct the URI"):
        open_store("s3://no-such-bucket/x").create("m.json", b"")
    for ask in (lambda store: store.exists("m.json"), lambda store: store.size("m.json")):
        with pytest.raises(LayerloopError, match="bucket no-such-bucket does not exist"):
            ask(open_store("s3://no-such-bucket/x"))  # a HEAD's 404 says not of what


def test_a_server_that_is_not_there_is_one_line(s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3_client, "ATTEMPTS", 2)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://someone:password@127.0.0.1:9")
    with pytest.raises(LayerloopError) as caught:
        open_store(s3_bucket).read("x")
    assert str(caught.value).startswith(
        f"{s3_bucket} does not answer at http://127.0.0.1:9 (EndpointConnectionError): "
    )
    assert str(caught.value).endswith("check AWS_ENDPOINT_URL and the network")


def test_missing_credentials_are_one_line(s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    with pytest.raises(
        LayerloopError, match="needs credentials and none were found: set AWS_ACCESS_KEY_ID and AWS_SEC"
    ):
        open_store(s3_bucket).read("x")


def test_nothing_of_the_credentials_is_logged(
    s3_bucket: str, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    store = open_store(s3_bucket)
    store.create("a", b"1")
    store.create("a", b"1")
    store.read("a")
    text = caplog.text + "".join(capfd.readouterr())
    assert "testing-secret" not in text
    assert "testing-id" not in text


def test_an_upload_in_parts_whose_last_answer_was_lost_is_there(
    faulty: FaultyServer, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The request again meets an upload that is no more."""
    monkeypatch.setattr(s3, "PART_BYTES", 5 << 20)
    completed: list[str] = []

    def lose_the_last_answer(request: Proxy) -> bool:
        if request.command != "POST" or "uploadId" not in request.path:
            return False
        completed.append(request.path)
        if len(completed) == 1:
            request.forward()
            request.drop()
        elif len(completed) == 2:  # as S3 and others answer, if not all
            request.answer(404, b"<Error><Code>NoSuchUpload</Code><Message>no</Message></Error>")
        return len(completed) <= 2

    faulty.spoil = lose_the_last_answer
    (tmp_path / "large").write_bytes(b"x" * (11 << 20))
    store.upload("large", tmp_path / "large")
    assert store.size("large") == 11 << 20 and len(completed) == 3
    assert store.leftovers() == []


def test_a_range_beyond_the_end_is_empty_and_one_across_it_is_short(store: Store) -> None:
    store.write("x", b"0123456789")
    assert [store.read_range("x", *span) for span in ((2, 3), (8, 5), (10, 5), (99, 1), (3, 0))] == [
        b"234", b"89", b"", b"", b"",
    ]  # fmt: skip
    with pytest.raises(MissingObjectError):
        store.read_range("y", 0, 1)


def test_a_server_that_knows_no_ranges_is_read_all_the_same(faulty: FaultyServer, store: Store) -> None:
    store.write("x", b"0123456789")

    def without_range(request: Proxy) -> bool:
        del request.headers["Range"]
        return False

    faulty.spoil = without_range
    assert [store.read_range("x", *span) for span in ((0, 3), (2, 3), (8, 5))] == [b"012", b"234", b"89"]


@pytest.mark.parametrize(
    ("status", "code", "message"),
    [
        (400, "ExpiredToken", r"the credentials have expired \(ExpiredToken\)"),
        (403, "RequestTimeTooSkewed", r"this machine's clock is off by 20 minutes \(RequestTimeTooSkewed\)"),
        (301, "PermanentRedirect", r"in another region \(PermanentRedirect\): set AWS_REGION=eu-west-3"),
    ],
)
def test_a_refusal_of_head_which_has_no_words_is_explained(
    faulty: FaultyServer, store: Store, status: int, code: str, message: str
) -> None:
    def refuse(request: Proxy) -> bool:
        text = f"<Error><Code>{code}</Code><RequestTime>20261128T091500Z</RequestTime>"
        text += "<ServerTime>2026-11-28T08:55:00Z</ServerTime><Region>eu-west-3</Region></Error>"
        known = [("Content-Length", str(len(text))), ("x-amz-bucket-region", "eu-west-3")]
        request.answer(status, text.encode(), known)
        return True

    faulty.spoil = refuse
    for ask in (store.exists, store.size):
        with pytest.raises(LayerloopError, match=message):
            ask("x")


@pytest.mark.parametrize(
    ("code", "words", "message"),
    [
        (
            "AccessDenied",
            "User: arn:aws:iam::1:user/me is not authorized to perform: kms:GenerateDataKey on resource",
            r"access denied \(AccessDenied\): allow kms:GenerateDataKey to the credentials in use$",
        ),
        ("AccessDenied", "Access Denied.", r"\(AccessDenied\): allow put to the credentials in use, which need get, "),
        ("KMS.DisabledException", "no", r"cannot use the key \(KMS.DisabledException\): correct LAYERLOOP_S3_KMS_KEY"),
        ("ServerSideEncryptionConfigurationNotFoundError", "no", "refuses this encryption .*LAYERLOOP_S3_ENCRYPTION"),
        ("VirtualHostDomainRequired", "no", "set LAYERLOOP_S3_ADDRESSING=virtual"),
    ],
)
def test_a_refused_write_names_the_right_or_the_setting(
    faulty: FaultyServer, store: Store, code: str, words: str, message: str
) -> None:
    def refuse(request: Proxy) -> bool:
        request.answer(403, f"<Error><Code>{code}</Code><Message>{words}</Message></Error>".encode())
        return True

    faulty.spoil = refuse
    with pytest.raises(LayerloopError, match=message) as caught:
        store.write("x", b"")
    assert "arn:" not in str(caught.value)


def test_an_outage_that_all_workers_meet_at_once_is_waited_for(faulty: FaultyServer, store: Store) -> None:
    """boto3 stops early where many requests of a process fail, by a budget that they share."""
    store.write("x", b"payload")
    until = time.monotonic() + 2.0

    def down(request: Proxy) -> bool:
        if time.monotonic() > until:
            return False
        request.answer(503, b"<Error><Code>SlowDown</Code><Message>slow</Message></Error>")
        return True

    faulty.spoil = down
    with ThreadPoolExecutor(64) as pool:
        assert set(pool.map(lambda _: store.read("x"), range(64))) == {b"payload"}
    assert time.monotonic() > until


def test_a_store_that_goes_away_for_good_ends_the_wait(
    faulty: FaultyServer, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3_requests, "PATIENCE", 1.0)
    monkeypatch.setattr(s3_client, "ATTEMPTS", 1)
    s3_client._new_client.cache_clear()
    again = open_store(store.uri)
    again.write("x", b"")
    faulty.spoil = lambda request: request.drop() or True  # type: ignore[func-returns-value]
    began = time.monotonic()
    with pytest.raises(UnavailableError, match="does not answer at"):
        again.read("x")
    assert 1.0 < time.monotonic() - began < 20
    s3_client._new_client.cache_clear()


def drip(request: Proxy, data: bytes) -> None:
    """A byte now and then, until the other side has had enough."""
    with contextlib.suppress(OSError):
        for byte in itertools.cycle(data):
            request.connection.sendall(bytes([byte]))
            time.sleep(0.02)


def drip_headers(request: Proxy) -> None:
    drip(request, b"HTTP/1.1 200 OK\r\nX-Slow: " + b"z" * 1000)


def drip_body(request: Proxy) -> None:
    request.connection.sendall(b'HTTP/1.1 200 OK\r\nContent-Length: 10000\r\nETag: "0"\r\n\r\n')
    drip(request, b"<ListBucketResult>")


@pytest.mark.parametrize("spoil", [drip_headers, drip_body])
def test_a_store_that_answers_a_byte_at_a_time_is_given_up(
    faulty: FaultyServer, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spoil: Callable[[Proxy], None]
) -> None:
    """An object, a listing, and an object into a file, none of which is ever silent for long."""
    store.write("x", b"payload")
    monkeypatch.setattr(s3_pace, "WINDOW", 0.05)
    monkeypatch.setattr(s3_requests, "PATIENCE", 0.0)
    monkeypatch.setattr(s3_client, "ATTEMPTS", 0)
    s3_client._new_client.cache_clear()
    slow = open_store(store.uri)

    def slowly(request: Proxy) -> bool:
        request.close_connection = True
        if spoil is drip_body and request.command == "HEAD":
            return False
        spoil(request)
        return True

    faulty.spoil = slowly
    line = r"is too slow at http://127.0.0.1:\d+ \(\d+ bytes in 0 s\): see to the store, the network"
    download = functools.partial(slow.download, "x", tmp_path / "x")
    for ask in (slow.list,) if spoil is drip_headers else (functools.partial(slow.read, "x"), slow.list, download):
        began = time.monotonic()
        with pytest.raises(UnavailableError, match=line):
            ask()
        assert 0.05 < time.monotonic() - began < 5
    assert list(tmp_path.iterdir()) == []
    s3_client._new_client.cache_clear()


def test_a_store_that_takes_a_byte_at_a_time_is_given_up(
    s3_bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_bytes(bytes(16 << 20))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 12)

        def swallow() -> None:
            with contextlib.suppress(OSError):
                while True:
                    taken, _ = listener.accept()
                    kept.append(taken)
                    threading.Thread(target=sip, args=(taken,), daemon=True).start()

        def sip(taken: socket.socket) -> None:
            with contextlib.suppress(OSError):
                while taken.recv(1 << 16):
                    time.sleep(0.01)

        kept: list[socket.socket] = []
        threading.Thread(target=swallow, daemon=True).start()
        monkeypatch.setattr(s3_pace, "WINDOW", 0.2)
        monkeypatch.setattr(s3_pace, "RATE", 50e6)
        monkeypatch.setattr(s3_client, "ATTEMPTS", 0)
        monkeypatch.setattr(s3_requests, "PATIENCE", 0.0)
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{listener.getsockname()[1]}")
        with pytest.raises(UnavailableError, match=r"is too slow at http://127.0.0.1:\d+ \(\d+ bytes in "):
            open_store(s3_bucket).upload("x", tmp_path / "file")
        for taken in kept:
            taken.close()


def test_a_web_page_in_place_of_a_store_is_said(
    faulty: FaultyServer, s3_bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def page(request: Proxy) -> bool:
        if request.command == "PUT":
            request.answer(405, b"<html><body>Method not allowed</body></html>")
        else:
            request.answer(200, b"<html><body><br>welcome</html>")
        return True

    monkeypatch.setattr(s3_client, "ATTEMPTS", 1)
    s3_client._new_client.cache_clear()
    store = open_store(s3_bucket)
    faulty.spoil = page
    with pytest.raises(
        LayerloopError, match=r"the server answered 500: .* correct AWS_ENDPOINT_URL where it is not an S3"
    ):
        store.list()
    with pytest.raises(LayerloopError, match=r"\(405\): is AWS_ENDPOINT_URL the address of an S3 store\?"):
        store.write("x", b"")
    s3_client._new_client.cache_clear()


def test_an_ingress_that_sends_everybody_elsewhere_is_said(faulty: FaultyServer, store: Store) -> None:
    def elsewhere(request: Proxy) -> bool:
        request.answer(301, b"", [("Location", "https://127.0.0.1/"), ("Content-Length", "0")])
        return True

    faulty.spoil = elsewhere
    for ask in (store.exists, store.read):
        with pytest.raises(LayerloopError, match=r"redirects every request: correct AWS_ENDPOINT_URL \(https\?\)"):
            ask("x")


def test_https_to_a_server_that_speaks_http_is_one_line(s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3_client, "ATTEMPTS", 1)
    monkeypatch.setenv("AWS_ENDPOINT_URL", os.environ["AWS_ENDPOINT_URL"].replace("http:", "https:"))
    with pytest.raises(LayerloopError, match=r"cannot be trusted at https://127.0.0.1:\d+ \(SSLError\): set AWS_CA_BU"):
        open_store(s3_bucket).read("x")
